"""Attention by length: our kernel beside torch's, forward and backward, each in CPU time of one thread.

`python -m benchmarks.engine.attention_lengths` prints a table: for each shape of heads, element type and row length the median
milliseconds a row, ours and those of `F.scaled_dot_product_attention`, in turns, and their ratio. Short rows come several to a
pack, as in training; torch's function takes one row a call. Neither rotates: torch's does not. It is what the rule of
`kivnun/model/attention.py` rests on, which takes our kernel at every length.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kivnun.model.kernels import NativeKernels, native_or_reason

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
SHAPES = ((8, 4, 64), (32, 32, 64), (8, 4, 96), (32, 32, 96))  # query heads, key/value heads, width of a head
PACK = 1024  # tokens at least
SECONDS = 1.0  # for each of the two
MIN_TURNS = 3


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows of one length, T tokens: queries [T, H, K], keys and values [T, G, K], and the gradient of what comes out."""

    length: int
    q_THK: Tensor
    k_TGK: Tensor
    v_TGK: Tensor
    dout_THK: Tensor

    @property
    def rows(self) -> int:
        return len(self.q_THK) // self.length


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    kernels = native_or_reason()
    if isinstance(kernels, str):
        raise SystemExit(kernels)
    print(f"{'heads':>9} {'width':>5} {'type':>4} {'length':>6} {'ours ms':>9} {'torch ms':>9} {'ours / torch':>12}")
    for heads, groups, width in SHAPES:
        for name in options.dtypes:
            for length in options.lengths:
                pack = _pack(length, heads, groups, width, {"bf16": torch.bfloat16, "fp32": torch.float32}[name])
                ours, theirs = _milliseconds(
                    lambda pack=pack: _ours(kernels, pack), lambda pack=pack: _theirs(pack), options.seconds
                )
                shown = f"{ours / pack.rows:9.3f} {theirs / pack.rows:9.3f} {ours / theirs:12.2f}"
                print(f"{f'{heads}/{groups}':>9} {width:5} {name} {length:6} {shown}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.attention_lengths", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), default=("bf16", "fp32"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="CPU time for each measurement")
    return parser.parse_args()


def _pack(length: int, heads: int, groups: int, width: int, dtype: torch.dtype) -> Pack:
    tokens = length * max(1, PACK // length)
    draws = torch.Generator().manual_seed(length)
    q, k, v, dout = (torch.randn(tokens, n, width, generator=draws).to(dtype) for n in (heads, groups, groups, heads))
    return Pack(length, q, k, v, dout)


def _ours(kernels: NativeKernels, pack: Pack) -> None:
    q, k, v = pack.q_THK, pack.k_TGK, pack.v_TGK
    given = ([pack.length] * pack.rows, q.shape[2] ** -0.5, None, None)
    out, lse = kernels.attention(q, k, v, *given)
    into = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    kernels.attention_backward(pack.dout_THK, q, k, v, out, lse, *given, into)


def _theirs(pack: Pack) -> None:
    of_rows = (x.split(pack.length) for x in (pack.q_THK, pack.k_TGK, pack.v_TGK, pack.dout_THK))
    for row in zip(*of_rows, strict=True):
        q, k, v, dout = (x.transpose(0, 1)[None] for x in row)
        leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        torch.autograd.grad(out, leaves, dout)


def _milliseconds(ours: Callable[[], None], theirs: Callable[[], None], seconds: float) -> tuple[float, float]:
    """Return the median CPU milliseconds of both, measured in turns."""
    spent: dict[Callable[[], None], list[float]] = {ours: [], theirs: []}
    for of in spent:
        of()
    while len(spent[ours]) < MIN_TURNS or sum(spent[ours]) + sum(spent[theirs]) < 2 * seconds:
        for of, times in spent.items():
            began = time.process_time()
            of()
            times.append(time.process_time() - began)
    return 1e3 * statistics.median(spent[ours]), 1e3 * statistics.median(spent[theirs])


if __name__ == "__main__":
    main()
