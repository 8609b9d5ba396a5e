"""Matrix products beside oneDNN's, in CPU time of one thread: `python -m benchmarks.engine.product_rates`.

Prints a table: for each shape of a layer of the 71 M model and several numbers of rows, billions of operations a second of our
product with the weight packed beforehand and packed on the way, of oneDNN's as torch calls it and with a packed weight, and of
both with an adapter's product of rank 16 (oneDNN: `addmm_`), measured in turns. Then, each in a process of its own, what a number
of rows met for the first time costs: KiB that the process grows by and milliseconds. Met from the largest down, that is what is
kept; met from the smallest up, what is kept lies between outputs that each need more room than the last.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil
import torch
from torch import Tensor

from kivnun.cli.process import keep_freed_memory
from kivnun.model.kernels import NativeKernels, native_or_reason
from kivnun.model.products import LowRank, PackedMatrix, packed, times_transposed

SHAPES = ((512, 1024), (512, 3072), (1536, 512), (3072, 512), (512, 32064))  # inputs, outputs
ROWS = (16, 704, 2102)
RANK, TURNS, OPERATIONS = 16, 5, 1e9
NEW_SIZES = range(128, 128 + 16 * 200, 16)
WHO = ("ours", "oneDNN packed")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.product_rates", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    kernels = native_or_reason()
    if isinstance(kernels, str):
        raise SystemExit(kernels)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        if not kernels.multiplies(dtype, 2):
            print(f"{name}: this processor lacks the instructions")
            continue
        _rates(name, dtype, kernels, options.rows)
        for who in WHO:
            with ProcessPoolExecutor(1, get_context("spawn")) as down, ProcessPoolExecutor(1, get_context("spawn")) as up:
                kept, milliseconds = down.submit(cost_of_new_sizes, name, who, -1).result()
                grown, _ = up.submit(cost_of_new_sizes, name, who, 1).result()
            told = f"{kept:,.0f} KiB (from the smallest up {grown:,.0f}) and {milliseconds:.2f} ms"
            print(f"{name} {who}: {told} for each new number of rows", flush=True)


def _rates(name: str, dtype: torch.dtype, kernels: NativeKernels, all_rows: list[int]) -> None:
    print(f"{name}, GFLOP/s: inputs outputs  rows | packed  on the way | oneDNN  packed | with an adapter: ours  oneDNN packed")
    for inputs, outputs in SHAPES:
        for rows in all_rows:
            x, w, low, b = (
                torch.randn(*shape).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (rows, RANK), (outputs, RANK))
            )
            rates = _in_turns(_sides(x, w, low, b, kernels), 2 * rows * inputs * outputs)
            forms = (" | %6.0f", " %11.0f", " | %6.0f", " %7.0f", " | %21.0f", " %14.0f")
            cells = "".join(form % rate for form, rate in zip(forms, rates, strict=True))
            print(f"{'':15} {inputs:6} {outputs:7} {rows:5}{cells}", flush=True)


def _sides(x: Tensor, w: Tensor, low: Tensor, b: Tensor, kernels: NativeKernels) -> list[Callable[[], Tensor]]:
    ours, factor = packed(w, kernels), packed(b, kernels)
    assert isinstance(ours, PackedMatrix)
    theirs = torch.ops.mkldnn._reorder_linear_weight(w, len(x))
    return [
        lambda: times_transposed(x, ours, kernels),
        lambda: times_transposed(x, w, kernels),
        lambda: _onednn(x, w),
        lambda: _onednn(x, theirs),
        lambda: times_transposed(x, ours, kernels, LowRank(low, factor)),
        lambda: _onednn(x, theirs).addmm_(low, b.t()),
    ]


def _onednn(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def _in_turns(sides: list[Callable[[], Tensor]], operations: int) -> list[float]:
    """Return billions of operations a second of each side, the median over turns."""
    repeats, rates = max(1, int(OPERATIONS / operations)), [[0.0] * TURNS for _ in sides]
    for turn in range(TURNS):
        for side, of in enumerate(sides):
            of()
            began = time.process_time()
            for _ in range(repeats):
                of()
            rates[side][turn] = operations * repeats / (time.process_time() - began) / 1e9
    return [statistics.median(its) for its in rates]


def cost_of_new_sizes(name: str, who: str, way: int) -> tuple[float, float]:
    """Return KiB grown by and milliseconds taken for each number of rows that this process meets for the first time."""
    keep_freed_memory()
    torch.set_num_threads(1)
    kernels, dtype = native_or_reason(), {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    x, w = torch.randn(NEW_SIZES[-1], 512).to(dtype), torch.randn(1024, 512).to(dtype)
    right = packed(w, kernels) if who == "ours" else torch.ops.mkldnn._reorder_linear_weight(w, 512)

    def product(rows: int) -> Tensor:
        return times_transposed(x[:rows], right, kernels) if who == "ours" else _onednn(x[:rows], right)  # type: ignore[arg-type]

    sizes = NEW_SIZES[::way]
    product(sizes[0])
    before, spent = psutil.Process().memory_info().rss, []
    for _ in range(2):
        began = time.process_time()
        for rows in sizes:
            product(rows)
        spent.append(time.process_time() - began)
    kept = psutil.Process().memory_info().rss - before
    return kept / 1024 / len(sizes), 1e3 * (spent[0] - spent[1]) / len(sizes)


if __name__ == "__main__":
    main()
