"""Predicted memory and time are those that were measured: every point of the committed surface, and the facts behind them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from kivnun.matrix.memory import Measured, Point, Surface
from kivnun.matrix.shapes import SHAPES
from kivnun.model.phi import PHI
from kivnun.plan.memory import Shape, step_memory
from kivnun.plan.sizes import Sizes
from kivnun.plan.techniques import TECHNIQUES, adapter_of
from kivnun.plan.time import Work, seconds_of, training_amounts
from kivnun.spec.adapters import FullSpec, LoraSpec

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SURFACE, GPU = RESULTS / "matrix_memory_2026-11-27", RESULTS / "gpu_2026-11-27.json"


@pytest.fixture(scope="module")
def points() -> dict[Point, Measured]:
    found = {p: m for p, m in Surface.load(SURFACE).points.items() if p.kernels == "auto"}
    assert len(found) > 100
    return found


def _precision(point: Point) -> str:
    return "nf4" if TECHNIQUES[point.technique].coded else point.precision


def _predicted(point: Point) -> float:
    sizes, shape = Sizes.of(SHAPES[point.model].config, point.model), Shape(_precision(point), point.pass_tokens)
    shape = replace(shape, recompute=point.recompute, packed=point.packed)
    return step_memory(sizes, adapter_of(point.technique), shape).peak


def test_memory_is_within_a_seventh_of_what_was_measured(points: dict[Point, Measured]) -> None:
    """All techniques, passes of 64 to 8,192 tokens, weights packed or not, layers computed again or not."""
    off = {p.name: _predicted(p) / m.peak - 1 for p, m in points.items()}
    assert median(map(abs, off.values())) < 0.045
    assert {name: it for name, it in off.items() if abs(it) > 0.15} == {}


def test_memory_on_a_gpu_is_within_a_tenth_of_what_was_measured() -> None:
    """Eight layers of Phi-4-mini's width, 16 rows of 512 tokens (scripts/check_gpu.py)."""
    sizes = Sizes("phi3", 3072, 8, 24, 8, 128, 8192, 100_352, 4096)
    off: dict[str, float] = {}
    for line in json.loads(GPU.read_text(encoding="utf-8"))["speed"]:
        kind, _, more = line["name"].partition(", ")
        if kind in TECHNIQUES:
            shape = Shape(more if more in ("nf4", "int8") else "bf16", 8192, "cuda")
            off[line["name"]] = step_memory(sizes, adapter_of(kind), shape).peak / 2**30 / line["peak_gib"] - 1
    assert len(off) == 17
    assert median(map(abs, off.values())) < 0.02
    assert {name: it for name, it in off.items() if abs(it) > 0.1} == {}


def test_time_is_within_a_quarter_of_what_was_measured(points: dict[Point, Measured]) -> None:
    """Passes of 256 tokens and more: the last of three steps, at a speed of the core that was not taken down, so that one speed is
    taken for all."""
    off: dict[str, float] = {}
    for point, measured in points.items():
        if point.pass_tokens < 256:
            continue
        sizes, spec = Sizes.of(SHAPES[point.model].config, point.model), adapter_of(point.technique)
        shape = Shape(_precision(point), point.pass_tokens, recompute=point.recompute, packed=point.packed)
        work = Work(point.pass_tokens, 1, point.pass_tokens, scored=point.pass_tokens // 2, row_tokens=point.tokens)
        off[point.name] = seconds_of(training_amounts(sizes, spec, shape, work), shape.precision) / measured.cpu_s
    usual = median(off.values())
    assert 0.8 < usual < 1.25
    assert median(abs(it / usual - 1) for it in off.values()) < 0.08
    assert {name: it / usual for name, it in off.items() if abs(it / usual - 1) > 0.25} == {}


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
        ("microsoft/Phi-3-medium-4k-instruct", 13_960_238_080),
        ("microsoft/phi-4", 14_659_507_200),
        ("microsoft/Phi-4-mini-instruct", 3_836_021_760),
    ],
)
def test_phi_models_have_their_published_number_of_parameters(name: str, numbers: int) -> None:
    """As the hub's pages count their safetensors files."""
    assert Sizes.of(PHI[name].config, name).numbers == numbers


def test_what_stays_is_counted_exactly() -> None:
    sizes = Sizes.of(PHI["microsoft/Phi-3-mini-4k-instruct"].config, "phi")
    lora, full = step_memory(sizes, LoraSpec(), Shape("bf16", 512)), step_memory(sizes, FullSpec(), Shape("bf16", 512))
    assert (lora.weights, lora.adapter, lora.moments) == (2 * 3_821_079_552, 4 * 25_165_824, 8 * 25_165_824)
    assert (full.weights, full.adapter, full.moments) == tuple(n * 3_821_079_552 for n in (2, 4, 8))
    coded = step_memory(sizes, LoraSpec(), Shape("nf4", 512)).weights
    assert coded == pytest.approx(2.26e9, rel=0.02)  # docs/LOG.md: loaded


@pytest.mark.parametrize(("stage", "divided"), [(1, {"adapter", "moments"}), (2, {"adapter", "moments", "gradients"})])
def test_each_stage_divides_what_it_says(stage: int, divided: set[str]) -> None:
    sizes = Sizes.of(SHAPES["71m"].config, "71m")
    # DeepSpeed trains float32 weights of its own, as a base in 16 bits needs them anyway: `adapter`.
    alone = step_memory(sizes, FullSpec(), Shape("fp32", 64, processes=1, zero_stage=stage))
    assert alone.adapter == alone.weights
    shared = step_memory(sizes, FullSpec(), Shape("fp32", 64, processes=4, zero_stage=stage))
    for part in ("weights", "adapter", "gradients", "moments"):
        expected = getattr(alone, part) / (4 if part in divided else 1)
        assert getattr(shared, part) == pytest.approx(expected), part


def test_three_stages_divide_everything_that_stays() -> None:
    sizes = Sizes.of(SHAPES["71m"].config, "71m")
    one, four = (step_memory(sizes, FullSpec(), Shape("bf16", 64, processes=n, zero_stage=3)) for n in (1, 4))
    for part in ("weights", "adapter", "gradients", "moments"):
        assert getattr(four, part) == pytest.approx(getattr(one, part) / 4)
