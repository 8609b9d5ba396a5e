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
from kivnun.plan.time import Work, cpu_seconds
from kivnun.spec.adapters import FullSpec, LoraSpec

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SURFACE, GPU = RESULTS / "matrix_memory_2026-11-27", RESULTS / "gpu_2026-11-27.json"


@pytest.fixture(scope="module")
def points() -> dict[Point, Measured]:
    found = {p: m for p, m in Surface.load(SURFACE).points.items() if p.kernels == "auto" and not p.packed}
    assert len(found) > 100
    return found


def _precision(point: Point) -> str:
    return "nf4" if TECHNIQUES[point.technique].coded else point.precision


def _predicted(point: Point) -> float:
    sizes, shape = Sizes.of(SHAPES[point.model].config, point.model), Shape(_precision(point), point.pass_tokens)
    shape = replace(shape, recompute=point.recompute)
    return step_memory(sizes, adapter_of(point.technique), shape).peak


def test_memory_is_within_a_tenth_of_what_was_measured(points: dict[Point, Measured]) -> None:
    """Where a pass has 256 tokens or more; LoHa and LoKr hold whole updates, and are farther off in short passes."""
    off = {p.name: _predicted(p) / m.peak - 1 for p, m in points.items() if p.pass_tokens >= 256 and not p.recompute}
    usual = {name: it for name, it in off.items() if "-loha-" not in name and "-lokr-" not in name}
    assert median(map(abs, off.values())) < 0.04
    assert {name: it for name, it in usual.items() if abs(it) > 0.14} == {}
    assert {name: it for name, it in off.items() if abs(it) > 0.2} == {}


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


def test_memory_of_layers_computed_again(points: dict[Point, Measured]) -> None:
    off = {p.name: _predicted(p) / m.peak - 1 for p, m in points.items() if p.recompute}
    assert len(off) >= 9
    assert {name: it for name, it in off.items() if abs(it) > 0.27} == {}


def test_time_is_within_a_quarter_of_what_was_measured(points: dict[Point, Measured]) -> None:
    """For LoRA, QLoRA and full tuning, whose law has no factor of their own, in passes of 1,024 tokens or more."""
    off: dict[str, float] = {}
    for point, measured in points.items():
        if point.technique in ("lora", "qlora", "full") and point.pass_tokens >= 1024 and not point.recompute:
            sizes, work = Sizes.of(SHAPES[point.model].config, point.model), Work(point.pass_tokens, 1, point.pass_tokens)
            seconds = cpu_seconds(sizes, adapter_of(point.technique), _precision(point), work, slower=1.0, speed=1.0)
            off[point.name] = seconds / measured.cpu_s - 1
    assert len(off) >= 20
    assert median(map(abs, off.values())) < 0.08
    assert {name: it for name, it in off.items() if abs(it) > 0.25} == {}


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


@pytest.mark.parametrize(("stage", "divided"), [(1, {"moments"}), (2, {"moments", "gradients"})])
def test_each_stage_divides_what_it_says(stage: int, divided: set[str]) -> None:
    sizes = Sizes.of(SHAPES["71m"].config, "71m")
    alone = step_memory(sizes, FullSpec(), Shape("fp32", 64))
    shared = step_memory(sizes, FullSpec(), Shape("fp32", 64, processes=4, zero_stage=stage))
    for part in ("weights", "adapter", "gradients", "moments"):
        expected = getattr(alone, part) / (4 if part in divided else 1)
        assert getattr(shared, part) == pytest.approx(expected), part


def test_three_stages_divide_everything_that_stays() -> None:
    sizes = Sizes.of(SHAPES["71m"].config, "71m")
    one, four = (step_memory(sizes, FullSpec(), Shape("bf16", 64, processes=n, zero_stage=3)) for n in (1, 4))
    for part in ("weights", "adapter", "gradients", "moments"):
        assert getattr(four, part) == pytest.approx(getattr(one, part) / 4)
