"""Every adapter that a spec may name, in every precision, on CUDA: what the CPU computes, in any packs, saved, evaluated between.

An adapter starts as on the CPU (the state is carried over), so that what is compared is the device's arithmetic alone. In 16 bits
the measure is float32 with the same weights: the device may be as far from it as the CPU is in 16 bits, with room for chance.
Next: `test_whole_gpu.py` (whole runs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from kivnun.data.packing import pack
from kivnun.data.rows import TokenRow
from kivnun.model.generate import SamplingParams
from kivnun.model.load import Base, load_base, load_decoded
from kivnun.spec import (
    AdaloraSpec,
    AdapterSpec,
    DoraSpec,
    FullSpec,
    Ia3Spec,
    LnTuningSpec,
    LohaSpec,
    LokrSpec,
    LoraSpec,
    PrefixSpec,
    PromptSpec,
    VeraSpec,
)
from kivnun.train.engine import Trainee
from kivnun.train.new_weights import new_weights

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is false"),
]

TinyBase = Callable[[str], Path]
LOW_RANK = {"rank": 3, "alpha": 7.0}
KINDS: dict[str, AdapterSpec] = {
    "full": FullSpec(),
    "lora": LoraSpec(**LOW_RANK),
    "rslora": LoraSpec(**LOW_RANK, rslora=True),
    "lora_plus": LoraSpec(**LOW_RANK, loraplus_lr_ratio=4.0),
    "pissa": LoraSpec(**LOW_RANK, init="pissa"),
    "olora": LoraSpec(**LOW_RANK, init="olora"),
    "eva": LoraSpec(**LOW_RANK, init="eva"),
    "dora": DoraSpec(**LOW_RANK),
    "dora_pissa": DoraSpec(**LOW_RANK, init="pissa"),
    "ia3": Ia3Spec(),
    "loha": LohaSpec(**LOW_RANK),
    "lokr": LokrSpec(**LOW_RANK),
    "vera": VeraSpec(rank=16),
    "adalora": AdaloraSpec(rank=4, target_rank=2, alpha=9.0),
    "ln_tuning": LnTuningSpec(),
    "prompt": PromptSpec(num_virtual_tokens=5),
    "prefix": PrefixSpec(num_virtual_tokens=5),
}
VIRTUAL = ("prompt", "prefix")
STEPS, RATE = 4, 1e-3
CASES = [
    (kind, precision)
    for kind in KINDS
    for precision in ("fp32", "bf16", "int8", "nf4")
    if kind != "full" or precision in ("fp32", "bf16")
]
every_case = pytest.mark.parametrize(("kind", "precision"), CASES)
# Relative differences: float32 by the order of sums; losses in 16 bits as in test_gpu.py.
EXACT, LOSS = 1e-4, {"fp32": 1e-4, "bf16": 3e-2, "int8": 3e-2, "nf4": 3e-2}
SAME = {"fp32": 1e-5, "bf16": 2e-2, "int8": 2e-2, "nf4": 2e-2}  # the same work on the same device, sums in any order


@dataclass(frozen=True)
class Known:
    """What the CPU says: a folder with the state to start from, gradients of the first step and losses, exact and in precision."""

    start: Path
    exact: dict[str, Tensor]
    rounded: dict[str, Tensor]
    losses: list[float]


def rows_of(step: int) -> list[TokenRow]:
    return [tiny.token_row(tiny.random_ids(length, step), at) for at, length in enumerate((2, 9, 60))]


def new(kind: str, base: Base) -> Trainee:
    return tiny.new_trainee(base, new_weights(KINDS[kind], base, tiny.random_rows((1, 7, 30)), STEPS, seed=3), max_grad_norm=1.0)


def stirred(kind: str, base: Base) -> Trainee:
    """Return a trainee with every trained number of an adapter moved away from its start, so that each has a gradient."""
    trainee, draws = new(kind, base), torch.Generator().manual_seed(1)
    if kind != "full":
        with torch.no_grad():
            for parameter in trainee.weights.parameters().values():
                parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.1)
    return trainee


def begun(kind: str, base: Base, start: Path) -> Trainee:
    trainee = new(kind, base)
    trainee.load(start)
    return trainee


def gradient(trainee: Trainee, step: int, apart: bool = False) -> dict[str, Tensor]:
    """Return a step's gradient, its rows in one pack or each alone, and take no step."""
    rows = rows_of(step)
    total = sum(row.total_weight for row in rows)
    for part in [[row] for row in rows] if apart else [rows]:
        trainee.forward_backward(pack(part), total)
    found = tiny.gradients(trainee)
    trainee._clear()
    return found


