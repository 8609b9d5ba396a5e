"""The laws of whole processes: held to the points that they were fitted to, and to what must be so whatever the rates are.

How they do on what they were not fitted to is `python -m benchmarks.plan`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.plan.cases import CALIBRATION, VALIDATION, Case
from benchmarks.plan.measure import Record
from benchmarks.plan.report import Compared, compared, summary
from kivnun.data.packing import micro_batches, pack
from kivnun.data.rows import TokenRow, Where
from kivnun.model.phi import PHI
from kivnun.plan.memory import IDLE_BYTES, PeftSpec, Shape, idle_bytes, peak_bytes, process_memory, step_memory
from kivnun.plan.sizes import Sizes
from kivnun.plan.techniques import TECHNIQUES, adapter_of
from kivnun.plan.time import (
    SECONDS,
    Work,
    generation_amounts,
    generation_seconds,
    scoring_amounts,
    scoring_seconds,
    start_seconds,
    training_amounts,
    training_seconds,
    work_of,
)
from kivnun.spec.adapters import FullSpec, LoraSpec

CALIBRATED = Path(__file__).parents[2] / "benchmarks" / "results" / "plan_calibration_2026-11-27.json"
SIZES = Sizes.of(PHI["microsoft/Phi-3-mini-4k-instruct"].config, "phi")
KINDS = [name for name, it in TECHNIQUES.items() if not it.coded]


@pytest.fixture(scope="module")
def found() -> list[Compared]:
    record = Record.read(CALIBRATED)
    assert record is not None
    assert [case.name for case in CALIBRATION] == list(record.points)
    return [compared(case, record.points[case.name]["processes"], record.found_once) for case in CALIBRATION]


def _off(found: list[Compared], name: str) -> dict[str, float]:
    return {it.case.name: it.pairs[name].off for it in found if name in it.pairs}


def test_memory_is_within_a_tenth_of_what_processes_took(found: list[Compared]) -> None:
    """What PEFT computes, whose casts lie differently in every run, within a fifth."""
    for name, usual in (("peak", 0.025), ("above", 0.035)):
        off, peft = _off(found, name), {it.case.name for it in found if isinstance(adapter_of(it.case.kind), PeftSpec)}
        assert len(off) == len(CALIBRATION)
        assert median(map(abs, off.values())) < usual
        assert {case: it for case, it in off.items() if abs(it) > (0.2 if case in peft else 0.1)} == {}


def test_steps_are_within_a_fifth_of_what_they_took(found: list[Compared]) -> None:
    """At the speed that the core had between them: the points were measured beside other work."""
    off = {it.case.name: it.at_the_moment.off for it in found}
    assert median(map(abs, off.values())) < 0.04
    assert {case: it for case, it in off.items() if abs(it) > 0.2} == {}


def test_validation_has_no_point_that_the_laws_were_fitted_to() -> None:
    models = {case.model for case in CALIBRATION}
    assert {case.name for case in VALIDATION if case.model in models} == set()
    assert len({case.name for case in VALIDATION}) == len(VALIDATION) >= 44
    assert sum(case.sizes.numbers >= 70e6 for case in VALIDATION) >= len(VALIDATION) / 2
    assert {case.kind for case in VALIDATION} >= {TECHNIQUES[name].kind for name in KINDS} - {"ln_tuning"}


def test_the_summary_counts_what_is_near_and_names_the_worst(found: list[Compared]) -> None:
    lines = {line[0]: line for line in summary(found).rows}
    figure, within, many, _, worst, where = lines["peak memory"]
    off = _off(found, "peak")
    near = sum(abs(it) <= 0.1 for it in off.values())
    assert (figure, within, many) == ("peak memory", "10%", f"{near} of {len(off)}")
    assert 0 < near < len(off)
    assert worst == f"{off[where]:+.1%}"
    assert abs(off[where]) == max(map(abs, off.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_tokens_never_take_less(kind: str, device: Any) -> None:
    spec, shape = adapter_of(kind), Shape("bf16", 64, device)
    peaks = [step_memory(SIZES, spec, replace(shape, pass_tokens=tokens)).peak for tokens in (64, 256, 1024, 4096, 16384)]
    assert peaks == sorted(peaks)
    seconds = [training_seconds(SIZES, spec, shape, Work(tokens, 1, 4096)) for tokens in (64, 256, 1024, 4096, 16384)]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_computed_again_keep_less_and_take_longer(kind: str) -> None:
    spec, shape = adapter_of(kind), Shape("bf16", 2048)
    again, work = replace(shape, recompute=True), Work(20_480, 10, 2048)
    assert step_memory(SIZES, spec, again).activations < step_memory(SIZES, spec, shape).activations
    assert training_seconds(SIZES, spec, again, work) > training_seconds(SIZES, spec, shape, work)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_more_processes_never_take_more_each(stage: int) -> None:
    shape = Shape("fp32", 128, zero_stage=stage)
    peaks = [peak_bytes(SIZES, FullSpec(), replace(shape, processes=count)) for count in (2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)
    assert (peaks[0] > peaks[-1]) == (stage > 0)


def test_each_stage_divides_more() -> None:
    peaks = [peak_bytes(SIZES, FullSpec(), Shape("fp32", 128, processes=8, zero_stage=stage)) for stage in (1, 2, 3)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3


def test_packed_weights_are_there_for_both_sides_of_a_product() -> None:
    plain, packed = (step_memory(SIZES, LoraSpec(), Shape("bf16", 512, packed=it)).weights for it in (False, True))
    assert packed - plain == 2 * (SIZES.linear_numbers + SIZES.vocab * SIZES.hidden)
    tied = replace(SIZES, tied=True)  # the head is packed beside the embedding that it is
    plain, packed = (step_memory(tied, LoraSpec(), Shape("bf16", 512, packed=it)).weights for it in (False, True))
    assert packed - plain == 2 * (SIZES.linear_numbers + 2 * SIZES.vocab * SIZES.hidden)


def test_a_process_grows_by_its_rows_and_by_what_it_imports() -> None:
    def rest(kind: str, **more: int) -> float:
        return process_memory(SIZES, adapter_of(kind), Shape("bf16", 512), **more).rest

    assert (
        rest("lora", rows=1000, tokens=100_000)
        < rest("lora", rows=1000, tokens=200_000)
        < rest("lora", rows=100_000, tokens=200_000)
    )
    assert rest("loha") > rest("lora") > IDLE_BYTES
    assert process_memory(SIZES, LoraSpec(), Shape("bf16", 512), idle=1e9).rest == pytest.approx(rest("lora") + 1e9 - IDLE_BYTES)


def test_a_gpu_is_asked_for_what_the_run_allocates_alone() -> None:
    shape = Shape("bf16", 512, "cuda")
    assert process_memory(SIZES, LoraSpec(), shape, rows=1000, tokens=1000).rest == 0
    assert peak_bytes(SIZES, LoraSpec(), shape) == step_memory(SIZES, LoraSpec(), shape).peak


def test_a_peak_is_never_less_than_the_base_while_it_is_read() -> None:
    for shape in (Shape("nf4", 16), Shape("bf16", 16, processes=64, zero_stage=3)):
        process = process_memory(SIZES, LoraSpec(), shape)
        whole = step_memory(SIZES, LoraSpec(), replace(shape, zero_stage=0)).weights
        assert peak_bytes(SIZES, LoraSpec(), shape) > process.rest + 0.8 * whole


def test_an_idle_process_is_as_large_as_the_kernel_says() -> None:
    """Other builds of torch are larger; none is ten times smaller."""
    assert IDLE_BYTES / 10 < idle_bytes() < 10 * IDLE_BYTES


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(2, 90), min_size=1, max_size=12), min_size=1, max_size=4), st.integers(20, 200))
def test_work_is_that_of_the_packs_that_are_made(steps: list[list[int]], budget: int) -> None:
    def row(length: int) -> TokenRow:
        return TokenRow(np.zeros(length, np.int32), np.r_[0, np.ones(length - 1)].astype(np.float32), 0, Where("made", 1), 1)

    packs = [pack(part) for lengths in steps for part in micro_batches([row(length) for length in lengths], budget)]
    work = work_of(steps, budget)
    assert work.num_passes == len(packs)
    assert work.tokens == sum(it.num_tokens for it in packs)
    assert work.pass_tokens == max(it.num_tokens for it in packs)
    assert work.row_tokens == pytest.approx(sum(n * n for it in packs for n in it.lengths) / work.tokens)


def test_a_pass_that_only_scores_takes_less_than_a_step() -> None:
    for kind in KINDS:
        spec, shape, work = adapter_of(kind), Shape("bf16", 1024), Work(1024, 1, 1024, row_tokens=128.0)
        assert 0 < scoring_seconds(SIZES, spec, shape, work) < training_seconds(SIZES, spec, shape, work)


def test_every_amount_has_a_rate_and_every_rate_an_amount() -> None:
    work, named = Work(2048, 2, 512), set[str]()
    for kind in KINDS:
        for precision in ("bf16", "nf4", "int8"):
            shape = Shape(precision, 512, processes=2, zero_stage=3)
            named |= generation_amounts(SIZES, adapter_of(kind), replace(shape, packed=precision == "bf16"), [10, 20], 8).keys()
            named |= training_amounts(SIZES, adapter_of(kind), shape, work).keys()
            named |= scoring_amounts(SIZES, adapter_of(kind), shape, work).keys()
    assert named == SECONDS.keys()


def test_replies_take_longer_the_more_they_say_and_the_more_are_asked() -> None:
    def seconds(prompts: list[int], new_tokens: int) -> float:
        return generation_seconds(SIZES, LoraSpec(), Shape("bf16", 512), prompts=prompts, new_tokens=new_tokens)

    assert seconds([], 10) == 0
    assert 0 < seconds([50], 10) < seconds([50], 20) < seconds([50] * 64, 20) < seconds([50] * 65, 20)
    # Rows that are answered together share the reading of weights.
    assert seconds([50] * 64, 20) < 64 * seconds([50], 20)


def test_what_comes_before_the_first_step_grows_with_base_and_rows() -> None:
    def seconds(**more: Any) -> float:
        return start_seconds(SIZES, LoraSpec(), Shape("bf16", 512), **more)

    assert seconds(stored_bytes=1e9) < seconds() < seconds(stored_bytes=20e9)
    assert seconds() < seconds(rows=1000, tokens=100_000) < seconds(rows=1000, tokens=1_000_000)
    assert seconds(speed=2.0) == pytest.approx(seconds() / 2)


def test_a_record_goes_on_where_it_was(tmp_path: Path, found: list[Compared]) -> None:
    held = Record.read(CALIBRATED)
    assert held is not None
    held.file = tmp_path / "record.json"
    held.save()
    again = Record.read(held.file)
    assert again is not None
    assert again == held
    assert again.has(CALIBRATION[0])
    assert not again.has(replace(CALIBRATION[0], steps=99))
    assert not again.has(Case("4m", "lora", "fp32", 10, 10, 10))
