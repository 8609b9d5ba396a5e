"""The table of scenarios by techniques: the rule that judges, intervals over seeds, cells from finished jobs, the page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from kivnun.artifacts import atomic_write, make_folder
from kivnun.errors import RunFolderError
from kivnun.evaluate.intervals import Interval
from kivnun.evaluate.metrics import Measure
from kivnun.matrix.cells import _cpu_to, cost_cells, task_cells
from kivnun.matrix.jobs import Done, Job, read_done, result_path, spec_tree
from kivnun.matrix.matrix import _claim
from kivnun.matrix.methods import METHODS
from kivnun.matrix.page import Section, Table, render
from kivnun.matrix.plan import (
    COST_TASK,
    FULL,
    QUICK,
    Scale,
    base_jobs,
    chosen_rate,
    confirm_jobs,
    cost_jobs,
    objective_of,
    score_jobs,
    sweep_jobs,
)
from kivnun.matrix.sharding import Sharded, _apart, equality_cells, sharded_cost_cells, sharded_names
from kivnun.matrix.statistics import effect_over_seeds, ratio_interval
from kivnun.matrix.table import DOCUMENT, ROWS, TECHNIQUES, UPSTREAM, Cell, judged, least_favourable, said
from kivnun.plan.techniques import COLUMNS
from kivnun.spec import load_spec

ROWS_HELD_OUT = 40
SMALL = Scale(("domain", "translation", "chat"), ("full", "lora", "qlora", "dora", "ia3"), 2, sweep=True)
GAIN = {"full": 0.5, "lora": 0.4, "qlora": 0.3, "dora": 0.45, "ia3": 0.0}


def test_the_table_has_54_cells_and_its_authors_changed_six() -> None:
    assert (len(ROWS), len(TECHNIQUES)) == (9, 6)
    cells = [(row, technique) for row in ROWS for technique in TECHNIQUES]
    changed = {cell for cell in cells if said(DOCUMENT, *cell) != said(UPSTREAM, *cell)}
    assert changed == {(6, "PEFT"), (6, "DoRA"), (7, "LoRA"), (7, "PEFT"), (8, "LoRA"), (9, "DoRA")}


@pytest.mark.parametrize(
    ("row", "technique", "effect", "verdict"),
    [
        (6, "LoRA", Interval(0.1, 0.3), "supported"),
        (6, "LoRA", Interval(-0.3, -0.1), "contradicted"),
        (6, "LoRA", Interval(-0.1, 0.1), "no_detectable_effect"),
        (6, "PEFT", Interval(0.1, 0.3), "contradicted"),
        (6, "PEFT", Interval(-0.3, -0.1), "supported"),
        (8, "ZeRO", Interval(0.0, 0.0), "supported"),
        (1, "ZeRO", None, "not_applicable"),
    ],
)
def test_an_interval_supports_or_contradicts_what_the_document_says(
    row: int, technique: str, effect: Interval | None, verdict: str
) -> None:
    assert judged(row, technique, effect) == verdict


def test_the_least_favourable_interval_is_the_one_with_the_lowest_end() -> None:
    assert least_favourable([Interval(0.2, 0.9), Interval(-0.1, 2.0), Interval(0.0, 0.1)]) == Interval(-0.1, 2.0)


def test_an_effect_is_positive_where_tuned_is_better_whichever_way_the_metric_goes() -> None:
    worse, better = _measure("nll", 2.0), _measure("nll", 1.0)
    point, interval = effect_over_seeds([worse], [better, better])
    assert point == pytest.approx(1.0)
    assert interval.low > 0.9
    low, high = effect_over_seeds([_measure("exact_match", 0.8)], [_measure("exact_match", 0.3)])[1]
    assert high < 0
    assert low < -0.3


def test_seeds_that_disagree_widen_the_interval() -> None:
    base = [_measure("nll", 2.0)]
    alike = effect_over_seeds(base, [_measure("nll", 1.5)] * 3)[1]
    apart = effect_over_seeds(base, [_measure("nll", 1.0), _measure("nll", 1.5), _measure("nll", 2.0)])[1]
    assert apart.high - apart.low > 2 * (alike.high - alike.low)


def test_a_ratio_interval_holds_the_geometric_mean() -> None:
    low, high = ratio_interval([0.5, 0.6, 0.72])
    assert 0.5 <= low < 0.6 < high <= 0.72


def _measure(name: str, figure: float) -> Measure:
    """Return a measure of that figure whose rows differ."""
    noise = np.random.default_rng(3).normal(0, 0.05, ROWS_HELD_OUT)
    rows = figure + noise - noise.mean()
    return Measure(name, np.stack([rows, np.ones(ROWS_HELD_OUT)], axis=1))


METRICS = {"domain": "perplexity", "translation": "exact_match", "chat": "format_compliance"}


def _write(folder: Path, job: Job, worse: float = 0.0) -> None:
    """Write a job's result as if it had been done; a lower rate of a sweep is the better one, `worse` is added to its loss."""
    metric, gain = METRICS[job.task], 0.0 if job.kind == "base" else GAIN[job.method]
    better = {"perplexity": 5.0 - 4 * gain}.get(metric, 0.2 + gain)
    measure = _measure(metric, better)
    nll = 1.0 + job.rate + worse if job.kind == "sweep" else 3.0 - 2 * gain
    steps = [(step, 3.0 - 2 * gain * step / 10, 0.1 * step * (2 if job.method == "full" else 1)) for step in range(11)]
    figures = {metric: measure.figure, "nll": nll}
    done = Done(
        job, figures, {metric: 0.2, "nll": 3.0}, 1000, 10, 5000, 1.0, steps if job.kind == "cost" else [], {metric: measure}
    )
    record = {**asdict(done), "measures": {metric: measure.rows_ND.tolist()}}
    make_folder(result_path(folder, job).parent)
    atomic_write(result_path(folder, job), json.dumps(record))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    for job in (*base_jobs(SMALL), *sweep_jobs(SMALL)):
        _write(tmp_path, job)
    for job in confirm_jobs(tmp_path, SMALL):
        _write(tmp_path, job)
    for job in (*score_jobs(tmp_path, SMALL), *cost_jobs(tmp_path, SMALL)):
        _write(tmp_path, job)
    return tmp_path


