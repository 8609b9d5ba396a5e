"""A base's sizes by what a spec calls it: a folder, the built-in base, a Phi model by its hub id, or any hub id (its configuration
alone is downloaded). Next: `sizes.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kivnun.errors import BaseModelError
from kivnun.model.families import BUILT_IN, REFUSED, find_base, read_config
from kivnun.plan.sizes import Sizes

_MINI = {"hidden_size": 3072, "num_hidden_layers": 32, "intermediate_size": 8192, "model_type": "phi3"}
_MEDIUM = {
    "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10, "intermediate_size": 17920,
    "model_type": "phi3",
}  # fmt: skip
_PHI_3 = {**_MINI, "num_attention_heads": 32, "vocab_size": 32064}
_LONG = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_scaling": {"type": "longrope"}}
# The config.json of each, on the hub (October 2025).
PHI: dict[str, dict[str, Any]] = {
    "microsoft/Phi-3-mini-4k-instruct": {**_PHI_3, "max_position_embeddings": 4096},
    "microsoft/Phi-3-mini-128k-instruct": {**_PHI_3, **_LONG},
    "microsoft/Phi-3.5-mini-instruct": {**_PHI_3, **_LONG},
    "microsoft/Phi-3-medium-4k-instruct": {**_MEDIUM, "vocab_size": 32064, "max_position_embeddings": 4096},
    "microsoft/Phi-3-medium-128k-instruct": {**_MEDIUM, **_LONG, "vocab_size": 32064},
    "microsoft/phi-4": {**_MEDIUM, "vocab_size": 100352, "max_position_embeddings": 16384},
    "microsoft/Phi-4-mini-instruct": {
        **_MINI, "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "tie_word_embeddings": True, **_LONG,
    },
    "microsoft/Phi-3-small-8k-instruct": {"model_type": "phi3small"},
    "microsoft/Phi-3-small-128k-instruct": {"model_type": "phi3small"},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base by its name in a spec. `folder` is where its tokenizer is, None where that is not on this machine."""

    name: str
    sizes: Sizes
    folder: Path | None


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """A base's configuration by its name in a spec, and the folder that holds its files (None: not on this machine)."""

    name: str
    config: Mapping[str, Any]
    folder: Path | None

    @property
    def turns_from(self) -> int | None:
        """Return the length above which a row takes LongRoPE's long factors; None where there is one set of factors."""
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        original = rope.get("original_max_position_embeddings", self.config.get("original_max_position_embeddings"))
        return original if rope.get("rope_type", rope.get("type")) in ("longrope", "su") else None


def base_files(name: str, revision: str | None = None) -> BaseFiles:
    """Return a base's configuration, without its weights. Raises BaseModelError."""
    if name in BUILT_IN or Path(name).is_dir():
        folder = find_base(name)
        found = BaseFiles(name, read_config(folder), folder)
    else:
        name = {known.lower(): known for known in PHI}.get(name.lower(), name)
        folder = _cached(name, revision)
        config = PHI.get(name) or (_downloaded(name) if folder is None else read_config(folder))
        found = BaseFiles(name, config, folder)
    kind = found.config.get("model_type")
    if isinstance(kind, str) and kind in REFUSED:
        raise BaseModelError(f"{name}: {REFUSED[kind]}", hint="use Phi-3-mini, Phi-3-medium, Phi-3.5-mini or Phi-4 instead")
    return found


def known_base(name: str) -> KnownBase:
    """Return what is known of a base without its weights. Raises BaseModelError."""
    files = base_files(name)
    has_tokenizer = files.folder is not None and (files.folder / "tokenizer.json").is_file()
    return KnownBase(files.name, Sizes.of(files.config, files.name), files.folder if has_tokenizer else None)


def _cached(name: str, revision: str | None) -> Path | None:
    """Return the folder of a hub's model that was downloaded before, with its tokenizer; None: it was not."""
    if name.count("/") != 1 or name.startswith((".", "/", "~", "kivnun/")):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(name, file, revision=revision) for file in ("tokenizer.json", "config.json")]
    except HFValidationError:
        return None
    return Path(found[0]).parent if all(isinstance(file, str) for file in found) else None  # type: ignore[arg-type]


def _downloaded(name: str) -> dict[str, Any]:
    """Return the config.json of a hub's model, and nothing else of it."""
    known = f"a folder, {', '.join(BUILT_IN)}, or a hub id such as {next(iter(PHI))}"
    if name.count("/") != 1 or name.startswith((".", "/", "~", "kivnun/")):
        raise BaseModelError(f"base {name!r} is neither a folder nor a model id", hint=f"give {known}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = hf_hub_download(name, "config.json")
        return json.loads(Path(found).read_text(encoding="utf-8"))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError, ValueError) as error:
        hint = "check the id and the network, or give a folder that holds its config.json"
        raise BaseModelError(f"the configuration of {name!r} could not be had: {type(error).__name__}", hint=hint) from error
