"""What is measured: the shapes of Phi models with random weights, rows of some lengths, and what a step of them costs at least.

Attention is whole (the windows of 2,047 tokens of the 4k releases of Phi-3 are left out), and every token but a row's first is
supervised. Next: `sides.py` (who trains on this).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.engine.workload import Model
from kivnun.data.rows import TokenRow, Where

MODELS = {
    "phi-3-mini": Model(hidden=3072, layers=32, heads=32, kv_heads=32, mlp=8192),
    "phi-4-mini": Model(hidden=3072, layers=32, heads=24, kv_heads=8, mlp=8192, vocab=200064),
    "phi-3-medium": Model(hidden=5120, layers=40, heads=40, kv_heads=10, mlp=17920),
}
TINY = Model(hidden=128, layers=2, heads=4, kv_heads=2, mlp=320, vocab=1003)  # to try the benchmark where no device is

LONGEST = 4096
STEP_TOKENS = 16384  # of full rows; a step of mixed rows has twice as many, so that their lengths even out
MEDIAN, SPREAD, SHORTEST = 400, 0.9, 16  # of mixed rows: log-normal, the mean about 570 tokens
LENGTHS = ("512", "2048", "4096", "mixed")

# Dense bfloat16 peak without sparsity, from NVIDIA's data sheets, by what the device's name holds; the first that fits.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}


def config_of(model: Model, tied_longrope: bool) -> Any:
    """Return transformers' configuration of this shape; Phi-4-mini's head is tied and three quarters of each head turn."""
    from transformers import Phi3Config

    turned = int(model.head_dim * 0.75) // 2
    factors = [1.0 + 0.1 * at for at in range(turned)]
    rope = {"rope_type": "longrope", "short_factor": [1.0] * turned, "long_factor": factors, "rope_theta": 10000.0}
    longrope: dict[str, Any] = {
        "rope_parameters": {**rope, "partial_rotary_factor": 0.75},
        "original_max_position_embeddings": LONGEST,
        "partial_rotary_factor": 0.75,
        "max_position_embeddings": 32 * LONGEST,
    }
    more: dict[str, Any] = longrope if tied_longrope else {"max_position_embeddings": LONGEST}
    return Phi3Config(
        hidden_size=model.hidden,
        intermediate_size=model.mlp,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        vocab_size=model.vocab,
        tie_word_embeddings=tied_longrope,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def draw_rows(model: Model, lengths: str, shrink: int = 1) -> list[TokenRow]:
    """Return the rows of one step, the same every time: full ones of so many tokens, or mixed ones; all `shrink` times shorter."""
    draws = np.random.default_rng([0, LENGTHS.index(lengths)])
    if lengths != "mixed":
        length = int(lengths) // shrink
        return [_row(draws, model.vocab, length, number) for number in range(STEP_TOKENS // int(lengths))]
    rows: list[TokenRow] = []
    while sum(row.length for row in rows) < 2 * STEP_TOKENS // shrink:
        length = int(np.clip(np.exp(np.log(MEDIAN) + SPREAD * draws.standard_normal()), SHORTEST, LONGEST))
        rows.append(_row(draws, model.vocab, max(2, length // shrink), len(rows)))
    return rows


def _row(draws: np.random.Generator, vocab: int, length: int, number: int) -> TokenRow:
    weights = np.ones(length, dtype=np.float32)
    weights[0] = 0.0
    return TokenRow(draws.integers(3, vocab, length).astype(np.int32), weights, number, Where("drawn", number + 1), 1)


def needed_flops(model: Model, lengths: Sequence[int]) -> float:
    """Return the operations of a LoRA step that its mathematics needs, without the adapter's own and without recomputation.

    Four per weight and token (forward, and the gradient of the input), the head's weights among them, and for the causal half of
    the scores of a row of L tokens 6 L (L + 1) per layer, head and dimension, as in `engine/flops.py`.
    """
    weights = model.linear_parameters + model.hidden * model.vocab
    scores = sum(length * (length + 1) for length in lengths)
    return 4.0 * weights * sum(lengths) + 6.0 * model.layers * model.heads * model.head_dim * scores


def peak_flops(device_name: str) -> float | None:
    """Return the device's dense bfloat16 peak, or None where it is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def mfu(model: Model, lengths: Sequence[int], seconds: float, peak: float | None) -> float | None:
    """Return the share of the peak that a step's needed operations take up in this time."""
    return None if peak is None else needed_flops(model, lengths) / seconds / peak


def padded_share(lengths: Sequence[int], rows_per_pass: int) -> float:
    """Return how many of the positions of padded passes hold a token."""
    passes = [lengths[at : at + rows_per_pass] for at in range(0, len(lengths), rows_per_pass)]
    return sum(lengths) / sum(max(part) * len(part) for part in passes)