def test_a_result_reads_back_as_it_was(finished: Path) -> None:
    job = score_jobs(finished, SMALL)[0]
    done = read_done(finished, job)
    assert done is not None
    assert done.job == job
    assert done.measures["perplexity"].rows == ROWS_HELD_OUT
    assert read_done(finished, Job("score", "domain", "vera", 0.1)) is None


def test_a_sweep_decides_the_rate_and_a_quick_table_takes_the_default(finished: Path) -> None:
    rates = METHODS["lora"].rates("supervised")
    assert chosen_rate(finished, SMALL, "translation", "lora") == rates[0] == METHODS["lora"].usual_rate("supervised")
    assert chosen_rate(finished, QUICK, "translation", "ia3") == METHODS["ia3"].usual_rate("supervised")
    assert chosen_rate(finished, QUICK, "translation", "lora") == METHODS["lora"].rates("supervised")[1]
    assert sweep_jobs(QUICK) == []
    assert objective_of("domain") == "pretraining"


def test_a_rate_that_fails_with_another_seed_is_not_taken(finished: Path) -> None:
    """The best two of the first seed are tried again, and the worse of both seeds decides."""
    rates = METHODS["lora"].rates("supervised")
    tried = [job for job in confirm_jobs(finished, SMALL) if (job.task, job.method) == ("translation", "lora")]
    assert [(job.rate, job.seed) for job in tried] == [(rates[0], 1), (rates[1], 1)]
    _write(finished, tried[0], worse=1.0)
    assert chosen_rate(finished, SMALL, "translation", "lora") == rates[1]
    assert confirm_jobs(finished, QUICK) == []


def test_every_job_has_a_name_of_its_own() -> None:
    jobs = [*base_jobs(FULL), *sweep_jobs(FULL)]
    assert len({job.name for job in jobs}) == len(jobs)
    assert {job.method for job in base_jobs(FULL)} == {"full", "qlora"}  # one for each precision


def test_cells_say_what_each_technique_gained(finished: Path) -> None:
    cells = {(cell.row, cell.technique): cell for cell in task_cells(finished, SMALL)}
    assert set(cells) == {(row, technique) for row in (1, 2, 4) for technique in COLUMNS}
    lora, peft = cells[2, "LoRA"], cells[2, "PEFT"]
    assert lora.verdict == "supported"
    assert lora.measured["translation"]["gain"] == pytest.approx(0.4, abs=0.02)
    assert lora.interval is not None
    assert 0.3 < lora.interval.low < lora.interval.high < 0.5
    assert (peft.measured["best"]["method"], peft.measured["worst"]["method"]) == ("dora", "ia3")
    assert peft.baseline["translation"]["full"] == pytest.approx(0.7, abs=0.02)
    assert cells[1, "LoRA"].measured["domain"]["gain"] > 0  # a perplexity that fell
    assert all(read_done(finished, _job_of(finished, name)) is not None for name in lora.runs)


def _job_of(folder: Path, name: str) -> Job:
    return Job(**json.loads((folder / "runs" / f"{name}.json").read_text())["job"])


def test_cost_is_the_time_to_the_loss_at_which_full_tuning_has_most_of_its_gain(finished: Path) -> None:
    cells = {cell.technique: cell for cell in cost_cells(finished, SMALL, {"cpu_core_hour": 3600.0})}
    full, lora = cells["LoRA"].baseline, cells["LoRA"].measured
    assert lora["target_nll"] == pytest.approx(2.2)
    assert full["full_cpu_s"] == pytest.approx(1.6) == full["money"]  # eight of ten steps of 0.2 s
    assert lora["cpu_s"] is None or lora["ratio_to_full"] == pytest.approx(1.0 / 1.6, abs=0.02)  # all of ten steps of 0.1 s
    assert cells["QLoRA"].measured["ratio_to_full"] is None  # it never gets there
    assert cells["QLoRA"].verdict == "contradicted"


