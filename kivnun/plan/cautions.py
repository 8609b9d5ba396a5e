"""What in a spec and its rows is likely to disappoint: each in a sentence that says what, and what to do about it.

A caution stops nothing. Next: `plan.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from kivnun.plan.forecast import Steps
from kivnun.plan.rows import RunRows
from kivnun.spec import TuneSpec
from kivnun.spec.adapters import LowRank
from kivnun.spec.resolve import TINY_BASE, default_rate

FEW_HELD_OUT = 10  # rows below which no interval is given
FEW_ROWS = 50
FEW_STEPS = 20
RATE_OFF = 5.0  # times the default, either way
SCALES = (0.25, 8.0)  # of an update, alpha / rank
FITS_BARELY = 0.9  # of the memory there is: predictions are off by as much


def cautions(spec: TuneSpec, rows: RunRows, steps: Steps, base_parameters: int, turns_from: int | None) -> tuple[str, ...]:
    """Return what to think of before a resolved spec is run. `turns_from`: above so many tokens a row takes LongRoPE's long
    factors."""
    return (
        *_of_rows(spec, rows),
        *of_lengths(spec, rows, turns_from),
        *_of_steps(spec, rows, steps),
        *_of_rate(spec, base_parameters),
        *_of_scale(spec),
    )


def _of_rows(spec: TuneSpec, rows: RunRows) -> Iterator[str]:
    count, held_out = len(rows.lengths), len(rows.held_out)
    if not rows.counted:
        yield (
            "the base's tokenizer is not on this machine: tokens are estimated from letters, and rows of other scripts than Latin "
            "have more"
        )
    if count < FEW_ROWS:
        yield f"{count} training rows are few: a model learns them by heart before it learns the task; give a few hundred"
    if held_out == 0:
        yield "no row is held out: nothing will tell whether the tuned model is better; set data.validation to 0.1 or a file"
    elif held_out < FEW_HELD_OUT:
        yield (
            f"{held_out} held-out rows are too few for an interval: base and tuned will hardly be told apart; hold out "
            f"{FEW_HELD_OUT} or more (data.validation)"
        )
    if rows.overlap:
        yield (
            f"{rows.overlap:,} of the held-out records are also training records: the held-out score will be too good; remove "
            "them from one side"
        )
    if rows.skipped:
        yield f"{rows.skipped:,} rows cannot be read and are skipped, as data.bad_rows and data.over_long allow"
    if rows.truncated:
        yield f"{rows.truncated:,} rows are cut to data.max_seq_len: the model learns replies that stop in the middle"


def of_lengths(spec: TuneSpec, rows: RunRows, turns_from: int | None) -> Iterator[str]:
    """Yield what rows on both sides of LongRoPE's border mean for serving."""
    if turns_from is None or spec.base.rope_factors != "per_row":
        return
    over = int((rows.sides > turns_from).sum())
    if 0 < over < len(rows.sides):
        yield (
            f"{over:,} of {len(rows.sides):,} rows have more than {turns_from:,} tokens and take LongRoPE's long factors, the "
            "others its short ones: a prompt near that length may be served with other factors than rows like it were trained "
            f"with; set base.rope_factors, or keep rows on one side (data.max_seq_len: {turns_from})"
        )


def _of_steps(spec: TuneSpec, rows: RunRows, steps: Steps) -> Iterator[str]:
    batch, count = spec.schedule.batch_rows, len(rows.lengths)
    if batch is not None and batch > count:
        yield f"schedule.batch_rows is {batch}, more than the {count} training rows: each step is a whole epoch; lower it"
    elif steps.count < FEW_STEPS:
        yield (
            f"the whole run makes {steps.count} steps, too few for the learning rate to warm up and decay: lower "
            "schedule.batch_rows, or give more epochs or rows"
        )


def _of_rate(spec: TuneSpec, base_parameters: int) -> Iterator[str]:
    assert spec.objective is not None  # resolved
    rate, kind = cast(float, spec.schedule.learning_rate), spec.adapter.kind
    usual = default_rate(spec.objective.kind, kind, tiny=base_parameters < TINY_BASE)
    if spec.schedule.optimizer.kind == "muon":  # its rates are another scale
        return
    said, beside = f"schedule.learning_rate is {rate:g}", f"the usual rate for {kind} ({usual:g})"
    if rate > RATE_OFF * usual:
        yield f"{said}, {rate / usual:.0f} times {beside}: it may diverge"
    if rate * RATE_OFF < usual:
        yield f"{said}, {usual / rate:.0f} times below {beside}: it may learn little"


def _of_scale(spec: TuneSpec) -> Iterator[str]:
    adapter = spec.adapter
    if not isinstance(adapter, LowRank) or adapter.alpha is None:
        return
    by = "alpha / sqrt(rank)" if adapter.rslora else "alpha / rank"
    scale = adapter.alpha / (adapter.rank**0.5 if adapter.rslora else adapter.rank)
    low, high = SCALES
    if not low <= scale <= high:
        yield f"adapter.{by} is {scale:g}, where 1 to 2 is usual: leave adapter.alpha out, or change schedule.learning_rate with it"
