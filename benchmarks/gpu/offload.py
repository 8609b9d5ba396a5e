"""What leaving state in the machine's memory saves on a GPU, and what it costs: full tuning under ZeRO beside LoRA and QLoRA.

One launch per row, one process each: `measure_offload` starts them, `python -m benchmarks.gpu.offload DEVICE CASE_JSON` is one of
them. The model has Phi-3's make and about a billion random weights in bfloat16; every token is trained.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.engine.workload import Model

ROOT = Path(__file__).parents[2]
SHAPES = {
    "cuda": Model(hidden=2048, layers=14, heads=16, kv_heads=8, mlp=8192, vocab=32064),
    "cpu": Model(hidden=128, layers=2, heads=4, kv_heads=2, mlp=320, vocab=1003),
}
ROWS = {"cuda": (16, 512), "cpu": (2, 32)}
STEPS = 3  # measured, after one that warms up


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table. Stage 0: without DeepSpeed."""

    kind: Literal["full", "lora"]
    precision: Literal["bf16", "nf4"]
    stage: int = 0
    offload: str = "none"

    @property
    def name(self) -> str:
        what = self.kind if self.precision == "bf16" else f"{self.kind} {self.precision}"
        shape = "one process" if self.stage == 0 else f"ZeRO-{self.stage}"
        return f"{what}, {shape}" + (f", {self.offload} in memory" if self.offload != "none" else "")


CASES = [
    Case("full", "bf16"),
    Case("full", "bf16", 3, "optimizer"),
    Case("full", "bf16", 3, "parameters"),
    Case("lora", "bf16"),
    Case("lora", "nf4"),
    Case("full", "bf16", 3),
    Case("full", "bf16", 2, "optimizer"),
    Case("lora", "bf16", 3, "parameters"),
    Case("lora", "nf4", 3, "parameters"),
    Case("full", "bf16", 2),
]