def test_time_to_a_loss_is_taken_between_two_looks() -> None:
    trace = [(0, 3.0, 0.0), (5, 2.0, 10.0), (10, 1.0, 20.0)]
    done = Done(Job("cost", COST_TASK, "lora"), {"nll": 1.0}, {"nll": 3.0}, 1, 10, 1, 20.0, trace, {})
    assert _cpu_to(done, 2.5) == pytest.approx(5.0)
    assert _cpu_to(done, 1.5) == pytest.approx(15.0)
    assert _cpu_to(done, 0.5) is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["sweep", "score", "cost"])
def test_a_job_is_a_spec_that_reads(kind: str, method: str, tmp_path: Path) -> None:
    from kivnun.data.scenarios import find_scenario

    place = tmp_path / "data" / "translation"
    place.mkdir(parents=True)
    (place / "spec.yaml").write_text(
        (find_scenario("translation").folder / "spec.yaml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    import yaml

    tree = spec_tree(tmp_path, Job(kind, "translation", method, 0.01, 3))  # type: ignore[arg-type]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    spec = load_spec(tmp_path / "job.yaml", ())
    assert (spec.adapter.kind, spec.seed, spec.schedule.learning_rate) == (METHODS[method].adapter["kind"], 3, 0.01)
    assert bool(spec.evaluation.metrics) == (kind == "score")


def test_sharded_runs_are_held_to_one_process(tmp_path: Path) -> None:
    for task, stage, count in sharded_names(["translation"], (2, 3), (2,)):
        run = Sharded(task, stage, count, [3.0, 2.0 * (1 + 1e-7 * (stage or 0))], [9.0, 9.0, 0.5, 0.5])
        make_folder((tmp_path / "runs" / run.name).parent)
        atomic_write(tmp_path / "runs" / f"{run.name}.json", json.dumps(asdict(run)))
    cells = {cell.technique: cell for cell in equality_cells(tmp_path, {2: ["translation"]}, (2,), (2, 3))}
    assert cells["ZeRO"].measured["largest_relative_difference_of_a_loss"] == pytest.approx(3e-7)
    assert cells["DeepSpeed"].measured["equal"] is True
    assert cells["ZeRO"].verdict == "not_applicable"
    cost = {cell.technique: cell for cell in sharded_cost_cells(tmp_path, ["translation"], (2,), (2, 3))}
    assert cost["ZeRO"].measured["stage 3, 2 processes"]["ratio_to_one_process"] == pytest.approx(2.0)
    assert cost["ZeRO"].verdict == "contradicted"  # the document says Yes
    one, other = Sharded("a", None, 1, [2.0], []), Sharded("a", 3, 2, [1.0], [])
    assert _apart(other, one) == 0.5


def test_a_folder_of_another_scale_or_of_something_else_is_refused(tmp_path: Path) -> None:
    _claim(tmp_path / "new", quick=True)
    _claim(tmp_path / "new", quick=True)
    with pytest.raises(RunFolderError, match="holds a quick table"):
        _claim(tmp_path / "new", quick=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="holds no table"):
        _claim(tmp_path / "other", quick=True)


def test_the_page_shows_every_cell_and_loads_nothing(finished: Path) -> None:
    cells = [
        Cell(
            row,
            technique,
            {"said": [f"figure {row}", technique]},
            {},
            Interval(0.1, 0.2),
            judged(row, technique, Interval(0.1, 0.2)),
            (),
        )
        for row in (6, 7, 8, 9)
        for technique in TECHNIQUES
    ]
    cells += task_cells(finished, SMALL)
    cells += [
        Cell(
            row,
            technique,
            {"largest_relative_difference_of_a_loss": 1e-7, "stages": [2], "steps": 6},
            {},
            None,
            "not_applicable",
            (),
        )
        for row in (1, 2, 4)
        for technique in ("DeepSpeed", "ZeRO")
    ]
    filler = [cell for cell in cells if cell.row in (1, 4)]
    cells += [Cell({1: 3, 4: 5}[c.row], c.technique, c.measured, c.baseline, c.interval, c.verdict, c.runs) for c in filler]
    assert len(cells) == 54
    facts = {
        "scale": "quick", "date": "2026-11-27", "base": "kivnun/tiny-phi", "base_parameters": 3_800_000, "command": "kivnun matrix",
        "machine": "CPU: x", "seeds": 2, "sweep": True,
    }  # fmt: skip
    score = {
        "title": "Translation <he>", "metric": "exact_match", "higher_is_better": True, "base": 0.2,
        "methods": {"lora": {"score": 0.6, "gain": 0.4, "gain_interval": [0.3, 0.5], "trainable": 10, "higher_is_better": True}},
    }  # fmt: skip
    page = render(facts, cells, [score], [Section("Memory", "Bytes.", (), (Table("t", ("a",), (("1",),)),))])
    assert page.count("<td class=") == 54
    assert "Translation &lt;he&gt;" in page
    assert "60.0 %" in page
    assert "+40.0 [+30.0, +50.0]" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in page
