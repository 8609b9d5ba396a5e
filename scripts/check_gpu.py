"""Check Kivnun on a GPU machine: against float64 on the CPU and by the facts of tests/gpu; then time every adapter; then what
leaving state in the machine's memory saves and costs.

Run from the repository root; nothing needs to be installed but torch, transformers, peft, pytest and, for ZeRO, deepspeed:
`python -m scripts.check_gpu`, or a part of it with `--only facts|speed|offload`. Each part has a limit of time, so that what hangs
is cut. With `--device cpu` it measures much smaller models, to try the script itself. How fast others are on the same work is
measured by `python -m benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from benchmarks.gpu.correct import check_all
from benchmarks.gpu.offload import measure_offload
from kivnun.data.packing import PackedBatch, pack
from kivnun.data.rows import TokenRow, Where
from kivnun.model.generate import SamplingParams, generate
from kivnun.model.load import base_from_model
from kivnun.spec import (
    AdaloraSpec,
    AdapterSpec,
    DoraSpec,
    FullSpec,
    Ia3Spec,
    LnTuningSpec,
    LohaSpec,
    LokrSpec,
    LoraSpec,
    PrefixSpec,
    PromptSpec,
    VeraSpec,
)
from kivnun.train.engine import TorchEngine
from kivnun.train.new_weights import new_weights
from kivnun.train.objectives import LikelihoodObjective
from kivnun.train.optim import AdamWSettings

if TYPE_CHECKING:
    from kivnun.model.load import Base

FACTS = Path(__file__).parent.parent / "tests" / "gpu"
PARTS = ("facts", "speed", "offload")
FACTS_S, SPEED_S, OFFLOAD_S, CASE_S = 240, 100, 170, 60  # limits; one case of the offload table
WORKERS = 12
STEPS = 6  # measured, after two that warm up
RUN = 100  # steps of the run that AdaLoRA believes to be in

LORA, DORA = LoraSpec(alpha=32.0), DoraSpec(alpha=32.0)
# What another start or rate makes of LoRA costs a step nothing, but for PiSSA's and OLoRA's, which is taken off again.
MEASURED: list[tuple[str, dict[str, AdapterSpec]]] = [
    (
        "bf16",
        {
            "lora": LORA,
            "dora": DORA,
            "lora, olora": LoraSpec(alpha=32.0, init="olora"),
            "ia3": Ia3Spec(),
            "loha": LohaSpec(alpha=16.0),
            "lokr": LokrSpec(alpha=16.0),
            "vera": VeraSpec(),
            "adalora": AdaloraSpec(alpha=24.0),
            "ln_tuning": LnTuningSpec(),
            "prompt": PromptSpec(),
            "prefix": PrefixSpec(),
        },
    ),
    ("nf4", {"lora": LORA, "dora": DORA, "ia3": Ia3Spec(), "adalora": AdaloraSpec(alpha=24.0)}),
    ("int8", {"lora": LORA}),
    ("bf16", {"full": FullSpec()}),  # it changes its base
]


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
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--json", type=Path, help="write what was found to this file too")
    arguments = parser.parse_args()
    device = str(arguments.device)
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here (torch.cuda.is_available() is false)", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    machine = f"{name} · Python {platform.python_version()} · torch {torch.__version__} · transformers {transformers.__version__}"
    _say(machine)
    found: dict[str, Any] = {"machine": machine}
    for part in PARTS if arguments.only is None else (arguments.only,):
        began = time.monotonic()
        if part == "facts":
            found[part] = _facts(device)
        elif part == "speed":
            found[part] = _speed(device, GPU if device == "cuda" else CPU)
        else:
            found[part] = measure_offload(device, time.monotonic() + OFFLOAD_S, CASE_S, _say)
        _say(f"({part}: {time.monotonic() - began:.0f} s)")
        if arguments.json is not None:  # after each part: what comes later may be cut
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    rows = [*found.get("speed", []), *found.get("offload", [])]
    facts = found.get("facts", {"status": 0, "wrong": 0})
    return int(bool(facts["status"] or facts["wrong"] or any("failed" in row for row in rows)))


def _say(line: str) -> None:
    print(line, flush=True)


def _facts(device: str) -> dict[str, Any]:
    """Compare with float64 on the CPU while pytest asks the rest; return how many were wrong, and pytest's status."""
    # Warnings are errors at home, where versions are pinned; here they are only shown.
    command = [sys.executable, "-m", "pytest", str(FACTS), "-q", "-rfEs", "--tb=short", "--no-header", "--timeout=110"]
    command += ["-o", "filterwarnings=default", "--disable-warnings", "-p", "no:cacheprovider", "--durations=8"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    given = {**os.environ, "OMP_NUM_THREADS": "1"}
    asked = subprocess.Popen(command, env=given, start_new_session=True)
    until = time.monotonic() + FACTS_S
    try:
        checks = check_all(device)
        _say("\n".join(str(check) for check in checks))
        wrong, failed = sum(not check.passed for check in checks), None
    except Exception:  # the others are still worth asking
        wrong, failed = 1, traceback.format_exc()
        _say(failed)
    try:
        status = asked.wait(timeout=max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(asked.pid, signal.SIGKILL)
        asked.wait()
        status = 124
        _say(f"the facts were cut after {FACTS_S} s")
    return {"status": status, "wrong": wrong, "failed": failed}


def _speed(device: str, size: Size) -> list[dict[str, Any]]:
    """Time generation, every adapter, then full tuning; stop beginning when time is up."""
    _say(f"\n{size.layers} layers of width {size.hidden}, {size.rows} rows of {size.row_length} tokens, all trained")
    _say(f"{'':18}{'ms/step':>9}{'tokens/s':>10}{'TFLOP/s':>9}{'peak GiB':>10}{'trained M':>11}{'first loss':>12}{'last':>8}")
    until, found = time.monotonic() + SPEED_S, []
    for precision, kinds in MEASURED:
        if time.monotonic() > until:
            _say(f"{precision}: no time was left")
            continue
        base = base_from_model(_model(device, size), precision, device)
        if not found:
            found.append(_guarded("generate", lambda base=base: _generation(base, device)))
        for kind, spec in kinds.items():
            name = kind if precision == "bf16" else f"{kind}, {precision}"
            found.append(_guarded(name, lambda base=base, spec=spec, name=name: _timed(base, name, spec, device, size)))
        del base
    return found


def _guarded(name: str, measure: Any) -> dict[str, Any]:
    """Return what is measured, or why it could not be: the others are still worth measuring."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return {"name": name, **measure()}
    except Exception as error:  # whatever it is: the table names it
        _say(f"{name:18}  {type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}")
        return {"name": name, "failed": traceback.format_exc()}


def _model(device: str, size: Size) -> Any:
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
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _rows(size: Size) -> list[TokenRow]:
    draws = np.random.default_rng(0)
    weights = np.ones(size.row_length, dtype=np.float32)
    weights[0] = 0.0
    return [
        TokenRow(draws.integers(3, size.vocabulary, size.row_length).astype(np.int32), weights, row, Where("random", row + 1), 1)
        for row in range(size.rows)
    ]


def _timed(base: Base, name: str, spec: AdapterSpec, device: str, size: Size) -> dict[str, Any]:
    rows = _rows(size)
    batch: PackedBatch = pack(rows)
    settings = AdamWSettings(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    trainee = TorchEngine(base).open(new_weights(spec, base, rows, RUN, 0), LikelihoodObjective(), settings, 1.0)
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
    matrices = sum(linear.in_features * linear.out_features for linear in base.linears.values())
    rate = (6 if name == "full" else 4) * matrices * batch.num_tokens / seconds / 1e12
    trained = trainee.trainable_parameters
    _say(
        f"{name:18}{seconds * 1e3:9.1f}{batch.num_tokens / seconds:10.0f}{rate:9.1f}{peak:10.2f}{trained / 1e6:11.3f}"
        f"{losses[0]:12.4f}{losses[-1]:8.4f}"
    )
    found = {
        "ms": seconds * 1e3,
        "tokens_per_s": batch.num_tokens / seconds,
        "peak_gib": peak,
        "trained": trained,
        "losses": losses,
    }
    return found if device == "cuda" else {**found, "peak_gib": None}


def _generation(base: Base, device: str) -> dict[str, Any]:
    prompts, new = [[1, 5, 7, 11]] * 32, 32
    generate(base, prompts, SamplingParams(2, ()))
    _wait(device)
    began = time.perf_counter()
    generate(base, prompts, SamplingParams(new, ()))
    _wait(device)
    seconds = time.perf_counter() - began
    _say(f"{'generate':18}{seconds / new * 1e3:9.1f}{len(prompts) * new / seconds:10.0f}   (ms per token of {len(prompts)} rows)")
    return {"ms_per_token": seconds / new * 1e3, "tokens_per_s": len(prompts) * new / seconds}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
