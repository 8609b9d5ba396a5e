"""The arithmetic of the engine's benchmark, with runs made up instead of measured."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from benchmarks.engine.cases import Case, chosen, from_json, full_cases, quick_cases, to_json
from benchmarks.engine.flops import step_flops
from benchmarks.engine.report import sections
from benchmarks.engine.runner import DifferentMathematics, Failed, Results, Run, run_all, turns
from benchmarks.engine.summary import figures
from benchmarks.engine.workload import RANK, Model, Row, draw_rows

PROMISED = {
    "bf16_vs_trl_best", "bf16_vs_trl_best_malloc", "fp32_vs_trl_best", "bf16_floor_share", "fp32_floor_share", "bf16_rss_ratio",
    "fp32_rss_ratio", "dora_vs_lora", "nf4_vs_bf16", "nf4_base_bytes_ratio", "fp32_loss_diff_max", "two_threads", "wide",
}  # fmt: skip
SUB_OBJECTS = {"trl_8x2", "accuracy", "accuracy_71m", "extras"}
FLOOR = {"bf16": 4e11, "fp32": 2e11}


def made_up(case: Case) -> Run:
    """Return a run in which ours takes one CPU second a step and a peer four, and both compute the same."""
    seconds = 1.0 if case.side == "ours" else 4.0
    linear_bytes = {"nf4": 28, "bf16": 100, "fp32": 200}[case.precision]
    return Run(
        tokens=[1000] * case.steps,
        cpu_s=[100.0] + [seconds] * (case.steps - 1),
        wall_s=[100.0] + [seconds / case.threads] * (case.steps - 1),
        loss=[10.0] * case.steps,
        grad_norm=[2.0] * case.steps,
        rss_before_bytes=1,
        rss_peak_bytes=1000 if case.side == "ours" else 2000,
        versions={"torch": "0"},
        linear_bytes=linear_bytes if case.side == "ours" else None,
    )


def run_made_up(cases: list[Case]) -> Results:
    return run_all(cases, lambda due: [made_up(case) for case in due], lambda _: FLOOR)


def test_the_operations_of_a_step_are_those_counted_by_hand() -> None:
    model = Model(hidden=8, layers=2, heads=2, kv_heads=1, mlp=4, vocab=10)
    rows = [Row((3, 4, 5), (False, True, True)), Row((3, 4, 5, 6, 7), (False, False, False, True, True))]
    weights = 2 * (8 * 16 + 8 * 8 + 8 * 8 + 4 * 8)  # two layers of qkv, o, gate and up, down
    assert model.linear_parameters == weights
    flops = step_flops(model, rows)
    spared = (8 - 4) * (8 * 8 + 8 * 8 + 4 * 8)  # the last layer after its attention, for tokens that nobody asks for
    assert flops.linear == 4 * weights * 8 - 2 * 8 * 16 * 8 - 4 * spared
    assert flops.head == 4 * 8 * 10 * 4
    assert flops.adapter == 6 * RANK * 2 * (24 + 16 + 16 + 12) * 8 - 2 * 8 * RANK * 8 - 6 * RANK * (8 - 4) * (16 + 16 + 12)
    assert flops.attention == 6 * 2 * 8 * (3 * 4 + 5 * 6)
    assert step_flops(model, rows, "dora").adapter - flops.adapter == 2 * weights * RANK
    assert step_flops(model, rows, "head").adapter - flops.adapter == 6 * RANK * (8 + 10) * 4
    assert step_flops(model, rows, objective="dpo").head == flops.head * 6 // 4


def test_rows_are_the_same_in_every_process_and_look_like_chats() -> None:
    rows = draw_rows(400)
    assert draw_rows(16) == rows[:16]
    lengths = np.array([len(row.ids) for row in rows])
    assert 110 <= np.median(lengths) <= 134
    assert 140 <= lengths.mean() <= 172
    assert lengths.max() <= 1024
    assert 0.42 <= sum(sum(row.supervised) for row in rows) / lengths.sum() <= 0.55
    assert not any(row.supervised[0] for row in rows)
    assert all(any(row.supervised) for row in rows)


def test_a_case_survives_its_way_into_a_process() -> None:
    cases = quick_cases() + full_cases()
    assert from_json(to_json(cases, "folder")) == (cases, "folder")


@pytest.mark.parametrize("cases", [quick_cases(), full_cases()], ids=["quick", "full"])
def test_figures_hold_exactly_what_was_promised_and_nothing_is_missing(cases: list[Case]) -> None:
    found = figures(cases, run_made_up(cases))
    assert set(found) == PROMISED | SUB_OBJECTS
    flat = {**found, **{f"{k}.{name}": v for k in ("two_threads", "wide", *SUB_OBJECTS) for name, v in found[k].items()}}  # type: ignore[union-attr]
    empty = {name for name, value in flat.items() if value is None and not name.startswith("accuracy_71m.")}
    assert empty == ({"trl_8x2.fp32_vs_trl", "trl_8x2.fp32_rss_ratio"} if cases == quick_cases() else set())


def test_ratios_leave_the_first_step_out() -> None:
    cases = quick_cases()
    found = figures(cases, run_made_up(cases))
    assert found["bf16_vs_trl_best"] == found["bf16_vs_trl_best_malloc"] == found["fp32_vs_trl_best"] == pytest.approx(4.0)
    assert found["dora_vs_lora"] == pytest.approx(1.0)
    assert found["bf16_rss_ratio"] == pytest.approx(0.5)
    assert found["nf4_base_bytes_ratio"] == pytest.approx(0.28)
    assert found["fp32_loss_diff_max"] == 0.0
    assert found["fp32_floor_share"] == pytest.approx(2 * found["bf16_floor_share"])  # type: ignore[operator]
    assert found["two_threads"]["bf16_vs_one_thread"] == pytest.approx(2.0)  # type: ignore[index, call-overload]


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that slows down by ten between rounds changes no ratio."""
    cases = chosen(quick_cases(), {"main"})
    seen: dict[str, int] = {}

    def slowing(due: list[Case]) -> list[Run | Failed]:
        (case,) = due
        seen[case.name] = seen.get(case.name, 0) + 1
        run = made_up(case)
        return [dataclasses.replace(run, cpu_s=[s * 10 ** seen[case.name] for s in run.cpu_s])]

    assert figures(cases, run_all(cases, slowing, lambda _: FLOOR))["bf16_vs_trl_best"] == pytest.approx(4.0)