def measure_offload(device: str, until: float, each_s: float, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return a row for each case that was begun before `until` (monotonic seconds), telling each; one that failed says why."""
    tell(f"\n{_parameters(device) / 1e6:.0f} M weights, bf16, {ROWS[device][0]} rows of {ROWS[device][1]} tokens a step")
    tell(f"{'':38}{'ms/step':>9}{'GPU GiB':>9}{'opened':>8}{'host GiB':>9}{'loss':>8}{'last':>8}")
    found: list[dict[str, Any]] = []
    for case in CASES:
        left = until - time.monotonic()
        row = _launched(device, case, min(each_s, left)) if left > 15 else {"failed": "no time was left"}
        found.append({"case": case.name, **row})
        tell(f"{case.name:38}{_line(row)}")
    return found


def _parameters(device: str) -> int:
    shape = SHAPES[device]
    return shape.linear_parameters + 2 * shape.vocab * shape.hidden


def _line(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return f"  {row['failed']}"
    gib = (row[name] / 2**30 for name in ("peak_bytes", "opened_bytes", "host_bytes"))
    return f"{row['ms']:9.0f}{next(gib):9.2f}{next(gib):8.2f}{next(gib):9.2f}{row['losses'][0]:8.3f}{row['losses'][-1]:8.3f}"


def _launched(device: str, case: Case, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu.offload", device, json.dumps(asdict(case))]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    try:
        ended = subprocess.run(command, env=given, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"failed": f"cut after {timeout_s:.0f} s"}
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    if ended.returncode or not lines:
        return {"failed": (ended.stderr.strip().splitlines() or ["no word"])[-1][:160], "said": ended.stderr[-3000:]}
    return json.loads(lines[-1])


def main() -> None:
    device, case = sys.argv[1], Case(**json.loads(sys.argv[2]))
    if case.stage == 0:
        print(json.dumps(_measured(device, case, None)))
        return
    from kivnun.train.processes import joined

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    with joined(device, 1) as processes:
        print(json.dumps(_measured(device, case, processes)))


def _measured(device: str, case: Case, processes: Any) -> dict[str, Any]:
    import torch

    from kivnun.data.packing import pack

    before = _held(device)
    trainee = _opened(device, case, processes)
    batch = pack(_rows(device))
    opened = torch.cuda.memory_allocated() if device == "cuda" else 0
    losses, seconds = [], []
    for step in range(STEPS + 1):
        if device == "cuda" and step == 1:
            torch.cuda.reset_peak_memory_stats()
        with _timed(device, seconds):
            losses.append(trainee.forward_backward(batch, batch.total_weight))
            trainee.optim_step(1e-4)
    return {
        "ms": sorted(seconds[1:])[STEPS // 2] * 1e3,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        "opened_bytes": opened,
        "host_bytes": _held(device) - before,
        "losses": losses,
        "trained": trainee.trainable_parameters,
    }


def _opened(device: str, case: Case, processes: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.gpu.shapes import config_of
    from kivnun.model.adapters import AdapterShape, new_adapter, resolve_targets
    from kivnun.model.load import base_from_model
    from kivnun.spec.sharding import LEAST_ELEMENTS, PERSISTENT_ELEMENTS
    from kivnun.train.deepspeed_settings import ShardSettings
    from kivnun.train.engine import TorchEngine
    from kivnun.train.objectives import LikelihoodObjective
    from kivnun.train.optim import AdamWSettings
    from kivnun.train.weights import AdapterWeights, FullWeights, LiveWeights

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(SHAPES[device], False), dtype=torch.bfloat16)
    base = base_from_model(model, case.precision, device)
    if case.kind == "full":
        weights: Any = LiveWeights(base) if case.stage else FullWeights(base)
    else:
        shape = AdapterShape("lora", 16, 32.0, 0.0, False, resolve_targets(base, "all-linear"))
        weights = AdapterWeights(base, new_adapter(base, shape, "kaiming", 0))
    objective, settings = LikelihoodObjective(), AdamWSettings(0.9, 0.999, 1e-8, 0.0)
    if case.stage == 0:
        return TorchEngine(base).open(weights, objective, settings, 1.0)
    from kivnun.train.deepspeed_engine import DeepSpeedEngine

    size = _parameters(device)
    bucket, group = max(LEAST_ELEMENTS, size // 50), max(LEAST_ELEMENTS, size // 20)
    sharding = ShardSettings(case.stage, case.offload, bucket, group, bucket, PERSISTENT_ELEMENTS)
    return DeepSpeedEngine(base, sharding, processes).open(weights, objective, settings, 1.0)


def _rows(device: str) -> list[Any]:
    import numpy as np

    from kivnun.data.rows import TokenRow, Where

    draws, (count, length) = np.random.default_rng(0), ROWS[device]
    weights = np.ones(length, dtype=np.float32)
    weights[0] = 0.0
    vocabulary = SHAPES[device].vocab
    return [
        TokenRow(draws.integers(3, vocabulary, length).astype(np.int32), weights, row, Where("random", row + 1), 1)
        for row in range(count)
    ]


@contextmanager
def _timed(device: str, seconds: list[float]) -> Iterator[None]:
    import torch

    began = time.perf_counter()
    yield
    if device == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)


def _held(device: str) -> int:
    """Return the bytes of memory in use: the machine's (what is pinned for a GPU is no process's), on a CPU this process's."""
    file, names = ("/proc/meminfo", ("MemTotal:", "MemAvailable:")) if device == "cuda" else ("/proc/self/status", ("VmRSS:",))
    lines = (line.split() for line in Path(file).read_text(encoding="ascii", errors="replace").splitlines())
    sizes = {line[0]: int(line[1]) * 1024 for line in lines if line and line[0] in names}
    return sizes[names[0]] - sum(sizes[name] for name in names[1:])


if __name__ == "__main__":
    main()
