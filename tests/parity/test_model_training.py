"""Whole updates against plain loops over transformers and PEFT: one step of full tuning, twenty of LoRA; what a state keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import tiny
from kivnun.data.packing import pack
from kivnun.data.rows import TokenRow
from kivnun.errors import IntegrityError
from kivnun.model.load import load_base
from kivnun.train.engine import TorchEngine, Trainee
from kivnun.train.objectives import LikelihoodObjective
from kivnun.train.optim import AdamWSettings, MuonSettings
from kivnun.train.weights import FullWeights

TinyBase = Callable[[str], Path]
DECAYING = AdamWSettings(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
MUON = MuonSettings(momentum=0.9, weight_decay=0.1, adamw_share=0.5, adamw=DECAYING)


def _batches(steps: int) -> list[list[TokenRow]]:
    return [[tiny.token_row(tiny.random_ids(length, step), at) for at, length in enumerate((3, 9, 21))] for step in range(steps)]


def _train(trainee: Trainee, batches: Sequence[list[TokenRow]], rate: float) -> list[float]:
    losses = []
    for rows in batches:
        total = sum(row.total_weight for row in rows)
        parts = ([rows[0]], rows[1:])  # two micro-batches, as memory would have it
        losses.append(sum(trainee.forward_backward(pack(part), total) for part in parts))
        trainee.optim_step(rate)
    return losses


def _plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[list[TokenRow]]) -> list[float]:
    losses = []
    for rows in batches:
        loss = tiny.reference_loss(model, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", ["phi3", "phi3_tied", "qwen2"])
def test_full_tuning_is_a_plain_loop_over_transformers(name: str, tiny_base: TinyBase):
    folder = tiny_base(name)
    base = load_base(folder, "fp32")
    trainee = TorchEngine(base).open(FullWeights(base), LikelihoodObjective(), DECAYING, 1.0)
    model = tiny.reference(folder)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    # A rate and an eps that keep Adam's first steps a smooth function of the gradient.
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    assert _train(trainee, _batches(3), 1e-3) == pytest.approx(_plain_loop(model, optimizer, _batches(3)), rel=1e-5)
    theirs = dict(model.named_parameters())
    for key, parameter in base.model.named_parameters():
        if not key.endswith("k_proj.bias"):  # its true gradient is zero: Adam makes steps of what rounding leaves
            assert tiny.relative_difference(parameter, theirs[key]) < 1e-5, key


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_twenty_steps_have_the_losses_of_a_plain_loop_over_peft(kind: str, tiny_base: TinyBase):
    folder = tiny_base("phi3")
    base = load_base(folder, "fp32")
    weights = tiny.new_weights(base, kind)  # type: ignore[arg-type]
    model = tiny.peft_twin(folder, weights.adapter)
    trainee = tiny.new_trainee(base, weights, max_grad_norm=1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    losses = _train(trainee, _batches(20), 2e-3)
    assert losses == pytest.approx(_plain_loop(model, optimizer, _batches(20)), rel=1e-5)


def test_a_bfloat16_base_adds_up_updates_too_small_for_it(tiny_base: TinyBase):
    """A norm's weight near 1 cannot move by 1e-5 in bfloat16; its float32 master can, two hundred times."""
    base = load_base(tiny_base("phi3"), "bf16")
    trainee = tiny.new_trainee(base, FullWeights(base))
    name = "model.norm.weight"
    live, master = dict(base.model.named_parameters())[name], trainee.weights.parameters()[name]
    assert live.dtype == torch.bfloat16
    assert master.dtype == torch.float32
    before = master.detach().clone()
    batch = pack(tiny.random_rows((6,)))
    trainee.forward_backward(batch, 6.0)
    trainee.optim_step(1e-5)
    assert torch.equal(live, before.bfloat16())
    assert (master != before).all()
    for _ in range(150):
        master.grad = torch.ones_like(master)
        trainee.optim_step(1e-4)
    assert float((before - master).detach().min()) > 0.01
    assert torch.equal(live, master.detach().bfloat16())
    assert (live != before.bfloat16()).all()


