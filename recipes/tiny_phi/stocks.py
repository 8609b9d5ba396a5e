"""Reads `stocks.yaml`: the words, phrases and ways of asking that documents are made from. Next: `words.py`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

PATH = Path(__file__).parent / "stocks.yaml"


def stock(name: str) -> tuple[str, ...]:
    """Return a list of phrases; one that is written as running text is split into its words."""
    value = _all()[name]
    return tuple(value.split() if isinstance(value, str) else value)


def stock_of_pairs(name: str) -> tuple[tuple[str, str], ...]:
    return tuple((left, right) for left, right in _all()[name])


def stock_of_triples(name: str) -> tuple[tuple[str, str, str], ...]:
    return tuple((one, two, three) for one, two, three in _all()[name])


@cache
def _all() -> dict[str, Any]:
    return yaml.safe_load(PATH.read_text(encoding="utf-8"))
