"""Bases of two layers with random weights, one per family, and token rows to feed them: what the exactness tests run on.

All sizes of a base differ from one another, so that a swapped dimension cannot go unseen. Weights are spread wide enough that
every bias, norm and frequency is felt in the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import peft
import torch
import transformers
from torch import Tensor, nn

from kivnun.data.packing import PackedBatch
from kivnun.data.rows import TokenRow, Where
from kivnun.model.adapters import AdapterShape, LowRankAdapter, new_adapter, resolve_targets
from kivnun.model.attention import Rows
from kivnun.model.load import Base
from kivnun.train.engine import TorchEngine, Trainee
from kivnun.train.objectives import LikelihoodObjective, Objective
from kivnun.train.optim import AdamWSettings
from kivnun.train.weights import AdapterWeights, Weights

VOCAB = 103
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 12
# Rows longer than this take LongRoPE's other factors.
ORIGINAL_LENGTH = 24
SHORT, LONG = [1.0, 1.3, 1.7], [2.0, 5.5, 9.0]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "partial_rotary_factor": 0.75}


def _phi3(**changes: object) -> transformers.PretrainedConfig:
    return transformers.Phi3Config(**{**SIZES, "tie_word_embeddings": False, **changes})


def _gemma2() -> transformers.PretrainedConfig:
    softcaps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.5, "query_pre_attn_scalar": 10}
    return transformers.Gemma2Config(**{**SIZES, **softcaps, "head_dim": 10, "sliding_window": WINDOW})


def _qwen2_windowed() -> transformers.PretrainedConfig:
    return transformers.Qwen2Config(**{**SIZES, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1})


def _llama(**changes: object) -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(**{**SIZES, "head_dim": 10, **changes})


def _stretched(kind: str, **more: object) -> dict[str, object]:
    """Return frequencies stretched for longer rows than the original length, which the test's rows exceed."""
    rope = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0, **more}
    return {"rope_parameters": rope | ({} if kind == "linear" else {"original_max_position_embeddings": ORIGINAL_LENGTH})}


CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "phi3": _phi3,
    "phi3_window": lambda: _phi3(sliding_window=WINDOW),
    "phi3_tied": lambda: _phi3(tie_word_embeddings=True),
    "phi4_mini": lambda: _phi3(
        tie_word_embeddings=True,
        rope_parameters={**LONGROPE, "rope_theta": 10000.0},
        original_max_position_embeddings=ORIGINAL_LENGTH,
        partial_rotary_factor=0.75,
    ),
    "phi3_partial": lambda: _phi3(partial_rotary_factor=0.5),
    "phi": lambda: transformers.PhiConfig(**{**SIZES, "partial_rotary_factor": 0.5}),
    "llama": _llama,
    "llama_biased": lambda: _llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama_gelu": lambda: _llama(hidden_act="gelu"),
    "llama_linear": lambda: _llama(**_stretched("linear")),
    "llama_llama3": lambda: _llama(**_stretched("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama_yarn": lambda: _llama(**_stretched("yarn")),
    "mistral": lambda: transformers.MistralConfig(**{**SIZES, "head_dim": 10, "sliding_window": WINDOW}),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen2_window": _qwen2_windowed,
    "qwen3": lambda: transformers.Qwen3Config(**{**SIZES, "head_dim": 10}),
    "qwen3_window": lambda: transformers.Qwen3Config(
        **{**SIZES, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "attention_bias": True}
    ),
    "olmo2_longrope": lambda: transformers.Olmo2Config(
        **{
            **SIZES,
            "rope_parameters": {
                **LONGROPE,
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "short_factor": [*SHORT, 2.0],
                "long_factor": [*LONG, 12.0],
                "original_max_position_embeddings": ORIGINAL_LENGTH,
                "factor": 4.0,
            },
        }
    ),
    "gemma": lambda: transformers.GemmaConfig(**{**SIZES, "head_dim": 10}),
    "gemma2": _gemma2,
}


# Families whose forward is our own decoder's.
OWN = [
    name
    for name in CONFIGS
    if name.split("_")[0] in ("phi3", "phi4", "llama", "mistral", "qwen2", "qwen3") and name != "llama_gelu"
]


def write_base(folder: Path, config: transformers.PretrainedConfig, seed: int = 0) -> Path:
    """Save a model of this configuration with random weights, the same every time; return its folder."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draws)
            if parameter.ndim >= 2:
                parameter.copy_(noise * (1.5 / math.sqrt(parameter.shape[-1])))
            else:
                parameter.add_(noise * 0.2)
    model.save_pretrained(folder)
    return folder


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the same model as transformers runs it, with nothing of ours."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def reference_logits(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Return transformers' logits [T, V] of one row alone."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


@torch.no_grad()
def packed_logits(base: Base, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return our logits [T, V] of each row, all rows in one pack."""
    lengths = [len(row) for row in rows]
    ids_T = torch.tensor([token for row in rows for token in row], device=base.device)
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(base.device)
    h_TD = base.hidden(ids_T, positions_T, Rows(lengths))
    short = max(0, 16 - len(h_TD))
    logits_TV = base.head(torch.cat([h_TD, h_TD.new_zeros(short, h_TD.shape[1])]))[: len(h_TD)]
    return list(logits_TV.split(lengths))


def random_ids(length: int, *key: int) -> list[int]:
    """Return token ids, a pure function of the arguments."""
    return np.random.default_rng([length, *key]).integers(3, VOCAB, length).tolist()


def token_row(ids: Sequence[int], row: int = 0, trained: int | None = None) -> TokenRow:
    """Return a row whose last `trained` tokens have weight 1 (None: all but the first)."""
    trained = len(ids) - 1 if trained is None else trained
    weights = np.zeros(len(ids), dtype=np.float32)
    if trained:
        weights[-trained:] = 1.0
    assert weights[0] == 0
    return TokenRow(np.asarray(ids, dtype=np.int32), weights, row, Where("rows.jsonl", row + 1), max(1, len(ids) - trained))


def random_rows(trained: Sequence[int], prompt: int = 3) -> list[TokenRow]:
    """Return one row per entry: a prompt of `prompt` tokens, then that many trained ones."""
    return [token_row(random_ids(prompt + count, row), row, count) for row, count in enumerate(trained)]


def row_log_probs(values_S: np.ndarray, batch: PackedBatch) -> list[np.ndarray]:
    """Return a pack's per-target values, row by row."""
    return [values_S[batch.segment_S == index] for index in range(len(batch.rows))]


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|, both as vectors, in float64."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


ADAMW = AdamWSettings(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)


def new_weights(
    base: Base,
    kind: Literal["lora", "dora"] = "lora",
    *,
    rank: int = 3,
    alpha: float = 7.0,
    dropout: float = 0.0,
    rslora: bool = False,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    targets: Literal["all-linear"] | Sequence[str] = "all-linear",
    stirred: bool = True,
) -> AdapterWeights:
    """Return an adapter ready to train; `stirred`: with B and the magnitudes moved away from their start, as after training."""
    shape = AdapterShape(kind, rank, alpha, dropout, rslora, resolve_targets(base, targets))
    adapter = new_adapter(base, shape, init, seed=5)
    if stirred:
        stir(adapter)
    return AdapterWeights(base, adapter)


@torch.no_grad()
def stir(adapter: LowRankAdapter) -> None:
    """Move B and the magnitudes away from their start, the same every time."""
    draws = torch.Generator().manual_seed(11)
    for name, parameter in adapter.parameters().items():
        noise = torch.randn(parameter.shape, generator=draws).to(parameter.device)
        if name.endswith("lora_B"):
            parameter.copy_(noise * 0.1)
        elif name.endswith("magnitude_vector"):
            parameter.mul_(1 + 0.2 * noise)


def new_trainee(base: Base, weights: Weights, objective: Objective | None = None, max_grad_norm: float | None = None) -> Trainee:
    """Return a trainee under plain AdamW."""
    return TorchEngine(base).open(weights, objective or LikelihoodObjective(), ADAMW, max_grad_norm)


def gradients(trainee: Trainee) -> dict[str, Tensor]:
    """Return copies of the gradients gathered so far, by name."""
    return {name: p.grad.clone() for name, p in trainee.weights.parameters().items() if p.grad is not None}


def peft_twin(folder: Path, adapter: LowRankAdapter, dropout: float = 0.0) -> nn.Module:
    """Return transformers' model under PEFT's adapter with the same shape and the same tensors."""
    shape = adapter.shape
    config = peft.LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=shape.rslora,
        use_dora=shape.kind == "dora",
        target_modules=list(shape.sites),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(reference(folder), config)
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in adapter.parameters().items():
            theirs[peft_name(name)].copy_(parameter)
    return model.eval()


def peft_name(name: str) -> str:
    """Return the name under which PEFT keeps one of our adapter's tensors in memory."""
    return f"base_model.model.{name}.default.weight"


def reference_loss(model: nn.Module, rows: Sequence[TokenRow]) -> Tensor:
    """Return transformers' mean loss per trained token of a right-padded batch, by its own labels and loss."""
    longest = max(row.length for row in rows)
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, : row.length] = torch.from_numpy(row.ids).long()
        mask[at, : row.length] = 1
        trained = torch.from_numpy(row.weights) > 0
        labels[at, : row.length] = torch.where(trained, ids[at, : row.length], -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
