"""The figures that are made of the runs: ratios per round and their median, shares of the floor, distances to the reference.

`figures` is the object that `--json` prints. A figure whose runs are missing is None, never left out.
Next: `report.py` (tables and files).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from benchmarks.engine.cases import ONE_PROCESS, Case
from benchmarks.engine.flops import step_flops
from benchmarks.engine.runner import Results, Run
from benchmarks.engine.workload import MODELS, draw_rows

Figures: TypeAlias = Mapping[str, "float | Figures | None"]


def figures(cases: Sequence[Case], results: Results) -> Figures:
    """Return what the benchmark is judged by. Ratios are ours over the peer's; memory is our peak over the peer's.

    The top level and `wide` are one thread and tokens per CPU second. `two_threads` is tokens per second: two threads are used to
    be done sooner. `trl_8x2` is the comparison with TRL's default of eight rows per pass; `extras` the useful operations per CPU
    second of what rides on the same path, relative to plain LoRA.
    """
    extras = {v: per_operation(cases, results, f"ours-{v}") for v in ("dropout", "rslora", "head", "dpo")}
    return {
        **_against(cases, results, "main", "cpu_s"),
        "dora_vs_lora": step_ratio(results, "ours-dora"),
        "nf4_vs_bf16": step_ratio(results, "ours-nf4"),
        "nf4_base_bytes_ratio": _over_rounds(
            results,
            ONE_PROCESS,
            "ours-nf4",
            "ours-bf16",
            lambda ours, theirs: (ours.linear_bytes or 0) / (theirs.linear_bytes or 1),
        ),
        "fp32_loss_diff_max": _largest(
            distance(results, group, "ours-fp32", "loss", max)
            for group in ("accuracy", "accuracy_71m")
            if results.of(group, "ours-fp32")
        ),
        "two_threads": {
            **{k: v for k, v in _against(cases, results, "two_threads", "wall_s").items() if "floor" not in k},
            "bf16_vs_one_thread": _two_over_one(results, "ours-bf16"),
            "fp32_vs_one_thread": _two_over_one(results, "ours-fp32"),
        },
        "wide": _against(cases, results, "wide", "cpu_s"),
        "trl_8x2": {
            "bf16_vs_trl": ratio(results, "main", "ours-bf16", "trl-bf16-8x2"),
            "bf16_vs_trl_malloc": ratio(results, "main", "ours-bf16", "trl-bf16-8x2-malloc"),
            "fp32_vs_trl": ratio(results, "main", "ours-fp32", "trl-fp32-8x2"),
            "bf16_rss_ratio": memory_ratio(results, "main", "ours-bf16", "trl-bf16-8x2"),
            "fp32_rss_ratio": memory_ratio(results, "main", "ours-fp32", "trl-fp32-8x2"),
        },
        "accuracy": _accuracy(results, "accuracy"),
        "accuracy_71m": _accuracy(results, "accuracy_71m"),
        "extras": extras,
    }


def _against(cases: Sequence[Case], results: Results, group: str, clock: str) -> dict[str, float | None]:
    return {
        "bf16_vs_trl_best": ratio(results, group, "ours-bf16", "trl-bf16", clock),
        "bf16_vs_trl_best_malloc": ratio(results, group, "ours-bf16", "trl-bf16-malloc", clock),
        "fp32_vs_trl_best": ratio(results, group, "ours-fp32", "trl-fp32", clock),
        "bf16_floor_share": floor_share(cases, results, group, "ours-bf16"),
        "fp32_floor_share": floor_share(cases, results, group, "ours-fp32"),
        "bf16_rss_ratio": memory_ratio(results, group, "ours-bf16", "trl-bf16"),
        "fp32_rss_ratio": memory_ratio(results, group, "ours-fp32", "trl-fp32"),
    }


def _accuracy(results: Results, group: str) -> dict[str, float | None]:
    return {
        f"{name.replace('-', '_')}_{what}_diff_{kind}": distance(results, group, name, what, of)
        for name in ("ours-fp32", "ours-bf16", "trl-bf16")
        for what in ("loss", "grad_norm")
        for kind, of in (("max", max), ("mean", statistics.mean))
    }


def ratio(results: Results, group: str, name: str, other: str, clock: str = "cpu_s") -> float | None:
    """Return how many times faster `name` is than `other`: taken within each round, then the median."""
    return _over_rounds(results, group, name, other, lambda run, than: run.rate(clock) / than.rate(clock))


def memory_ratio(results: Results, group: str, name: str, other: str) -> float | None:
    """Return the peak memory of `name` over that of `other`, both after the same steps: a peak is that of the longest so far."""

    def over(run: Run, than: Run) -> float:
        assert run.tokens == than.tokens
        return run.rss_peak_bytes / than.rss_peak_bytes

    return _over_rounds(results, group, name, other, over)


def rate(results: Results, group: str, name: str, clock: str = "cpu_s") -> float | None:
    return _median([run.rate(clock) for run in results.of(group, name).values()])


def floor_share(cases: Sequence[Case], results: Results, group: str, name: str) -> float | None:
    """Return which part of the CPU seconds the useful operations would take at the floor's rate; one thread only."""
    case = _case(cases, group, name)
    if case is None or case.threads != 1 or case.model not in results.floors:
        return None
    floor = results.floors[case.model]["fp32" if case.precision == "fp32" and not case.out_of_the_box else "bf16"]
    seconds = sum(_operations(case)[1:]) / floor
    return _median([seconds / sum(run.cpu_s[1:]) for run in results.of(group, name).values()])


