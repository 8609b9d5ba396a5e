"""`python -m benchmarks`: all benchmarks. First a LoRA step of Kivnun beside the same step of PEFT with a plain padded loop, on the
built-in base; then from the command to its first step (`startup.py`); then the engine beside TRL (`engine/`), which is given the
arguments, for example `--quick`.

Same weights, same rows, same mathematics (float32, one thread); the two take turns, so that a noisy machine disturbs both. The
figure is the ratio of tokens per CPU second, the median over rounds. Also: what `kivnun --help` costs to start.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from benchmarks import startup
from kivnun.data.packing import micro_batches, pack
from kivnun.data.rows import TokenRow, Where
from kivnun.model.adapters import AdapterShape, new_adapter, resolve_targets
from kivnun.model.families import find_base
from kivnun.model.load import load_base
from kivnun.train.engine import TorchEngine
from kivnun.train.objectives import LikelihoodObjective
from kivnun.train.optim import AdamWSettings
from kivnun.train.weights import AdapterWeights

ROUNDS, STEPS, ROWS = 5, 4, 32
RANK, ALPHA, RATE = 16, 32.0, 1e-3
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    _tiny_phi()
    startup.main()
    return subprocess.run([sys.executable, "-m", "benchmarks.engine", *sys.argv[1:]]).returncode


def _tiny_phi() -> None:
    torch.set_num_threads(1)
    rows = _rows()
    tokens = sum(row.length for row in rows)
    step_ours, step_peft = _ours(rows), _peft(rows)
    step_ours(), step_peft()  # first steps allocate; they are not measured
    rates = [(tokens * STEPS / _cpu_seconds(step_ours), tokens * STEPS / _cpu_seconds(step_peft)) for _ in range(ROUNDS)]
    ratios = [ours / peft for ours, peft in rates]
    lines = [
        "| LoRA step, kivnun/tiny-phi, float32, one thread | tokens per CPU second, median |",
        "|---|---|",
        f"| Kivnun, packed | {statistics.median(r[0] for r in rates):,.0f} |",
        f"| PEFT, padded | {statistics.median(r[1] for r in rates):,.0f} |",
        f"| ratio, median of {ROUNDS} interleaved rounds (lowest, highest) | "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f}) |",
        f"| `kivnun --help`, CPU seconds, median of 5 | {_help_seconds():.2f} |",
    ]
    _write(lines)


def _rows() -> list[TokenRow]:
    """Return rows of log-normal lengths, half of each supervised: what chat data looks like."""
    draws = np.random.default_rng(0)
    lengths = np.clip(np.exp(np.log(60) + 0.8 * draws.standard_normal(ROWS)), 8, 512).astype(int)
    return [_row(draws, int(length), number) for number, length in enumerate(lengths)]


def _row(draws: np.random.Generator, length: int, number: int) -> TokenRow:
    weights = np.zeros(length, dtype=np.float32)
    weights[length // 2 :] = 1.0
    return TokenRow(draws.integers(6, 4096, length).astype(np.int32), weights, number, Where("bench", number + 1), length // 2)


def _ours(rows: list[TokenRow]) -> Callable[[], None]:
    base = load_base(find_base("kivnun/tiny-phi"), "fp32")
    shape = AdapterShape("lora", RANK, ALPHA, 0.0, False, resolve_targets(base, "all-linear"))
    weights = AdapterWeights(base, new_adapter(base, shape, "kaiming", 0))
    trainee = TorchEngine(base).open(weights, LikelihoodObjective(), AdamWSettings(0.9, 0.999, 1e-8, 0.0), 1.0)
    total = sum(row.total_weight for row in rows)

    def step() -> None:
        for part in micro_batches(rows, 8192):
            trainee.forward_backward(pack(part), total)
        trainee.optim_step(RATE)

    return step


def _peft(rows: list[TokenRow]) -> Callable[[], None]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(find_base("kivnun/tiny-phi"), dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    longest = max(row.length for row in rows)
    ids = torch.tensor(np.array([np.pad(row.ids, (0, longest - row.length)) for row in rows]), dtype=torch.long)
    mask = torch.tensor([[1] * row.length + [0] * (longest - row.length) for row in rows])
    trained = np.array([np.pad(row.weights, (0, longest - row.length)) for row in rows]) > 0
    labels = torch.where(torch.from_numpy(trained), ids, -100)

    def step() -> None:
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _cpu_seconds(step: Callable[[], None]) -> float:
    began = time.process_time()
    for _ in range(STEPS):
        step()
    return time.process_time() - began


def _help_seconds() -> float:
    code = "import resource, subprocess, sys; "
    code += "subprocess.run([sys.executable, '-c', 'from kivnun.cli.main import main; main()', '--help'], capture_output=True); "
    code += "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(5)]
    return statistics.median(float(run) for run in runs)


def _write(lines: list[str]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "unknown"
    )
    head = f"# LoRA step beside PEFT\n\n{datetime.now(UTC):%Y-%m-%d}, commit {commit}, {cpu}, Python {platform.python_version()}, "
    text = head + f"torch {torch.__version__}. Made by `make bench`.\n\n" + "\n".join(lines) + "\n"
    path = RESULTS / f"lora_step_{datetime.now(UTC):%Y-%m-%d}.md"
    path.write_text(text, encoding="utf-8")
    print(text + f"\nwritten to {path}")


if __name__ == "__main__":
    sys.exit(main())
