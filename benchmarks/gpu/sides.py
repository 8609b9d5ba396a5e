"""Who trains: Kivnun's engine, and the peers, on a model of the same weights, made on the device, and on the same rows.

A side is opened once for a model and then asked for steps over one list of rows after another. The peers are transformers and PEFT
in the loop that Hugging Face's Trainer has (bfloat16 autocast, float32 adapter, fused AdamW): with padding, and without it by
torch's variable-length attention, the kernel that FlashAttention 2 brings. `trl.py` has TRL's own trainer.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.engine.workload import ALPHA, RANK, Model
from benchmarks.gpu.shapes import config_of
from kivnun.data.packing import micro_batches, pack
from kivnun.data.rows import TokenRow
from kivnun.model.adapters import AdapterShape, new_adapter, resolve_targets
from kivnun.model.load import base_from_model
from kivnun.model.varlen import Bounds, varlen_or_reason
from kivnun.train.engine import TorchEngine
from kivnun.train.objectives import LikelihoodObjective
from kivnun.train.optim import AdamWSettings
from kivnun.train.weights import AdapterWeights

RATE = 1e-4
ATTENTION = "benchmark_varlen"


@dataclass(frozen=True, slots=True)
class Step:
    """What a step was: its loss before the update, and its seconds between two synchronisations with the device."""

    loss: float
    seconds: float


class Side(Protocol):
    """One engine with a model, ready to train."""

    facts: dict[str, str]

    def step(self, rows: Sequence[TokenRow], pass_tokens: int) -> Step:
        """Train one step on the rows, at most so many positions a pass."""
        ...


class Absent(Exception):
    """A side that cannot be measured here; its text says why."""


def now() -> float:
    """Return the time once the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def built(model: Model, longrope: bool, device: str) -> Any:
    """Return transformers' model with random weights in bfloat16, the same every time, made on the device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_of(model, longrope), dtype=torch.bfloat16).eval()


class Ours:
    """Kivnun."""

    def __init__(self, model: Model, longrope: bool, precision: str, recompute: bool, device: str) -> None:
        self._base = base_from_model(built(model, longrope, device), precision, device, recompute=recompute)
        shape = AdapterShape("lora", RANK, float(ALPHA), 0.0, False, resolve_targets(self._base, "all-linear"))
        weights = AdapterWeights(self._base, new_adapter(self._base, shape, "kaiming", 0))
        self._trainee = TorchEngine(self._base).open(weights, LikelihoodObjective(), AdamWSettings(0.9, 0.999, 1e-8, 0.0), 1.0)
        whole = varlen_or_reason(self._base.device)
        self.facts = {"kernels": self._base.kernels.name, "attention": whole if isinstance(whole, str) else "one call for the pack"}

    def step(self, rows: Sequence[TokenRow], pass_tokens: int) -> Step:
        trainee, began = self._trainee, now()
        total = sum(row.total_weight for row in rows)
        parts = micro_batches(rows, pass_tokens)
        loss = sum(trainee.forward_backward(pack(part), total) for part in parts)
        trainee.optim_step(RATE)
        return Step(loss, now() - began)


class Peft:
    """transformers and PEFT in a plain loop."""

    def __init__(self, model: Model, longrope: bool, precision: str, recompute: bool, device: str, padding_free: bool) -> None:
        from peft import LoraConfig, get_peft_model

        self._device, self._padding_free = torch.device(device), padding_free
        base = built(model, longrope, device)
        if precision == "nf4":
            _quantise(base)
        attention = _register_varlen(self._device) if padding_free else "sdpa"
        base.set_attn_implementation(attention)
        if recompute:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        self._model: Any = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"))
        self._model.train()
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=RATE, weight_decay=0.0, fused=True)
        self.facts = {"attention": "torch's variable-length" if attention == ATTENTION else "torch's SDPA"}

    def step(self, rows: Sequence[TokenRow], pass_tokens: int) -> Step:
        began = now()
        total = torch.tensor(float(sum(row.total_weight for row in rows)), device=self._device)
        parts: Any = micro_batches(rows, pass_tokens) if self._padding_free else padded_passes(rows, pass_tokens)
        losses = []
        for part in parts:
            inputs = (packed if self._padding_free else padded)(part, self._device)
            with torch.autocast(self._device.type, dtype=torch.bfloat16):
                loss = self._model(**inputs, num_items_in_batch=total, use_cache=False).loss
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return Step(float(sum(losses)), now() - began)


def padded_passes(rows: Sequence[TokenRow], pass_tokens: int) -> list[list[TokenRow]]:
    """Return the rows in their order, the same number in every pass, so that none has more positions, padding included."""
    each = max(1, pass_tokens // max(row.length for row in rows))
    return [list(rows[at : at + each]) for at in range(0, len(rows), each)]


def padded(rows: Sequence[TokenRow], device: torch.device) -> dict[str, Tensor]:
    """Return a right-padded batch as a collator makes it."""
    longest = max(row.length for row in rows)
    ids, labels = np.zeros((len(rows), longest), dtype=np.int64), np.full((len(rows), longest), -100, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for at, row in enumerate(rows):
        ids[at, : row.length], mask[at, : row.length] = row.ids, 1
        labels[at, : row.length] = np.where(row.weights > 0, row.ids, -100)
    return {name: torch.from_numpy(x).to(device) for name, x in (("input_ids", ids), ("labels", labels), ("attention_mask", mask))}


def packed(rows: Sequence[TokenRow], device: torch.device) -> dict[str, Any]:
    """Return rows end to end with positions that start anew, and their bounds as transformers hands them to FlashAttention."""
    ids = np.concatenate([row.ids for row in rows]).astype(np.int64)
    labels = np.where(np.concatenate([row.weights for row in rows]) > 0, ids, -100)
    positions = np.concatenate([np.arange(row.length) for row in rows])
    named = (("input_ids", ids), ("labels", labels), ("position_ids", positions))
    bounds = Bounds.of([row.length for row in rows], device)
    tensors: dict[str, Any] = {name: torch.from_numpy(x)[None].to(device) for name, x in named}
    return tensors | {
        "cu_seq_lens_q": bounds.starts, "cu_seq_lens_k": bounds.starts,
        "max_length_q": bounds.longest, "max_length_k": bounds.longest,
    }  # fmt: skip


def _register_varlen(device: torch.device) -> str:
    """Give transformers torch's variable-length attention under a name; where it does not serve, SDPA with a mask does."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    whole = varlen_or_reason(device)
    if isinstance(whole, str):
        return "sdpa"

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: object, scaling: float, **rest: Any):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return whole(q, k, v, Bounds(rest["cu_seq_lens_q"], rest["max_length_q"]), scaling, None)[None], None

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *_args, **_named: None)
    return ATTENTION


def _quantise(model: Any) -> None:
    """Put bitsandbytes' NF4 layers in place of all linear layers but the head. Raises Absent without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Absent("bitsandbytes is not installed, so PEFT has no QLoRA here")
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and module is not head:
            layer = Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
            )
            weight: Any = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)  # type: ignore[call-arg]
            layer.weight = weight.to(module.weight.device)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    model.is_loaded_in_4bit = True
