"""What a run costs, by a list of prices of yours: per hour of a device, or per million trained tokens.

    currency: EUR
    hours: {h100: 2.5, cpu: 0.04}
    million_trained_tokens: 1.2

Next: `plan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from kivnun.errors import SpecError
from kivnun.plan.devices import GPUS
from kivnun.spec.section import as_mapping
from kivnun.spec.yaml_text import YamlError, read_json, read_yaml

KEYS = ("currency", "hours", "million_trained_tokens")
DEVICES = ("cpu", "cuda", *GPUS)
MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices in one currency: of an hour of each device by its name, and of a million trained tokens (None: not priced)."""

    currency: str
    hours: dict[str, float]
    million_trained_tokens: float | None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run costs by the hours of its devices and by its trained tokens; None where the list has no such price or the plan no
    such figure."""

    currency: str
    by_hours: float | None
    by_tokens: float | None


def read_prices(path: Path) -> Prices:
    """Return the prices in a YAML or JSON file. Raises SpecError, with the key that is wrong."""
    hint = "a list of prices has currency, and hours or million_trained_tokens: docs/guides/plan.md shows one"
    try:
        content = path.read_bytes()[: MAX_BYTES + 1]
        text = content.decode("utf-8-sig")
        found = (read_json(text) if path.suffix == ".json" else read_yaml(text)).value
    except OSError as error:
        raise SpecError(f"--prices {path} cannot be read: {error.strerror}", hint=hint) from None
    except (UnicodeDecodeError, YamlError) as error:
        raise SpecError(f"--prices {path} is no YAML or JSON in UTF-8: {error}", hint=hint) from None
    tree = as_mapping(found)
    if tree is None:
        raise SpecError(f"--prices {path} must hold a mapping, got {type(found).__name__}", hint=hint)
    odd = [key for key in tree if key not in KEYS]
    if odd:
        raise SpecError(f"--prices {path}: {odd[0]} is no key of a list of prices", hint=f"allowed are {', '.join(KEYS)}")
    currency = tree.get("currency")
    if not isinstance(currency, str) or not currency.strip():
        raise SpecError(f"--prices {path}: currency must be a name such as EUR, got {currency!r}", hint=hint)
    tokens = tree.get("million_trained_tokens")
    prices = Prices(currency, _hours(path, tree.get("hours")), None if tokens is None else _price(path, KEYS[2], tokens))
    if not prices.hours and prices.million_trained_tokens is None:
        raise SpecError(f"--prices {path} holds no price", hint=hint)
    return prices


def _hours(path: Path, found: object) -> dict[str, float]:
    if found is None:
        return {}
    hours = as_mapping(found)
    if hours is None:
        raise SpecError(
            f"--prices {path}: hours must map devices to prices, got {found!r}", hint="write hours: {h100: 2.5} or the like"
        )
    unknown = [name for name in hours if name not in DEVICES]
    if unknown:
        raise SpecError(f"--prices {path}: hours.{unknown[0]} is no device", hint=f"allowed are {', '.join(DEVICES)}")
    return {name: _price(path, f"hours.{name}", price) for name, price in hours.items()}


def _price(path: Path, key: str, price: object) -> float:
    number = float(price) if isinstance(price, int | float) and not isinstance(price, bool) else -1.0
    if not 0 <= number < float("inf"):
        raise SpecError(f"--prices {path}: {key} must be a number of 0 or more, got {price!r}", hint="write it without a currency")
    return number


def cost_of(prices: Prices, device: str, count: int, seconds: float, trained_tokens: int | None) -> Cost:
    """Return what so many seconds on `count` devices of a name, and so many trained tokens, cost. Raises SpecError where the list
    prices neither."""
    hour, million = prices.hours.get(device), prices.million_trained_tokens
    if hour is None and million is None:
        raise SpecError(
            f"the list of prices has none for {device}", hint=f"add hours.{device}; it has {', '.join(prices.hours) or 'none'}"
        )
    timed = seconds == seconds  # not NaN
    return Cost(
        prices.currency,
        cast(float, hour) * count * seconds / 3600 if hour is not None and timed else None,
        million * trained_tokens / 1e6 if million is not None and trained_tokens is not None else None,
    )
