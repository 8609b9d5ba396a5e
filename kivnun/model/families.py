"""What is known of model families by name, without loading one: licences, built-in bases, names of fused projections.

Any causal language model of transformers works through the generic path; a family here adds what cannot be read from its
configuration. Imports nothing heavy, so that listing bases costs nothing. Next: `load.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kivnun.errors import BaseModelError

BUILT_IN = {"kivnun/tiny-phi": Path(__file__).parent.parent / "bases" / "tiny_phi"}

# Names under which users know projections that a family stores fused. All parts of a fused projection must be asked for
# together: an adapter on the fused matrix cannot train one of its parts alone.
FUSED_PARTS = {
    "qkv_proj": frozenset({"q_proj", "k_proj", "v_proj"}),
    "gate_up_proj": frozenset({"gate_proj", "up_proj"}),
}

REFUSED = {
    "phi3small": "Phi-3-small computes block-sparse attention in code of its own that transformers does not hold",
}


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
            f"{folder} is not a model folder: it has no config.json", hint="give a folder as save_pretrained writes it, or a model's id"
        ) from error
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path} cannot be read: {error}", hint="download the model again") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"{path} must hold a JSON object, got {type(config).__name__}", hint="download the model again")
    return config


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


def _header_elements(file: Path) -> int:
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        elements = 1
        for size in entry["shape"]:
            elements *= size
        total += elements
    return total


def _info(model_id: str, folder: Path) -> BaseInfo:
    family = FAMILIES[str(read_config(folder)["model_type"])]
    return BaseInfo(model_id, family.name, count_parameters(folder), str(folder), "Apache-2.0 (weights; sources in NOTICE)")