def test_sides_take_turns_round_by_round() -> None:
    order = [(number, [case.name for case in due]) for number, due in turns(chosen(quick_cases(), {"main", "extras"}))]
    assert order[:2] == [(0, ["ours-bf16"]), (0, ["trl-bf16"])]
    assert [number for number, _ in order[:-1]] == sorted(number for number, _ in order[:-1])
    assert order[-1][1][:2] == ["ours-bf16", "ours-nf4"]


@pytest.mark.parametrize(
    "change", [{"loss": [10.01] * 3}, {"grad_norm": [2.1] * 3}, {"loss": [math.nan] * 3}, {"tokens": [1000, 999, 1000]}]
)
def test_a_side_that_computes_something_else_ends_the_benchmark(change: dict[str, list[float]]) -> None:
    cases = chosen(quick_cases(), {"main"})

    def start(due: list[Case]) -> list[Run | Failed]:
        return [dataclasses.replace(made_up(case), **(change if case.side == "trl" else {})) for case in due]

    with pytest.raises(DifferentMathematics, match=r"trl-(bf16|fp32)"):
        run_all(cases, start, lambda _: FLOOR)


def test_a_case_that_cannot_run_leaves_its_figures_empty_and_is_named_in_the_table() -> None:
    cases = chosen(quick_cases(), {"extras"})

    def start(due: list[Case]) -> list[Run | Failed]:
        return [Failed("no kernel") if case.precision == "nf4" else made_up(case) for case in due]

    results = run_all(cases, start, lambda _: FLOOR)
    assert figures(cases, results)["nf4_vs_bf16"] is None
    assert figures(cases, results)["dora_vs_lora"] == pytest.approx(1.0)
    (table,) = sections(cases, results)
    assert ["ours-nf4 (did not run)", "-", "-", "1.000", "-"] in table.rows
    assert all(len(row) == len(table.columns) for row in table.rows)
