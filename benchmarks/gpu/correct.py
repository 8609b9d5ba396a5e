"""First of all: does the device compute what transformers and PEFT compute in float64 on the CPU?

Small models of Phi-3's and Phi-4-mini's make, under LoRA and DoRA, in every precision. The reference has the weights that the base
computes with (rounded, or decoded from 4 bits), so that what is compared is arithmetic alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.engine.workload import Model
from benchmarks.gpu.shapes import config_of
from kivnun.data.packing import pack
from kivnun.data.rows import TokenRow, Where
from kivnun.model.adapters import AdapterShape, LowRankAdapter, new_adapter, resolve_targets
from kivnun.model.attention import Rows
from kivnun.model.load import Base, base_from_model
from kivnun.train.engine import TorchEngine
from kivnun.train.objectives import LikelihoodObjective
from kivnun.train.optim import AdamWSettings
from kivnun.train.weights import AdapterWeights

SMALL = Model(hidden=256, layers=2, heads=4, kv_heads=2, mlp=512, vocab=1003)
LENGTHS = (1, 2, 17, 64, 130)
# Relative differences of vectors: float32 by the order of sums, 16 bits by their eight digits. Unrelated vectors differ by 1.4.
TOLERANCES = {"fp32": {"logits": 1e-4, "gradients": 2e-4, "loss": 1e-5}, "bf16": {"logits": 4e-2, "gradients": 8e-2, "loss": 5e-3}}


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: what, how far it is off, and how far it may be."""

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # false for NaN

    def __str__(self) -> str:
        return f"{'ok   ' if self.passed else 'WRONG'} {self.difference:9.2e} (at most {self.tolerance:.0e})  {self.name}"


def check_all(device: str, precisions: tuple[str, ...] = ("fp32", "bf16", "nf4")) -> list[Check]:
    """Return every comparison; nothing may be measured unless all have passed."""
    made = {"Phi-3": False, "Phi-4-mini": True}
    return [
        check
        for name, longrope in made.items()
        for precision in precisions
        for kind in ("lora", "dora")
        for check in _checks(name, longrope, precision, kind, device)
    ]


def _checks(name: str, longrope: bool, precision: str, kind: Literal["lora", "dora"], device: str) -> list[Check]:
    base = base_from_model(_model(longrope), precision, device)
    adapter = _adapter(base, kind)
    rows = [_row(length, number) for number, length in enumerate(LENGTHS)]
    trainee = TorchEngine(base).open(AdapterWeights(base, adapter), LikelihoodObjective(), AdamWSettings(0.9, 0.999, 1e-8, 0.0))
    total = sum(row.total_weight for row in rows)
    loss = trainee.forward_backward(pack(rows), total)
    packed, alone = _logits(base, adapter, rows), [_logits(base, adapter, [row])[0] for row in rows]

    twin = _twin(base, adapter, longrope)
    exact, exact_loss = [], torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        logits = twin(input_ids=ids, use_cache=False).logits[0]
        exact.append(logits.detach())
        exact_loss = exact_loss + nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum") / total
    exact_loss.backward()
    theirs = {_site(n): p.grad for n, p in twin.named_parameters() if p.grad is not None}
    ours = {n: p.grad for n, p in adapter.parameters().items()}
    assert ours.keys() == theirs.keys()
    allowed = TOLERANCES["fp32" if precision == "fp32" else "bf16"]
    where = f"{name} {kind} {precision}"
    return [
        Check(f"{where}: logits in a pack, against float64", max(map(_distance, packed, exact)), allowed["logits"]),
        Check(f"{where}: logits in a pack, against alone", max(map(_distance, packed, alone)), allowed["logits"]),
        Check(f"{where}: loss", abs(loss / float(exact_loss.detach()) - 1), allowed["loss"]),
        Check(f"{where}: gradients, the worst tensor's", max(_distance(ours[n], theirs[n]) for n in ours), allowed["gradients"]),
    ]


def _model(longrope: bool) -> nn.Module:
    """Return the model in float32 on the CPU, its weights spread so that every part is felt in the logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config_of(SMALL, longrope), dtype=torch.float32)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draws)
            parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + 0.2 * noise)
    return model.eval()


def _row(length: int, number: int) -> TokenRow:
    ids = np.random.default_rng([3, number]).integers(3, SMALL.vocab, length).astype(np.int32)
    weights = np.ones(length, dtype=np.float32)
    weights[0] = 0.0
    return TokenRow(ids, weights, number, Where("drawn", number + 1), 1)


@torch.no_grad()
def _adapter(base: Base, kind: Literal["lora", "dora"]) -> LowRankAdapter:
    """Return an adapter as after some training: B is not zero, magnitudes are not the rows' lengths."""
    adapter = new_adapter(base, AdapterShape(kind, 8, 16.0, 0.0, False, resolve_targets(base, "all-linear")), "kaiming", 0)
    draws = torch.Generator().manual_seed(1)
    for name, parameter in adapter.parameters().items():
        noise = torch.randn(parameter.shape, generator=draws).to(parameter.device)
        if name.endswith("lora_B"):
            parameter.copy_(noise * 0.05)
        elif name.endswith("magnitude_vector"):
            parameter.mul_(1 + 0.1 * noise)
    return adapter


@torch.no_grad()
def _twin(base: Base, adapter: LowRankAdapter, longrope: bool) -> Any:
    """Return transformers' model under PEFT, in float64 on the CPU, with the weights that the base computes with."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config_of(SMALL, longrope), dtype=torch.float64, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        linear = base.linears.get(name.removesuffix(".weight"))
        parameter.copy_(base.model.get_parameter(name) if linear is None else linear.dense())
    shape = adapter.shape
    config = LoraConfig(
        r=shape.rank, lora_alpha=int(shape.alpha), use_dora=shape.kind == "dora", target_modules=list(shape.sites),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    twin: Any = get_peft_model(model, config).double().eval()
    parameters, ours = dict(twin.named_parameters()), adapter.parameters()
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            parameter.copy_(ours[_site(name)])
    return twin


def _site(name: str) -> str:
    """Return our name of a trained tensor of PEFT's."""
    return name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")


@torch.no_grad()
def _logits(base: Base, adapter: LowRankAdapter, rows: list[TokenRow]) -> list[Tensor]:
    lengths = [row.length for row in rows]
    ids_T = torch.from_numpy(np.concatenate([row.ids for row in rows]).astype(np.int64)).to(base.device)
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(base.device)
    with base.using(adapter.sites):
        return list(base.head(base.hidden(ids_T, positions_T, Rows(lengths))).split(lengths))


def _distance(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())
