"""Check Kivnun on a GPU machine: against float64 on the CPU, then the facts of tests/gpu; then time LoRA, DoRA and full steps.

Run from the repository root; nothing needs to be installed but torch, transformers, peft and pytest:
`python -m scripts.check_gpu`. With `--device cpu` it measures a much smaller model, to try the script itself. How fast others are
on the same work is measured by `python -m benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers

from benchmarks.gpu.correct import check_all
from kivnun.data.packing import PackedBatch, pack
from kivnun.data.rows import TokenRow, Where
from kivnun.model.adapters import AdapterShape, new_adapter, resolve_targets
from kivnun.model.generate import SamplingParams, generate
from kivnun.model.load import load_base
from kivnun.train.engine import TorchEngine, Trainee
from kivnun.train.objectives import LikelihoodObjective
from kivnun.train.optim import AdamWSettings
from kivnun.train.weights import AdapterWeights, FullWeights

if TYPE_CHECKING:
    from kivnun.model.load import Base

FACTS = Path(__file__).parent.parent / "tests" / "gpu"
KINDS = ("lora", "dora", "full")
STEPS = 8  # measured, after two that warm up


@dataclass(frozen=True, slots=True)
class Size:
    """The model and the pack that are measured."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    row_length: int


# Phi-4-mini's width and vocabulary with a quarter of its layers: large enough to be bound by matrix products.
GPU = Size(hidden=3072, intermediate=8192, layers=8, heads=24, vocabulary=100352, rows=16, row_length=512)
CPU = Size(hidden=128, intermediate=320, layers=2, heads=4, vocabulary=1024, rows=4, row_length=64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--skip-facts", action="store_true", help="measure only")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here (torch.cuda.is_available() is false)", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    print(f"{name} · Python {platform.python_version()} · torch {torch.__version__} · transformers {transformers.__version__}")
    failed = 0 if arguments.skip_facts else max(_compared(arguments.device), _facts())
    _measure(arguments.device, GPU if arguments.device == "cuda" else CPU)
    return failed


def _compared(device: str) -> int:
    checks = check_all(device)
    print(*checks, sep="\n", flush=True)
    return 0 if all(check.passed for check in checks) else 1


def _facts() -> int:
    import pytest

    # Warnings are errors at home, where versions are pinned; here they are only shown.
    return int(pytest.main([str(FACTS), "-q", "-rs", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]))


def _measure(device: str, size: Size) -> None:
    print(f"\n{size.layers} layers of width {size.hidden}, bf16, {size.rows} rows of {size.row_length} tokens, all trained")
    print(f"{'':12}{'ms/step':>10}{'tokens/s':>12}{'TFLOP/s':>10}{'peak GiB':>10}{'first loss':>12}{'last':>8}")
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), size)
        for kind in KINDS:
            _measure_kind(Path(folder), kind, device, size)
        _measure_generation(Path(folder), device)


def _write(folder: Path, size: Size) -> None:
    config = transformers.Phi3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=max(1, size.heads // 3),
        max_position_embeddings=4096,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def _open(base: Base, kind: str) -> Trainee:
    if kind == "full":
        weights = FullWeights(base)
    else:
        shape = AdapterShape("dora" if kind == "dora" else "lora", 16, 32.0, 0.0, False, resolve_targets(base, "all-linear"))
        weights = AdapterWeights(base, new_adapter(base, shape, "kaiming", 0))
    settings = AdamWSettings(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    return TorchEngine(base).open(weights, LikelihoodObjective(), settings, 1.0)


def _pack(size: Size) -> PackedBatch:
    draws = np.random.default_rng(0)
    weights = np.ones(size.row_length, dtype=np.float32)
    weights[0] = 0.0
    return pack(
        [
            TokenRow(draws.integers(3, size.vocabulary, size.row_length).astype(np.int32), weights, row, Where("random", row), 1)
            for row in range(size.rows)
        ]
    )


def _measure_kind(folder: Path, kind: str, device: str, size: Size) -> None:
    base = load_base(folder, "bf16", device)
    trainee, batch = _open(base, kind), _pack(size)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, began = [], 0.0
    for step in range(STEPS + 2):
        if step == 2:
            _wait(device)
            began = time.perf_counter()
        losses.append(trainee.forward_backward(batch, batch.total_weight))
        trainee.optim_step(1e-4)
    _wait(device)
    seconds = (time.perf_counter() - began) / STEPS
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    # Six operations per weight and token for full tuning; the gradient of frozen weights is not computed.
    matrices = sum(linear.dense().numel() for linear in base.linears.values())
    operations = (6 if kind == "full" else 4) * matrices * batch.num_tokens
    print(
        f"{kind:12}{seconds * 1e3:10.1f}{batch.num_tokens / seconds:12.0f}{operations / seconds / 1e12:10.1f}"
        f"{peak:10.2f}{losses[0]:12.4f}{losses[-1]:8.4f}",
        flush=True,
    )


def _measure_generation(folder: Path, device: str) -> None:
    base = load_base(folder, "bf16", device)
    prompts, new = [[1, 5, 7, 11]] * 32, 32
    generate(base, prompts, SamplingParams(2, ()))
    _wait(device)
    began = time.perf_counter()
    generate(base, prompts, SamplingParams(new, ()))
    _wait(device)
    seconds = time.perf_counter() - began
    print(f"{'generate':12}{seconds / new * 1e3:10.1f}{len(prompts) * new / seconds:12.0f}   (ms per token of {len(prompts)} rows)")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
