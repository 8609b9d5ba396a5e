"""Memory as it is measured: parts that add up, gradients and moments of the exact sizes, activations that grow with tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from kivnun.matrix.counts import count_config
from kivnun.matrix.memory import PARTS, Form, Measured, Point, ProbeFailed, Surface, measure
from kivnun.matrix.shapes import SHAPES, config_of
from kivnun.model.kernels import native_or_reason

LINE = [(2, 64), (4, 64), (4, 128)]
POINTS = [
    Point("9m", "full", "fp32", 2, 64),
    Point("9m", "full", "bf16", 2, 64),
    *(Point("9m", "lora", "bf16", *place) for place in LINE),
    Point("9m", "qlora", "bf16", 2, 64),
    Point("9m", "vera", "bf16", 2, 64),
    Point("9m", "lora", "bf16", 2, 64, packed=True),
]


@pytest.fixture(scope="module")
def surface(tmp_path_factory: pytest.TempPathFactory) -> Surface:
    return measure(tmp_path_factory.mktemp("surface"), POINTS)


def one(surface: Surface, technique: str, precision: str = "bf16", packed: bool = False) -> Measured:
    found = surface.of(technique, Form("9m", precision, packed=packed))
    return next(its for point, its in found.items() if (point.rows, point.tokens) == (2, 64))


def test_parts_are_all_there_and_add_up_to_the_peak(surface: Surface) -> None:
    for point, its in surface.points.items():
        assert set(its.parts) == set(PARTS), point.name
        assert sum(its.parts.values()) == its.peak
        assert min(its.parts.values()) >= 0
        assert its.cpu_s > 0
        assert its.wall_s > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_tuning_has_gradients_of_4_and_moments_of_8_bytes_a_number(precision: str, surface: Surface) -> None:
    its, numbers = one(surface, "full", precision), count_config("full", config_of(SHAPES["9m"])).trained
    assert its.trained == its.parameters == numbers
    assert its.whole["gradients"] == 4 * numbers
    assert its.whole["moments"] == 8 * numbers
    assert its.parts["weights"] == pytest.approx((4 if precision == "fp32" else 2) * numbers, rel=1e-3)
    assert its.parts["adapter"] == (0 if precision == "fp32" else 4 * numbers)  # float32 copies


@pytest.mark.parametrize("technique", ["lora", "qlora", "vera"])
def test_an_adapter_has_moments_for_what_it_trains_alone(technique: str, surface: Surface) -> None:
    its, counted = one(surface, technique), count_config(technique, config_of(SHAPES["9m"]))
    assert its.trained == counted.trained
    assert its.whole["moments"] == 8 * counted.trained
    assert its.whole["gradients"] == 4 * counted.trained
    assert its.parts["adapter"] == pytest.approx(counted.tensor_bytes, rel=0.02)  # VeRA's random matrices among them


def test_codes_and_packed_weights_are_counted_as_they_are_held(surface: Surface) -> None:
    plain = one(surface, "lora").parts["weights"]
    assert one(surface, "qlora").parts["weights"] < 0.5 * plain
    native = native_or_reason()
    if isinstance(native, str) or "bf16" not in native.packs():
        pytest.skip("nothing reads packed weights in bfloat16 on this processor")
    assert 1.5 * plain < one(surface, "lora", packed=True).parts["weights"] < 2.1 * plain


def test_activations_grow_in_step_with_tokens(surface: Surface) -> None:
    kept = [its.whole["activations"] for its in surface.of("lora", Form("9m", "bf16")).values()]
    assert kept[1] == pytest.approx(2 * kept[0], rel=1e-3)
    assert kept[2] == pytest.approx(4 * kept[0], rel=1e-3)


def test_adapters_learn_as_they_are_measured(surface: Surface) -> None:
    assert one(surface, "full").loss != one(surface, "lora").loss
    assert all(0 < its.loss < 20 for its in surface.points.values())


def test_what_a_process_says_before_it_fails_is_told(tmp_path: Path) -> None:
    wrong = Point("9m", "lora", "bf16", 2, 64, kernels="triton")
    with pytest.raises(ProbeFailed, match=r"2x64-0: BaseModelError: compute.kernels is triton"):
        measure(tmp_path, [wrong])
    assert list(tmp_path.iterdir()) == []
