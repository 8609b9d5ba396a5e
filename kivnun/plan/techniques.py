"""The techniques that the table's columns stand for, each with its default options and the precision its base is held in.

Next: `trained.py` (how many numbers each trains), `memory.py` (how many bytes a step of each takes).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kivnun.spec.adapters import AdapterSpec
from kivnun.spec.read import parse_spec
from kivnun.spec.resolve import ResolveFacts, resolve


@dataclass(frozen=True, slots=True)
class Technique:
    """An adapter on a base. `label` is what people read, `coded` whether the base's weights are held in NF4."""

    kind: str
    label: str
    coded: bool = False


TECHNIQUES = {
    "full": Technique("full", "full tuning"),
    "lora": Technique("lora", "LoRA"),
    "qlora": Technique("lora", "QLoRA", coded=True),
    "dora": Technique("dora", "DoRA"),
    "adalora": Technique("adalora", "AdaLoRA"),
    "loha": Technique("loha", "LoHa"),
    "lokr": Technique("lokr", "LoKr"),
    "vera": Technique("vera", "VeRA"),
    "ia3": Technique("ia3", "IA3"),
    "ln_tuning": Technique("ln_tuning", "LN tuning"),
    "prompt": Technique("prompt", "prompt tuning"),
    "prefix": Technique("prefix", "prefix tuning"),
}
# The table's columns that are techniques of adapting: each with the techniques that belong to it. PEFT is the family of all.
COLUMNS = {
    "LoRA": ("lora",),
    "QLoRA": ("qlora",),
    "PEFT": tuple(name for name in TECHNIQUES if name != "full"),
    "DoRA": ("dora",),
}


def adapter_of(technique: str) -> AdapterSpec:
    """Return the adapter's section of a spec that names its kind alone, every option resolved."""
    kind = TECHNIQUES[technique].kind
    text = f"version: 1\nbase: kivnun/tiny-phi\ndata: {{train: rows.jsonl}}\nadapter: {{kind: {kind}}}\n"
    facts = ResolveFacts("supervised", 2048, 1, 1, "cpu", 1, "messages")
    return resolve(parse_spec(text, folder=Path(".")), facts)[0].adapter
