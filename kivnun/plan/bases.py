"""A base's sizes by what a spec calls it: a folder, the built-in base, a Phi model by its hub id, or any hub id (its configuration
alone is downloaded). Next: `sizes.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kivnun.errors import BaseModelError
from kivnun.model.families import BUILT_IN, NOT_FOUND, REFUSED, find_base, not_from_hub, read_config, refused
from kivnun.plan.sizes import Sizes

_MINI = {"hidden_size": 3072, "num_hidden_layers": 32, "intermediate_size": 8192, "model_type": "phi3"}
_MEDIUM = {
    "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10, "intermediate_size": 17920,
    "model_type": "phi3",
}  # fmt: skip
_PHI_3 = {**_MINI, "num_attention_heads": 32, "vocab_size": 32064}
# The config.json of each, on the hub (October 2025).
PHI: dict[str, dict[str, Any]] = {
    "microsoft/Phi-3-mini-4k-instruct": {**_PHI_3, "max_position_embeddings": 4096},
    "microsoft/Phi-3-mini-128k-instruct": {**_PHI_3, "max_position_embeddings": 131072},
    "microsoft/Phi-3.5-mini-instruct": {**_PHI_3, "max_position_embeddings": 131072},
    "microsoft/Phi-3-medium-4k-instruct": {**_MEDIUM, "vocab_size": 32064, "max_position_embeddings": 4096},
    "microsoft/Phi-3-medium-128k-instruct": {**_MEDIUM, "vocab_size": 32064, "max_position_embeddings": 131072},
    "microsoft/phi-4": {**_MEDIUM, "vocab_size": 100352, "max_position_embeddings": 16384},
    "microsoft/Phi-4-mini-instruct": {
        **_MINI, "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
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


def known_base(name: str) -> KnownBase:
    """Return what is known of a base without its weights. Raises BaseModelError."""
    if name in BUILT_IN or Path(name).is_dir():
        folder = find_base(name)
        config = read_config(folder)
    else:
        folder = None
        spelt = {known.lower(): known for known in PHI}
        if name.lower() in spelt:
            name = spelt[name.lower()]
            config = PHI[name]
        else:
            config = _downloaded(name)
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in REFUSED:
        raise refused(name, kind)
    has_tokenizer = folder is not None and (folder / "tokenizer.json").is_file()
    return KnownBase(name, Sizes.of(config, name), folder if has_tokenizer else None)


def _downloaded(name: str) -> dict[str, Any]:
    """Return the config.json of a hub's model, and nothing else of it."""
    known = f"a folder, {', '.join(BUILT_IN)}, or a hub id such as {next(iter(PHI))}"
    if name.count("/") != 1 or name.startswith((".", "/", "~", "kivnun/")):
        raise BaseModelError(f"base {name!r} is neither a folder nor a model id", hint=f"give {known}", pages=(NOT_FOUND,))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = hf_hub_download(name, "config.json")
        return json.loads(Path(found).read_text(encoding="utf-8"))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise not_from_hub(name, error) from error
    except ValueError as error:
        hint = "give a folder that holds its config.json"
        raise BaseModelError(f"the configuration of {name!r} cannot be read: {error}", hint=hint) from error