def distance(results: Results, group: str, name: str, what: str, of: Callable[[list[float]], float]) -> float | None:
    """Return `of` (the largest, or the mean) the relative distances of a run's losses ("loss") or gradient norms ("grad_norm"),
    step by step, to those of TRL in fp32."""
    run, reference = _first(results, group, name), _first(results, group, "trl-fp32")
    if run is None or reference is None:
        return None
    pairs = zip(_series(run, what), _series(reference, what), strict=True)
    return of([abs(value - exact) / abs(exact) for value, exact in pairs])


def step_ratio(results: Results, name: str) -> float | None:
    """Return how many times faster a variant is than plain LoRA in bf16: taken within each step of the process that makes a step
    of each in turn, then the median over steps and rounds."""
    runs, plain = results.of(ONE_PROCESS, name), results.of(ONE_PROCESS, "ours-bf16")
    return _median([p / v for number, run in runs.items() for v, p in zip(run.cpu_s[1:], plain[number].cpu_s[1:], strict=True)])


def expected_speed(cases: Sequence[Case], name: str) -> float | None:
    """Return plain LoRA's operations over the variant's: how fast it would be, were all operations equally fast."""
    case, plain = _case(cases, ONE_PROCESS, name), _case(cases, ONE_PROCESS, "ours-bf16")
    if case is None or plain is None:
        return None
    return sum(_operations(plain)[1:]) / sum(_operations(case)[1:])


def per_operation(cases: Sequence[Case], results: Results, name: str) -> float | None:
    """Return a variant's useful operations per CPU second over those of plain LoRA: 1 when it costs just what it computes."""
    speed, expected = step_ratio(results, name), expected_speed(cases, name)
    return None if speed is None or expected is None else speed / expected


def _operations(case: Case) -> list[int]:
    rows = draw_rows(case.steps * case.rows)
    steps = [rows[number * case.rows : (number + 1) * case.rows] for number in range(case.steps)]
    return [step_flops(MODELS[case.model], step, case.variant, case.objective).total for step in steps]


def _two_over_one(results: Results, name: str) -> float | None:
    one, two = rate(results, "main", name, "wall_s"), rate(results, "two_threads", name, "wall_s")
    return None if one is None or two is None else two / one


def _over_rounds(results: Results, group: str, name: str, other: str, of: Callable[[Run, Run], float]) -> float | None:
    """Return the median of a figure over the rounds in which both ran."""
    runs, others = results.of(group, name), results.of(group, other)
    return _median([of(runs[number], others[number]) for number in sorted(runs.keys() & others.keys())])


def _case(cases: Sequence[Case], group: str, name: str) -> Case | None:
    return next((case for case in cases if (case.group, case.name) == (group, name)), None)


def _first(results: Results, group: str, name: str) -> Run | None:
    return next(iter(results.of(group, name).values()), None)


def _series(run: Run, what: str) -> list[float]:
    return {"loss": run.loss, "grad_norm": run.grad_norm}[what]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _largest(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None
