"""The floor: how fast this machine multiplies matrices when nothing else is asked of it.

`python -m benchmarks.engine.floor MODEL THREADS` prints one line of JSON: operations per second in bf16 and fp32, the best of
many repetitions over the products that a step is made of (x W' and dy W of the widest projection, at about the tokens of a
pass and of a step), by whoever is fastest here: torch (MKL for fp32), oneDNN and oneDNN with packed weights.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.engine.workload import MODELS

TOKENS = {"71m": (768, 2048), "wide": (1024,), "small": (1024,)}
SECONDS = 0.3  # for each product


def main() -> None:
    name, threads = sys.argv[1], int(sys.argv[2])
    import torch

    torch.set_num_threads(threads)
    rates = {precision: max(floor(name, precision)) for precision in ("bf16", "fp32")}
    print(json.dumps(rates), flush=True)


def floor(name: str, precision: str) -> Iterator[float]:
    """Yield operations per second of each product of a model, "bf16" or "fp32", by torch's present number of threads."""
    import torch

    inputs, outputs = MODELS[name].linears["mlp.gate_up_proj"]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    weight_OI = torch.randn(outputs, inputs).to(dtype)
    weight_IO = weight_OI.t().contiguous()
    for tokens in TOKENS[name]:
        x_TI, dy_TO = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
        products: list[Callable[[], object]] = [partial(torch.mm, x_TI, weight_OI.t()), partial(torch.mm, dy_TO, weight_OI)]
        onednn, packed = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
        for left, weight in ((x_TI, weight_OI), (dy_TO, weight_IO)):
            products += [partial(onednn, left, w, None, "none", [], "") for w in (weight, packed(weight, tokens))]
        for product in products:
            yield 2 * tokens * inputs * outputs / _best_seconds(product)


def _best_seconds(product: Callable[[], object]) -> float:
    product()
    best, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        began = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main()
