"""What is known of model families by name, without loading one: licences, built-in bases, names of fused projections.

Any causal language model of transformers works through the generic path; a family here adds what cannot be read from its
configuration. Imports nothing heavy, so that listing bases costs nothing. Next: `load.py`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

from kivnun.artifacts import hash_file, hash_files
from kivnun.errors import BaseModelError, IntegrityError
from kivnun.model.hub import (
    NOT_FOUND,
    OTHER_WEIGHTS,
    OnBytes,
    commit_of,
    download,
    download_texts,
    refuse_damaged,
    without_weights,
)
from kivnun.model.phi import REFUSED, REFUSED_FAMILY, USE_INSTEAD

BUILT_IN = {"kivnun/tiny-phi": Path(__file__).parent.parent / "bases" / "tiny_phi"}

# Names under which users know projections that a family stores fused. All parts of a fused projection must be asked for
# together: an adapter on the fused matrix cannot train one of its parts alone.
FUSED_PARTS = {
    "qkv_proj": frozenset({"q_proj", "k_proj", "v_proj"}),
    "gate_up_proj": frozenset({"gate_proj", "up_proj"}),
}

FEEDFORWARD = ("down_proj", "fc2", "dense_4h_to_h", "w2")  # layers whose inputs IA3 scales: the second of an MLP

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
MORE_TEMPLATES = "chat_templates/*.jinja"
# What is read of a base beside its weights.
BASE_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.model", *TOKENIZER_FILES)

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


def find_base(model: str, revision: str | None = None, on_bytes: OnBytes = lambda name, done, total: None) -> Path:
    """Return the folder of a base: a built-in id, a folder, or a model hub's id (downloaded or taken from its cache).

    `on_bytes` hears how far a download is. Raises BaseModelError when it is nowhere to be found, and as `hub.download` does.
    """
    return _found(model, lambda: download(model, revision, on_bytes))


def find_texts(model: str, revision: str | None = None) -> Path:
    """Return a folder that holds a base's configuration and tokenizer, as `find_base`; weights are not fetched for it."""
    return _found(model, lambda: download_texts(model, revision))


def _found(model: str, from_hub: Callable[[], Path]) -> Path:
    if model in BUILT_IN:
        return BUILT_IN[model]
    if Path(model).is_dir():
        return Path(model)
    if model.startswith("kivnun/"):
        near = get_close_matches(model, BUILT_IN, n=1, cutoff=0.0)[0]
        raise BaseModelError(f"there is no built-in base {model!r}", hint=f"did you mean {near}?", pages=(NOT_FOUND,))
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise BaseModelError(
            f"base {model!r} is neither a folder nor a model id",
            hint=f"built in: {', '.join(BUILT_IN)}; or ORG/NAME; or a folder",
            pages=(NOT_FOUND,),
        )
    return from_hub()


def refuse_family(name: str, config: Mapping[str, object]) -> None:
    """Raise BaseModelError for a family that is refused whatever its weights are: by name, or for code that comes with a model."""
    kind = str(config.get("model_type"))
    if kind in REFUSED:
        raise BaseModelError(f"{name}: {REFUSED[kind]}", hint=USE_INSTEAD, pages=(REFUSED_FAMILY,))
    if "auto_map" in config and not _may_be_of_transformers(kind):
        raise BaseModelError(
            f"{name} needs code of its own (model_type {kind!r}), which Kivnun does not run",
            hint="use a model that transformers holds",
        )


def _may_be_of_transformers(kind: str) -> bool:
    """Return whether transformers names such a model in its tables, which are read as text: importing them loads torch.

    A name that stands there for something else is told of when the base is opened."""
    found = find_spec("transformers")
    folders = [Path(place, "models", "auto") for place in (found and found.submodule_search_locations) or ()]
    return any(f'"{kind}"' in file.read_text(encoding="utf-8") for folder in folders for file in folder.glob("*auto*.py"))


def base_hash(folder: Path) -> str:
    """Return one SHA-256 over all that makes a base what it is: configuration, weights, tokenizer and template.

    Whatever else lies beside them (a licence, another format that another program fetched) changes nothing. Raises IntegrityError
    for a file of the hub's cache that is not what the hub says.
    """
    files = [*weight_files(folder), *(folder / name for name in BASE_FILES), *folder.glob(MORE_TEMPLATES)]
    hashes = {file.relative_to(folder).as_posix(): hash_file(file) for file in files if file.is_file()}
    refuse_damaged(folder, hashes)
    return hash_files(hashes)


