"""A PEFT folder, opened as the adapter it holds: one way in for evaluation, chat, export and continued training.

Next: `adapters.py`, `norms.py`, `prompts.py`, `peft_layers.py` (what there is).
"""

from __future__ import annotations

from pathlib import Path

from kivnun.errors import IntegrityError
from kivnun.model.adapters import Adapter, load_low_rank, read_peft_config
from kivnun.model.load import Base


def load_peft(base: Base, folder: Path) -> Adapter:
    """Return the adapter in a PEFT folder, on this base.

    Raises IntegrityError when the folder is of a kind, or needs a variant, that Kivnun does not offer, or when its tensors do not
    fit the base: every tensor must be used, every site complete.
    """
    config = read_peft_config(folder)
    kind = config.get("peft_type")
    match kind:
        case "LORA":
            return load_low_rank(base, folder)
        case "LN_TUNING":
            from kivnun.model.norms import load_norms

            return load_norms(base, folder)
        case "PROMPT_TUNING" | "PREFIX_TUNING":
            from kivnun.model.prompts import load_virtual

            return load_virtual(base, folder, config)
        case "IA3" | "LOHA" | "LOKR" | "VERA" | "ADALORA":
            from kivnun.model.peft_layers import load_layers

            return load_layers(base, folder)
    raise IntegrityError(
        f"{folder}: peft_type {kind!r} cannot be used",
        hint="LORA, ADALORA, IA3, LOHA, LOKR, VERA, LN_TUNING, PROMPT_TUNING and PREFIX_TUNING adapters are supported",
    )
