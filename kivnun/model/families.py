"""What is known of model families by name, without loading one: licences, built-in bases, names of fused projections.

Any causal language model of transformers works through the generic path; a family here adds what cannot be read from its
configuration. Imports nothing heavy, so that listing bases costs nothing. Next: `load.py`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kivnun.errors import BaseModelError

BUILT_IN = {"kivnun/tiny-phi": Path(__file__).parent.parent / "bases" / "tiny_phi"}

# Names under which users know projections that a family stores fused. All parts of a fused projection must be asked for
# together: an adapter on the fused matrix cannot train one of its parts alone.
FUSED_PARTS = {
    "qkv_proj": frozenset({"q_proj", "k_proj", "v_proj"}),
    "gate_up_proj": frozenset({"gate_proj", "up_proj"}),
}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")

REFUSED = {
    "phi3small": "Phi-3-small computes block-sparse attention in code of its own that transformers does not hold",
}

# Families of transformers whose sliding window stands in a mask alone, which packed rows do without.
WINDOW_IN_MASK = frozenset({"phimoe", "qwen2_moe", "doge"})


@dataclass(frozen=True, slots=True)
class Family:
    """A family as its configuration's `model_type` names it."""

    name: str
    licence: str


FAMILIES = {
    "phi3": Family("Phi-3 / Phi-3.5 / Phi-4", "MIT"),
    "phi": Family("Phi-1 / Phi-2", "MIT"),
    "llama": Family("Llama", "see the base's own licence"),
    "mistral": Family("Mistral", "Apache-2.0 or the base's own licence"),
    "qwen2": Family("Qwen2", "see the base's own licence"),
    "qwen3": Family("Qwen3", "Apache-2.0"),
    "gemma": Family("Gemma", "Gemma terms of use"),
    "gemma2": Family("Gemma 2", "Gemma terms of use"),
}


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """One base one can name in a spec."""

    id: str
    family: str
    parameters: int
    folder: str
    licence: str


def find_base(model: str, revision: str | None = None) -> Path:
    """Return the folder of a base: a built-in id, a folder, or a model hub's id (downloaded or taken from its cache).

    Raises BaseModelError when it is nowhere to be found.
    """
    if model in BUILT_IN:
        return BUILT_IN[model]
    if Path(model).is_dir():
        return Path(model)
    if model.startswith("kivnun/"):
        near = get_close_matches(model, BUILT_IN, n=1, cutoff=0.0)[0]
        raise BaseModelError(f"there is no built-in base {model!r}", hint=f"did you mean {near}?")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise BaseModelError(
            f"base {model!r} is neither a folder nor a model id", hint=f"built in: {', '.join(BUILT_IN)}; or ORG/NAME; or a folder"
        )
    return _from_hub(model, revision)


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    hint = "check the id, the network and, for gated models, `hf auth login`; or give a folder"
    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise BaseModelError(f"base {model!r} could not be downloaded{offline}: {type(error).__name__}", hint=hint) from error


def builtin_bases() -> list[BaseInfo]:
    """Return the bases that come with the package."""
    return [_info(model_id, folder) for model_id, folder in BUILT_IN.items() if (folder / "config.json").is_file()]


def read_config(folder: Path) -> dict[str, object]:
    """Return the base's configuration. Raises BaseModelError when the folder holds none that can be read."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseModelError(
            f"{folder} is not a model folder: it has no config.json",
            hint="give a folder as save_pretrained writes it, or a model's id",
        ) from error
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path} cannot be read: {error}", hint="download the model again") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"{path} must hold a JSON object, got {type(config).__name__}", hint="download the model again")
    return config


NO_LIMIT = 1 << 30


def longest_row(folder: Path) -> int:
    """Return the longest row, in tokens, that a base was made for; NO_LIMIT when its configuration names none."""
    longest = read_config(folder).get("max_position_embeddings")
    return longest if isinstance(longest, int) else NO_LIMIT


def count_parameters(folder: Path) -> int:
    """Return the number of weights stored in the folder's safetensors files, read from their headers alone.

    Tied matrices are stored once and counted once. Raises BaseModelError when there are no such files.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BaseModelError(
            f"{folder} holds no .safetensors weights", hint="convert the model with save_pretrained(..., safe_serialization=True)"
        )
    return sum(_header_elements(file) for file in files)


def stored_dtype(folder: Path) -> str:
    """Return how the base's weights are stored: "bf16" when all floating tensors are, else "fp32"."""
    kinds = {entry["dtype"] for file in folder.glob("*.safetensors") for entry in _tensors(file)}
    return "bf16" if kinds == {"BF16"} else "fp32"


def _header_elements(file: Path) -> int:
    return sum(math.prod(entry["shape"]) for entry in _tensors(file))


def _tensors(file: Path) -> list[dict[str, Any]]:
    """Return the entries of a safetensors header: dtype and shape of each tensor."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return [entry for name, entry in header.items() if name != "__metadata__"]


def copy_tokenizer(base_folder: Path, place: Path, template: Path | None) -> None:
    """Put a base's tokenizer and chat template (or the one that took its place) beside a result: ids travel with weights."""
    for name in TOKENIZER_FILES:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, place / name)
    if template is not None:
        shutil.copyfile(template, place / "chat_template.jinja")


def _info(model_id: str, folder: Path) -> BaseInfo:
    family = FAMILIES[str(read_config(folder)["model_type"])]
    return BaseInfo(model_id, family.name, count_parameters(folder), str(folder), "Apache-2.0 (weights; sources in NOTICE)")