def refuse_other_base(folder: Path, found: str, wanted: str | None) -> None:
    """Raise IntegrityError where a spec names the base by another hash than that of what is there."""
    if wanted is not None and found != wanted:
        raise IntegrityError(
            f"the base in {folder} is not the one that base.content_hash names: its hash should be {wanted}, is {found}",
            hint="name the commit of the base that is meant in base.revision, or write the hash that is there after checking it",
        )


def base_record(model: str, revision: str | None, folder: Path, content_hash: str) -> dict[str, str | None]:
    """Return what a manifest says of the base: what was asked for, which commit that was, and the hash of what is there."""
    return {"model": model, "revision": revision, "commit": commit_of(folder), "content_hash": content_hash}


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


def weight_files(folder: Path) -> list[Path]:
    """Return the folder's safetensors files as transformers chooses them: one whole file, else what the index names, else all.

    Raises BaseModelError when there are none.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())) if index.is_file() else []
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BaseModelError(f"{index} cannot be read: {error}", hint="download the model again") from error
    files = [folder / name for name in named] or sorted(folder.glob("*.safetensors"))
    if not files:
        raise without_weights(f"{folder} cannot be loaded: it", [file.name for file in folder.iterdir()])
    return files


def refuse_other_weights(folder: Path) -> None:
    """Raise BaseModelError for a folder whose weights are in formats that run code when they are read, or that are not read here.

    A folder without any weights is none of them: it may be all that is needed to count with."""
    if any(file.name.endswith(OTHER_WEIGHTS) for file in folder.iterdir()):
        weight_files(folder)


def count_parameters(folder: Path) -> int:
    """Return the number of weights stored in the folder's safetensors files, read from their headers alone.

    Tied matrices are stored once and counted once, packed codes as what they stand for. Raises BaseModelError when there are no
    such files.
    """
    entries = {name: entry for file in weight_files(folder) for name, entry in read_header(file).items()}
    total = 0
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        if f"{name}{NF4_STATE}" in entries:
            total += 2 * (end - start)
        elif not any(mark in name for mark in STATE_OF_CODES):
            total += math.prod(entry["shape"])
    return total


def stored_dtype(folder: Path) -> str:
    """Return how the base's weights are stored: "bf16" when all floating tensors are, else "fp32"."""
    kinds = {entry["dtype"] for file in weight_files(folder) for entry in read_header(file).values()}
    return "bf16" if kinds == {"BF16"} else "fp32"


# What bitsandbytes stores beside a weight's codes.
NF4_STATE = ".quant_state.bitsandbytes__nf4"
STATE_OF_CODES = (
    ".weight.quant_state.", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
    ".SCB", ".weight_format",
)  # fmt: skip


def stored_precision(folder: Path) -> Literal["nf4", "int8"] | None:
    """Return the precision of a base whose files hold bitsandbytes' codes, or None for one of plain floating weights.

    Raises BaseModelError for codes of another kind.
    """
    found = read_config(folder).get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    said = cast("Mapping[str, object]", found)
    if said.get("load_in_8bit"):
        return "int8"
    if said.get("load_in_4bit") and said.get("bnb_4bit_quant_type") == "nf4":
        return "nf4"
    kind = said.get("bnb_4bit_quant_type") if said.get("load_in_4bit") else said.get("quant_method")
    raise BaseModelError(
        f"{folder} is quantised as {kind}, which is not supported: bitsandbytes' nf4 and int8 are",
        hint="use the model it was made from, with base.precision nf4 or int8",
        pages=("14-quantised-otherwise",),
    )


def refuse_other_precision(folder: Path, precision: str) -> None:
    """Raise BaseModelError when the folder holds codes of another precision than asked for: they load as they are."""
    stored = stored_precision(folder)
    if stored is not None and precision != stored:
        raise BaseModelError(
            f"{folder} is stored in {stored}, so it cannot be loaded as {precision}",
            hint=f"set base.precision to {stored}, or use the model it was made from",
        )


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Return a safetensors file's entries by name: dtype, shape and data_offsets, counted from the end of the header."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    except (OSError, ValueError, MemoryError, OverflowError) as error:
        raise BaseModelError(f"{file} cannot be read: {error}", hint="download the model again") from error
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def chat_template_of(folder: Path) -> str | None:
    """Return where a base's own chat template is, or None where it has none."""
    if (folder / "chat_template.jinja").is_file():
        return "its own, chat_template.jinja"
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return "its own, in tokenizer_config.json" if isinstance(config, dict) and config.get("chat_template") else None


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
