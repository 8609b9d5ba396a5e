"""PiSSA, OLoRA, EVA and LoRA+ against PEFT, and what holds for every start: the tuned model starts as the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.utils.incremental_pca import IncrementalPCA

import tiny
from kivnun.data.packing import pack
from kivnun.errors import BaseModelError, DataError
from kivnun.model.adapter_folder import load_peft
from kivnun.model.adapters import LowRankAdapter
from kivnun.model.load import Base, load_base
from kivnun.model.starts import Directions
from kivnun.spec import DoraSpec, LoraSpec
from kivnun.train.new_weights import new_weights
from kivnun.train.weights import AdapterWeights

TinyBase = Callable[[str], Path]
RANK, ALPHA = 4, 6.0
ROWS = [tiny.random_ids(length) for length in (3, 17, 30)]
STARTS = ["pissa", "olora", "eva"]


def started(base: Base, init: str, kind: type[LoraSpec] | type[DoraSpec] = LoraSpec, **options: Any) -> AdapterWeights:
    spec = kind(rank=RANK, alpha=ALPHA, init=init, **options)  # type: ignore[arg-type]
    weights = new_weights(spec, base, tiny.random_rows((30, 20, 25)), 10, seed=3)
    assert isinstance(weights, AdapterWeights)
    return weights


def sites_of(weights: AdapterWeights) -> dict[str, Any]:
    assert isinstance(weights.adapter, LowRankAdapter)
    return weights.adapter.sites


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
@pytest.mark.parametrize("kind", [LoraSpec, DoraSpec])
@pytest.mark.parametrize("init", STARTS)
def test_the_tuned_model_starts_as_the_base(init: str, kind: Any, precision: str, tiny_base: TinyBase) -> None:
    base = load_base(tiny_base("phi3"), precision)
    weights = started(base, init, kind)
    plain = tiny.packed_logits(base, ROWS)
    with base.using(weights.sites()):
        begun = tiny.packed_logits(base, ROWS)
    near = 2e-6 if precision == "fp32" else 2e-2 if kind is LoraSpec else 4e-2  # bfloat16 has steps of 2^-8
    assert max(map(tiny.relative_difference, begun, plain)) < near


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_and_b_start_as_pefts(init: str, tiny_base: TinyBase) -> None:
    """Up to the signs of the directions, which cancel: scaling * B A and what each of A and B spans are PEFT's."""
    folder = tiny_base("phi3")
    base = load_base(folder, "fp32")
    weights = started(base, init)
    config = peft.LoraConfig(r=RANK, lora_alpha=6, init_lora_weights=init, target_modules="all-linear", task_type="CAUSAL_LM")  # type: ignore[arg-type]
    theirs: Any = peft.get_peft_model(tiny.reference(folder), config)
    for name, site in sites_of(weights).items():
        layer = theirs.base_model.model.get_submodule(name)
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        assert tiny.relative_difference(site.b_OR @ site.a_RI, b @ a) < 1e-5, name
        assert tiny.relative_difference(site.a_RI.T @ site.a_RI, a.T @ a) < 1e-5, name
        assert tiny.relative_difference(base.linears[name].dense() - site.scaling * b @ a, layer.base_layer.weight) < 1e-5, name


