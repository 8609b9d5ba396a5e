"""The memory surface as numbers: crossings, laws and cells of hand-made points, and what is measured again and what is not."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from kivnun.errors import IntegrityError
from kivnun.matrix import memory
from kivnun.matrix.memory import MAIN, PARTS, REFERENCE, REPEATS, Form, Measured, Point, Surface, measure, plan
from kivnun.matrix.memory_charts import parts_chart, tokens_chart
from kivnun.matrix.memory_summary import crossings, law_of, main_form, memory_cells, outlooks
from kivnun.plan.techniques import COLUMNS, TECHNIQUES, adapter_of

FORM = Form("9m", "bf16")
MB = 10**6


def measured(peak: int, **parts: int) -> Measured:
    held = {part: parts.get(part, 0) for part in PARTS}
    held["workspace"] += peak - sum(held.values())
    return Measured(peak, held, {"gradients": 0, "moments": 0, "activations": 0}, 1000, 10, 0.1, 0.1, 8.0)


def surface(laws: dict[str, tuple[int, int]], places: list[tuple[int, int]], form: Form = FORM) -> Surface:
    """Return points that lie on fixed + per_token * tokens, in bytes."""
    return Surface(
        {
            Point(form.model, name, form.precision, rows, tokens, recompute=form.recompute): measured(fixed + slope * rows * tokens)
            for name, (fixed, slope) in laws.items()
            for rows, tokens in places
        }
    )


def test_a_crossing_is_found_where_the_laws_meet() -> None:
    found = crossings(surface({"full": (100 * MB, 10_000), "dora": (20 * MB, 50_000)}, [(8, 128), (8, 512), (2, 128)]))
    assert [(c.technique, c.along, c.fixed, c.low, c.high, c.more_above) for c in found] == [("dora", "tokens", 8, 128, 512, True)]
    assert found[0].pass_tokens == pytest.approx(2000)


def test_a_crossing_along_rows_says_which_way_it_goes() -> None:
    found = crossings(surface({"full": (20 * MB, 50_000), "loha": (100 * MB, 10_000)}, [(2, 128), (8, 128), (32, 128)]))
    assert [(c.technique, c.along, c.fixed, c.low, c.high, c.more_above) for c in found] == [("loha", "rows", 128, 8, 32, False)]
    assert found[0].pass_tokens == pytest.approx(2000)


def test_no_crossing_is_told_by_the_greatest_ratio_and_where_the_laws_would_meet() -> None:
    laws = {"full": (100 * MB, 10_000), "lora": (20 * MB, 9_000), "vera": (20 * MB, 30_000)}
    lora, vera = outlooks(surface(laws, [(2, 128), (8, 128)]))
    assert crossings(surface(laws, [(2, 128), (8, 128)])) == []
    assert lora.meets_at is None  # it grows more slowly
    assert lora.most == (pytest.approx((20 * MB + 9_000 * 1024) / (100 * MB + 10_000 * 1024)), (8, 128))
    assert vera.meets_at == pytest.approx(4000)


def test_a_technique_that_always_takes_more_meets_at_zero() -> None:
    (loha,) = outlooks(surface({"full": (10 * MB, 10_000), "loha": (20 * MB, 30_000)}, [(2, 128), (8, 128)]))
    assert loha.meets_at == 0.0


def test_a_law_is_the_line_through_the_points_and_says_how_far_they_lie_from_it() -> None:
    known = surface({"full": (100 * MB, 10_000)}, [(2, 128), (8, 128), (32, 128)])
    law = law_of(known, "full", FORM)
    assert law is not None
    assert (law.fixed, law.per_token, law.error) == (pytest.approx(100 * MB), pytest.approx(10_000), pytest.approx(0.0, abs=1e-9))
    assert law_of(surface({"full": (MB, 1)}, [(2, 128), (4, 64)]), "full", FORM) is None  # as many tokens twice


def test_full_tuning_that_computes_layers_again_is_a_baseline_of_its_own() -> None:
    again = Form("9m", "bf16", recompute=True)
    full = surface({"full": (100 * MB, 1_000)}, [(2, 128), (32, 128)], again)
    both = Surface({**full.points, **surface({"lora": (20 * MB, 30_000)}, [(2, 128), (32, 128)]).points})
    (crossing,) = crossings(both)
    assert (crossing.form.recompute, crossing.full_form.recompute, crossing.more_above) == (False, True, True)


def repeated() -> Surface:
    points = surface(dict.fromkeys(TECHNIQUES, (50 * MB, 10000)), [REFERENCE, (2, 128)]).points
    for repeat, peak in enumerate((40, 30, 35)):
        points[Point("9m", "lora", "bf16", *REFERENCE, repeat=repeat)] = measured(peak * MB, weights=10 * MB, activations=5 * MB)
        points[Point("9m", "full", "bf16", *REFERENCE, repeat=repeat)] = measured((100 + repeat) * MB, weights=10 * MB)
    return Surface(points)


def test_a_cell_is_the_median_of_repeats_with_all_that_two_of_them_can_come_to() -> None:
    cells = memory_cells(repeated())
    assert list(cells) == list(COLUMNS)
    cell = cells["LoRA"]
    assert cell.ratio == pytest.approx(35 / 101)
    assert cell.span == (pytest.approx(30 / 102), pytest.approx(40 / 100))
    figures = cell.figures["lora"]
    assert (figures.repeats, figures.peak, sum(figures.parts.values())) == (3, 35 * MB, 35 * MB)
    assert figures.over_grid[0] == pytest.approx(35 / 101)
    assert cell.text == "0.35 of full tuning's peak bytes (35 of 101 MB) at 8 x 128 tokens; 0.29 to 0.40 in 3 repeats"


def test_the_family_is_told_from_its_least_to_its_most() -> None:
    cell = memory_cells(repeated())["PEFT"]
    assert set(cell.figures) == set(TECHNIQUES) - {"full"}
    assert cell.text.startswith("LoRA 0.35 to ")


def test_pictures_name_every_technique_and_mark_a_crossing() -> None:
    known = surface({"full": (100 * MB, 10_000), "dora": (20 * MB, 50_000)}, [(2, 128), REFERENCE, (32, 128)])
    assert main_form(known) == FORM
    assert all(part in parts_chart(known, FORM) for part in (*PARTS, "full tuning", "DoRA"))
    drawn = tokens_chart(known, FORM)
    assert "DoRA takes more than full tuning from 2,000 tokens of a pass on" in drawn
    assert "var(" not in drawn  # colours are the page's


@pytest.mark.parametrize("quick", [True, False])
def test_a_plan_is_the_same_every_time_repeats_the_reference_and_names_each_point_once(quick: bool) -> None:
    points = plan(quick)
    assert points == plan(quick)
    assert len({point.name for point in points}) == len(points)
    assert {point.technique for point in points} == set(TECHNIQUES)
    model = points[0].model
    for name in MAIN if quick else TECHNIQUES:
        repeats = [p for p in points if p.technique == name and p.form == Form(model, "bf16") and (p.rows, p.tokens) == REFERENCE]
        assert len(repeats) == REPEATS


def write(folder: Path, point: Point, its: Measured) -> None:
    (folder / f"{point.name}.json").write_text(json.dumps({"point": asdict(point), "measured": asdict(its)}), encoding="utf-8")


def test_a_whole_surface_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = repeated()
    for point, its in known.points.items():
        write(tmp_path, point, its)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert measure(tmp_path, list(known.points)).points == known.points
    assert Surface.load(tmp_path).points == known.points


def test_only_what_is_missing_is_measured_and_a_stop_keeps_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [Point("9m", name, "bf16", *REFERENCE) for name in MAIN]
    write(tmp_path, points[1], measured(7))
    asked: list[str] = []

    class Asked:
        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __call__(self, point: Point) -> Measured:
            asked.append(point.technique)
            if len(asked) == 2:
                raise KeyboardInterrupt
            return measured(len(asked))

    monkeypatch.setattr(memory, "_probe", Asked)
    seen: list[tuple[str, int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, points, lambda *progress: seen.append(progress))
    assert seen == [(points[0].name, 1, 4), (points[2].name, 2, 4)]
    known = measure(tmp_path, points)
    assert asked == ["full", "qlora", "qlora", "dora"]
    assert list(known.points) == points
    assert [its.peak for its in known.points.values()] == [1, 7, 3, 4]


def test_a_file_that_is_no_point_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"point": {}}', encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"odd.json is no point of a memory surface"):
        Surface.load(tmp_path)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_default_options_are_resolved(name: str) -> None:
    spec = adapter_of(name)
    assert spec.kind == TECHNIQUES[name].kind
    assert getattr(spec, "alpha", 1.0) is not None