def test_gradients_of_a_bfloat16_base_are_added_in_float32(tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), "bf16")
    trainee = tiny.new_trainee(base, FullWeights(base))
    batch = pack(tiny.random_rows((6,)))
    trainee.forward_backward(batch, 6.0)
    once = tiny.gradients(trainee)
    trainee.forward_backward(batch, 6.0)
    trainee.forward_backward(batch, 6.0)
    for name, gradient in tiny.gradients(trainee).items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, once[name] * 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("settings", [DECAYING, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full", "full_bf16"])
def test_a_state_saved_and_loaded_goes_on_to_the_bit(kind: str, settings: AdamWSettings, tiny_base: TinyBase, tmp_path: Path):
    def fresh() -> tuple[nn.Module, Trainee]:
        base = load_base(tiny_base("phi3"), "bf16" if kind == "full_bf16" else "fp32")
        weights = FullWeights(base) if kind.startswith("full") else tiny.new_weights(base, kind, dropout=0.2)  # type: ignore[arg-type]
        return base.model, TorchEngine(base).open(weights, LikelihoodObjective(), settings, 1.0)

    model, straight = fresh()
    _train(straight, _batches(2), 1e-2)
    straight.save(tmp_path)
    after = _train(straight, _batches(5)[2:], 1e-2)
    other_model, resumed = fresh()
    _train(resumed, _batches(1), 0.5)  # whatever it had become
    resumed.load(tmp_path)
    assert resumed.steps == 2
    assert _train(resumed, _batches(5)[2:], 1e-2) == after
    for name, parameter in straight.weights.parameters().items():
        assert torch.equal(parameter, resumed.weights.parameters()[name]), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other_model.named_parameters())[name]), name


def test_a_state_that_does_not_fit_is_refused(tiny_base: TinyBase, tmp_path: Path):
    base = load_base(tiny_base("phi3"), "fp32")
    tiny.new_trainee(base, tiny.new_weights(base)).save(tmp_path)
    for other in (tiny.new_weights(base, rank=5), tiny.new_weights(base, rank=1), tiny.new_weights(base, targets=["o_proj"])):
        with pytest.raises(IntegrityError, match="does not fit"):
            tiny.new_trainee(base, other).load(tmp_path)


def test_muon_leaves_tables_and_vectors_to_adamw(tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), "fp32")
    trainee = TorchEngine(base).open(FullWeights(base), LikelihoodObjective(), MUON, None)
    before = {name: p.detach().clone() for name, p in trainee.weights.parameters().items()}
    _train(trainee, _batches(1), 1e-2)
    state = trainee._optimizer.state()
    moments = {name: {key.split("/", 1)[0] for key in state if key.split("/", 1)[1] == name} for name in before}
    for name, parameter in before.items():
        table = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert moments[name] == ({"step", "exp_avg", "exp_avg_sq"} if table or parameter.ndim < 2 else {"momentum_buffer"}), name
        change = trainee.weights.parameters()[name].detach() - parameter * (
            1 - 1e-2 * (0.05 if table else 0.1) * (parameter.ndim == 2)
        )
        largest = float(change.abs().max())
        # AdamW's first step is the rate, times the share of what is not Muon's.
        assert largest == pytest.approx(5e-3, rel=0.05) if table or parameter.ndim < 2 else largest > 1e-3, name


@pytest.mark.parametrize("name", ["phi3", "phi3_tied", "gemma2"])
def test_a_tuned_model_opens_in_transformers_with_its_logits(name: str, tiny_base: TinyBase, tmp_path: Path):
    base = load_base(tiny_base(name), "fp32")
    trainee = tiny.new_trainee(base, FullWeights(base))
    _train(trainee, _batches(2), 1e-2)
    trainee.export(tmp_path, "base")
    ids = tiny.random_ids(15)
    expected = tiny.reference_logits(tiny.reference(tmp_path), ids)
    assert tiny.relative_difference(tiny.packed_logits(base, [ids])[0], expected) < 1e-6
    assert tiny.relative_difference(tiny.reference_logits(tiny.reference(tiny_base(name)), ids), expected) > 1e-2
    assert "kivnun" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == base.name


def test_training_an_adapter_leaves_the_base_as_it_was(tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), "fp32")
    before = copy.deepcopy(base.model.state_dict())
    trainee = tiny.new_trainee(base, tiny.new_weights(base, "dora"))
    plain = TorchEngine(base).base_model()
    batch = pack(_batches(1)[0])
    scores = plain.forward(batch)
    _train(trainee, _batches(3), 1e-2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert (plain.forward(batch) == scores).all()
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())


def test_two_adapters_in_turn_on_one_base_train_as_each_alone(tiny_base: TinyBase):
    def open_one(base: object, kind: str, rank: int) -> Trainee:
        return tiny.new_trainee(base, tiny.new_weights(base, kind, rank=rank))  # type: ignore[arg-type]

    shared = load_base(tiny_base("phi3"), "fp32")
    both = [open_one(shared, "lora", 3), open_one(shared, "dora", 5)]
    together: list[list[float]] = [[], []]
    for rows in _batches(4):
        for index, trainee in enumerate(both):
            together[index] += _train(trainee, [rows], 1e-2 * (index + 1))
    for index, (kind, rank) in enumerate((("lora", 3), ("dora", 5))):
        alone = open_one(load_base(tiny_base("phi3"), "fp32"), kind, rank)
        assert _train(alone, _batches(4), 1e-2 * (index + 1)) == together[index]
        for name, parameter in alone.weights.parameters().items():
            assert torch.equal(parameter, both[index].weights.parameters()[name])