@pytest.mark.parametrize("kind", [LoraSpec, DoraSpec])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_training_from_a_start_is_pefts(init: str, kind: Any, tiny_base: TinyBase) -> None:
    """PEFT takes the start out of the base, we take it off again: the losses of a few steps are the same."""
    folder, rows = tiny_base("phi3"), tiny.random_rows((9, 7, 30))
    base = load_base(folder, "fp32")
    trainee = tiny.new_trainee(base, started(base, init, kind))
    config = peft.LoraConfig(
        r=RANK, lora_alpha=6, init_lora_weights=init, use_dora=kind is DoraSpec, target_modules="all-linear", task_type="CAUSAL_LM"  # type: ignore[arg-type]
    )  # fmt: skip
    model: Any = peft.get_peft_model(tiny.reference(folder), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    total = sum(row.total_weight for row in rows)
    for _ in range(5):
        ours = trainee.forward_backward(pack(rows), total)
        trainee.optim_step(1e-3)
        loss = tiny.reference_loss(model, rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert ours == pytest.approx(float(loss.detach()), rel=2e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", [LoraSpec, DoraSpec])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_is_written_is_plain_and_of_twice_the_rank(
    init: str, kind: Any, rslora: bool, tiny_base: TinyBase, tmp_path: Path
) -> None:
    folder = tiny_base("phi3")
    base = load_base(folder, "fp32")
    weights = started(base, init, kind, rslora=rslora)
    with torch.no_grad():
        for site in sites_of(weights).values():
            site.b_OR.add_(torch.randn(site.b_OR.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    weights.export(tmp_path, str(folder))
    with base.using(weights.sites()):
        ours = tiny.packed_logits(base, ROWS)
    theirs = peft.PeftModel.from_pretrained(tiny.reference(folder), tmp_path).eval()
    again = load_peft(base, tmp_path)
    with base.using(again.sites):
        reloaded = tiny.packed_logits(base, ROWS)
    for ids, logits, same in zip(ROWS, ours, reloaded, strict=True):
        assert tiny.relative_difference(logits, tiny.reference_logits(theirs, ids)) < 3e-6
        assert torch.equal(logits, same)
    assert theirs.peft_config["default"].r == 2 * RANK  # type: ignore[union-attr]


def test_a_merge_takes_the_start_off(tiny_base: TinyBase) -> None:
    base = load_base(tiny_base("phi3"), "fp32")
    for name, site in sites_of(started(base, "pissa")).items():
        assert tiny.relative_difference(site.merged(base.linears[name].dense()), base.linears[name].dense()) < 1e-6


def test_directions_are_those_of_all_rows_at_once() -> None:
    draws = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 24, generator=draws) @ torch.diag(torch.linspace(3, 0.01, 24)) + torch.randn(24, generator=draws)
    seen = Directions(keep=24)
    for part in rows.split([7, 100, 93, 100]):
        seen.add(part)
    _, s, v = torch.linalg.svd((rows - rows.mean(0)).double(), full_matrices=False)
    assert torch.allclose(seen.spread_K[:20], s[:20], rtol=1e-6)
    overlap = (seen.directions_KI[:8] @ v[:8].T).abs()
    assert torch.allclose(overlap.diagonal(), torch.ones(8, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(seen.mean_I, rows.double().mean(0), atol=1e-6)


def test_eva_finds_pefts_directions(tiny_base: TinyBase) -> None:
    """What the layers see is taken from transformers' own forward, and put through the analysis that PEFT uses."""
    folder = tiny_base("phi3")
    base, rows = load_base(folder, "fp32"), tiny.random_rows((30, 20, 25))
    weights = started(base, "eva")
    model = tiny.reference(folder)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in weights.sites()}
    for name, seen in inputs.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0][0].detach()))
    for row in rows:
        tiny.reference_logits(model, row.ids.tolist())
    for name, site in sites_of(weights).items():
        theirs = IncrementalPCA(n_components=RANK).partial_fit(torch.cat(inputs[name]))
        assert torch.allclose((site.a_RI @ theirs.components_.float().T).abs(), torch.eye(RANK), atol=2e-3), name
        assert not site.b_OR.any()


def test_eva_looks_at_rows_drawn_by_the_seed(tiny_base: TinyBase) -> None:
    base, rows = load_base(tiny_base("phi3"), "fp32"), tiny.random_rows((5,) * 600)
    spec = LoraSpec(rank=2, alpha=4.0, init="eva")
    one, same, other = (new_weights(spec, base, rows, 3000, seed).parameters() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_eva_says_when_rows_show_too_little(tiny_base: TinyBase) -> None:
    base = load_base(tiny_base("phi3"), "fp32")
    with pytest.raises(DataError, match="varies along fewer directions"):
        new_weights(LoraSpec(rank=40, alpha=4.0, init="eva"), base, tiny.random_rows((3,)), 10, seed=0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_rank_above_the_weights_is_refused(init: Any, tiny_base: TinyBase) -> None:
    base = load_base(tiny_base("phi3"), "fp32")
    with pytest.raises(BaseModelError, match=r"rank 60, but model\.layers\.0\..* is a matrix of"):
        new_weights(LoraSpec(rank=60, alpha=4.0, init=init), base, [], 10, seed=0)


def test_lora_plus_trains_b_as_pefts_optimizer_does(tiny_base: TinyBase) -> None:
    folder, rows = tiny_base("phi3"), tiny.random_rows((9, 7, 30))
    base = load_base(folder, "fp32")
    weights = tiny.new_weights(base)
    weights._ratio = 8.0
    trainee = tiny.new_trainee(base, weights)
    model: Any = tiny.peft_twin(folder, weights.adapter)
    options = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "weight_decay": 0.0, "loraplus_weight_decay": 0.0}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **options)  # type: ignore[arg-type]
    total = sum(row.total_weight for row in rows)
    for _ in range(5):
        trainee.forward_backward(pack(rows), total)
        trainee.optim_step(1e-3)
        tiny.reference_loss(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs = dict(model.named_parameters())
    for name, parameter in weights.parameters().items():
        assert tiny.relative_difference(parameter, theirs[tiny.peft_name(name)]) < 1e-4, name
