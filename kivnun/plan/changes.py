"""Changes of a spec that make it fit where it does not: each is laid over the spec as `--set` would, and planned again.

First each alone; where none is enough, two together, then three. Next: `plan.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from kivnun.errors import SpecError
from kivnun.plan.verdict import Change, Question, chosen
from kivnun.spec import FullSpec, TuneSpec, parse_spec
from kivnun.spec.yaml_text import write_yaml

SHORTEST = 64  # tokens of a row that is worth training on
PROCESSES = (2, 4, 8, 16, 32, 64)
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a lever: in words, as `--set` takes it, and the longest row that it leaves (None: all as they are)."""

    what: str
    overrides: tuple[str, ...]
    longest: int | None = None


Lever: TypeAlias = Sequence[Setting]  # from the mildest to the strongest


def changes_that_fit(question: Question) -> list[Change]:
    """Return the changes that make a question's run fit, the mildest setting of each."""
    levers = [lever for lever in _levers(question) if lever]
    for together in (1, 2, 3):
        found = [change for some in itertools.combinations(levers, together) if (change := _mildest(question, some)) is not None]
        if found:
            return found[:SHOWN]
    return []


def _levers(question: Question) -> Iterator[Lever]:
    given, spec, device, longest = question.spec, chosen(question).spec, question.device, question.rows.longest
    budget = given.compute.micro_batch_tokens
    if budget is not None:
        its = ((tokens, f"compute.micro_batch_tokens={tokens}") for tokens in _halved(budget, longest))
        yield [Setting(f"passes of {tokens:,} tokens", (override,)) for tokens, override in its]
    if given.compute.activation_checkpointing is False:
        yield [Setting("layers computed again", ("compute.activation_checkpointing=true",))]
    if isinstance(spec.adapter, FullSpec):
        yield [Setting("LoRA instead of full tuning", ("adapter={kind: lora}",))]
    smaller = {"fp32": ("bf16", "nf4"), "bf16": ("nf4",)}.get(spec.base.precision, ())
    yield [Setting(f"the base in {precision}", (f"base.precision={precision}",)) for precision in smaller]
    if spec.compute.kind == "local":
        most = PROCESSES if device.kind == "cuda" else [count for count in PROCESSES if count <= device.count]
        yield [
            Setting(f"state divided over {count} devices", ("compute.kind=multi_process", f"compute.processes={count}"))
            for count in most
        ]
    over_long = "skip" if question.rows.format == "preference" else "truncate"
    yield [
        Setting(f"rows of {length:,} tokens at most", (f"data.max_seq_len={length}", f"data.over_long={over_long}"), length)
        for length in _halved(longest, SHORTEST)
    ]


def _halved(most: int, least: int) -> list[int]:
    """Return half of a number, half of that and so on, down to the least."""
    found: list[int] = []
    while most > least:
        most = max(most // 2, least)
        found.append(most)
    return found


def _mildest(question: Question, levers: Sequence[Lever]) -> Change | None:
    """Return the mildest settings of some levers that make it fit together, one lever after the other; None: none do, or they
    contradict each other."""
    settings = [lever[-1] for lever in levers]
    best = _tried(question, settings)
    if best is None:
        return None
    for place, lever in enumerate(levers):
        for milder in lever[:-1]:
            change = _tried(question, [*settings[:place], milder, *settings[place + 1 :]])
            if change is not None:
                settings[place], best = milder, change
                break
    return best


def _tried(question: Question, settings: Sequence[Setting]) -> Change | None:
    overrides = tuple(override for setting in settings for override in setting.overrides)
    lengths = [setting.longest for setting in settings if setting.longest is not None]
    rows = question.rows.cut_to(min(lengths)) if lengths else question.rows
    facts = replace(question.facts, longest_row=rows.longest, passes=None)
    try:
        plan = chosen(replace(question, spec=changed(question.spec, overrides), rows=rows, facts=facts))
    except SpecError:  # the rest of the spec does not go with it
        return None
    if plan.verdict != "fits" or plan.forecast is None:
        return None
    return Change(", ".join(setting.what for setting in settings), overrides, plan.forecast.peak, plan.forecast.seconds)


def changed(spec: TuneSpec, overrides: Sequence[str]) -> TuneSpec:
    """Return a spec with overrides laid over what was given in it. Raises SpecError."""
    given = spec.model_dump(mode="json", exclude_unset=True)
    return parse_spec(write_yaml(given), folder=Path.cwd(), overrides=overrides)