def take(trainee: Trainee, first: int, last: int) -> list[float]:
    """Take steps in two packs each; return their losses."""
    losses = []
    for step in range(first, last):
        rows = rows_of(step)
        total = sum(row.total_weight for row in rows)
        losses.append(sum(trainee.forward_backward(pack(part), total) for part in (rows[:1], rows[1:])))
        trainee.optim_step(RATE)
    return losses


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the relative difference of two gradients, all their tensors as one vector."""
    assert found.keys() == expected.keys()
    ours, theirs = (torch.cat([tensors[name].cpu().float().flatten() for name in expected]) for tensors in (found, expected))
    return tiny.relative_difference(ours, theirs)


@pytest.fixture(scope="module")
def known(tiny_base: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Known]:
    made: dict[tuple[str, str], Known] = {}

    def make(kind: str, precision: str) -> Known:
        if (kind, precision) not in made:
            folder, start = tiny_base("phi4_mini"), tmp_path_factory.mktemp(f"{kind}_{precision}")
            rounded = stirred(kind, load_base(folder, precision))
            rounded.save(start)
            quantised = precision in ("int8", "nf4")
            exact = begun(kind, load_decoded(folder, precision) if quantised else load_base(folder, "fp32"), start)
            gradients = gradient(exact, 0), gradient(rounded, 0)
            made[kind, precision] = Known(start, *gradients, take(exact, 0, STEPS))
        return made[kind, precision]

    return make


def on_device(kind: str, precision: str, start: Path, tiny_base: TinyBase) -> Trainee:
    return begun(kind, load_base(tiny_base("phi4_mini"), precision, DEVICE), start)


@every_case
def test_gradients_are_those_of_the_cpu_in_any_packs(
    kind: str, precision: str, known: Callable[[str, str], Known], tiny_base: TinyBase
) -> None:
    cpu = known(kind, precision)
    trainee = on_device(kind, precision, cpu.start, tiny_base)
    limit = EXACT if precision == "fp32" else 1.5 * distance(cpu.rounded, cpu.exact) + 0.02
    together, apart = gradient(trainee, 0), gradient(trainee, 0, apart=True)
    assert distance(together, cpu.exact) < limit
    assert distance(apart, cpu.exact) < limit
    if precision == "fp32":
        assert distance(apart, together) < 5e-5
        for name, tensor in together.items():
            assert tiny.relative_difference(tensor, cpu.exact[name]) < 10 * EXACT, name


@every_case
def test_steps_have_the_losses_of_the_cpu(
    kind: str, precision: str, known: Callable[[str, str], Known], tiny_base: TinyBase
) -> None:
    cpu = known(kind, precision)
    losses = take(on_device(kind, precision, cpu.start, tiny_base), 0, STEPS)
    assert losses == pytest.approx(cpu.losses, rel=LOSS[precision])


@every_case
def test_it_starts_as_the_base_on_the_device(kind: str, precision: str, tiny_base: TinyBase) -> None:
    """Made on the device itself: starts that look at weights (PiSSA, OLoRA) or inputs (EVA) compute there."""
    base = load_base(tiny_base("phi4_mini"), precision, DEVICE)
    plain = tiny.packed_logits(base, [tiny.random_ids(30)])[0]
    trainee = new(kind, base)
    for name, parameter in trainee.weights.parameters().items():
        assert parameter.device.type == DEVICE, name
        assert parameter.dtype == torch.float32, name
    with base.using(trainee.weights.sites()):
        logits = tiny.packed_logits(base, [tiny.random_ids(30)])[0]
    assert bool(torch.isfinite(logits).all())
    if kind not in VIRTUAL:
        assert tiny.relative_difference(logits, plain) < (1e-4 if precision == "fp32" else 4e-2)


@every_case
def test_a_saved_state_takes_the_same_next_step(
    kind: str, precision: str, known: Callable[[str, str], Known], tiny_base: TinyBase, tmp_path: Path
) -> None:
    start = known(kind, precision).start
    straight, resumed = (on_device(kind, precision, start, tiny_base) for _ in range(2))
    take(straight, 0, 2)
    straight.save(tmp_path)
    resumed.load(tmp_path)
    for name, parameter in straight.weights.parameters().items():
        assert torch.equal(parameter, resumed.weights.parameters()[name]), name
    for name, moment in resumed.moments.items():
        assert torch.equal(moment, straight.moments[name]), name
        assert name.startswith("step/") or moment.device.type == DEVICE, name
    for name, tensor in straight.weights.state().items():
        assert torch.equal(tensor, resumed.weights.state()[name]), name
    assert take(resumed, 2, 3) == pytest.approx(take(straight, 2, 3), rel=1e-6 if precision == "fp32" else 1e-3)
    # An AdamW step moves a number by at most the rate (or that times LoRA+'s ratio), and by its sign where it is near zero.
    for name, parameter in straight.weights.parameters().items():
        assert float((parameter - resumed.weights.parameters()[name]).abs().max()) < 10 * RATE, name
        assert tiny.relative_difference(resumed.weights.parameters()[name], parameter) < (1e-4 if precision == "fp32" else 2e-2), (
            name
        )


@every_case
def test_an_evaluation_within_a_step_changes_no_gradient(
    kind: str, precision: str, known: Callable[[str, str], Known], tiny_base: TinyBase
) -> None:
    trainee = on_device(kind, precision, known(kind, precision).start, tiny_base)
    rows, found = rows_of(0), []
    for evaluate in (False, True, False):
        trainee.forward_backward(pack(rows[:2]), 69.0)
        if evaluate:
            trainee.forward(pack(rows_of(1)))
            trainee.sample([tiny.random_ids(4)], SamplingParams(3, ()))
        trainee.forward_backward(pack(rows[2:]), 69.0)
        found.append(tiny.gradients(trainee))
        trainee._clear()
    again = distance(found[2], found[0])  # what the device's own order of sums makes of it
    assert distance(found[1], found[0]) <= (SAME[precision] if again else 0.0)


@every_case
def test_answers_are_written_and_scores_are_numbers(
    kind: str, precision: str, known: Callable[[str, str], Known], tiny_base: TinyBase
) -> None:
    start = known(kind, precision).start
    trainee = on_device(kind, precision, start, tiny_base)
    prompts, params = [tiny.random_ids(length) for length in (3, 20)], SamplingParams(6, ())
    answers = trainee.sample(prompts, params)
    assert [len(answer) for answer in answers] == [6, 6]
    if precision == "fp32":
        assert answers == begun(kind, load_base(tiny_base("phi4_mini"), "fp32"), start).sample(prompts, params)


def test_adalora_gives_up_ranks_once_per_step_and_where_the_cpu_does(
    known: Callable[[str, str], Known], tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, left = known("adalora", "fp32").start, []
    for device in (DEVICE, "cpu"):
        trainee = begun("adalora", load_base(tiny_base("phi4_mini"), "fp32", device), start)
        model: Any = trainee.weights.adapter.model.base_model  # type: ignore[attr-defined]
        calls: list[int] = []
        whole = model.update_and_allocate
        monkeypatch.setattr(model, "update_and_allocate", lambda step, calls=calls, whole=whole: (calls.append(step), whole(step)))
        take(trainee, 0, STEPS)
        assert calls == [1, 2, 3, 4]
        left.append({name: (p != 0).cpu() for name, p in trainee.weights.parameters().items() if name.endswith("lora_E")})
    assert sum(int(kept.sum()) for kept in left[0].values()) == 2 * len(left[0])
    assert all(torch.equal(kept, left[1][name]) for name, kept in left[0].items())
