"""One process of a case: `python -m benchmarks.plan.worker MODEL_FOLDER CASE_JSON OUT`, under torchrun where there are several.

It goes the way of `kivnun tune`: the allocator's thresholds, the imports, the resolved spec, the base, the trainee, `fit`. What it
does not have is text: rows are random tokens. Memory is the kernel's count of the process's resident bytes. Seconds are of the CPU,
user and system, of all threads. Between steps a short product says how fast the core is at the moment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from benchmarks.plan.cases import MODELS, NEW_TOKENS, PROMPTS, SCORED_ROWS, Case
from kivnun.cli.process import give_back_memory, keep_freed_memory, set_threads

PRODUCTS = 5  # whose median says how fast the core is


def main() -> None:
    folder, case, out = Path(sys.argv[1]), Case(**json.loads(sys.argv[2])), Path(sys.argv[3])
    _ = give_back_memory() if case.processes > 1 else keep_freed_memory()
    set_threads(1)
    import kivnun.pipeline  # noqa: F401  # all that a run imports at its start
    from kivnun.model.kernels import choose

    choose("auto", "cpu")
    idle, idle_cpu = resident_bytes(), time.process_time()
    with _together(case) as processes:
        found = {"idle": idle, "start_cpu_s": idle_cpu, **measured(folder, case, processes)}
        everyone = processes.all_of(found)
    if int(os.environ.get("RANK", "0")) == 0:
        out.write_text(json.dumps({"processes": everyone}), encoding="utf-8")


@contextmanager
def _together(case: Case):
    from kivnun.train.processes import OneProcess, joined

    if case.processes == 1:
        yield OneProcess()
        return
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with joined("cpu", case.processes) as processes:
        yield processes


def measured(folder: Path, case: Case, processes) -> dict[str, object]:
    """Return what this process of a case took. Types are torch's, which is imported inside."""
    from kivnun.model.load import load_base
    from kivnun.parts import open_engine, optimizer_settings, peak_memory
    from kivnun.train.new_weights import new_weights
    from kivnun.train.objectives import LikelihoodObjective
    from kivnun.train.weights import LiveWeights

    spec = resolved(case)
    rows = token_rows(case)
    began = time.process_time()
    base = load_base(folder, case.precision, recompute=case.recompute, packed=case.packed)
    loaded = {"load_cpu_s": time.process_time() - began, "loaded": resident_bytes(), "load_peak": peak_memory("cpu")}
    engine = open_engine(spec, base, processes)
    live = case.kind == "full" and case.zero_stage > 0
    weights = LiveWeights(base) if live else new_weights(spec.adapter, base, rows, case.steps, 0)
    settings = optimizer_settings(spec.schedule.optimizer)
    trainee = engine.open(weights, LikelihoodObjective(), settings, spec.schedule.max_grad_norm)
    opened = {"opened": resident_bytes(), "opened_cpu_s": time.process_time()}
    steps = _trained(trainee, rows, case)
    taken = {"peak": peak_memory("cpu"), "trained": trainee.trainable_parameters, "whole_cpu_s": time.process_time()}
    after = {} if case.processes > 1 else _scored(trainee, rows, case)
    return {**loaded, **opened, **steps, **taken, **after}


def resolved(case: Case):
    """Return the spec of a case with every choice made."""
    from kivnun.spec.read import parse_spec
    from kivnun.spec.resolve import ResolveFacts, resolve

    compute = f"{{kind: multi_process, processes: {case.processes}, zero_stage: {case.zero_stage}}}"
    text = f"version: 1\nbase: kivnun/tiny-phi\ndata: {{train: rows.jsonl}}\nadapter: {{kind: {case.kind}}}\n"
    text += f"schedule: {{steps: {case.steps}, batch_rows: {case.rows}}}\n"
    text += f"compute: {compute}\n" if case.processes > 1 else ""
    facts = ResolveFacts("supervised", 4096, max(case.lengths()), case.sizes.numbers, "cpu", 1, "messages")
    return resolve(parse_spec(text, folder=Path(".")), facts)[0]


def token_rows(case: Case):
    """Return rows of random tokens, the second half of each trained."""
    import numpy as np

    from kivnun.data.rows import TokenRow, Where
    from kivnun.randomness import generator

    draws, rows = generator(0, "plan rows"), []
    for number, length in enumerate(case.lengths()):
        weights = np.zeros(length, dtype=np.float32)
        weights[length // 2 :] = 1.0
        ids = draws.integers(3, MODELS[case.model].vocab, length).astype(np.int32)
        rows.append(TokenRow(ids, weights, number, Where("made", number + 1), length // 2))
    return rows


class NoSaver:
    """Keeps nothing: what checkpoints cost is not asked."""

    def after_step(self, step: int, epoch_ended: bool) -> None:
        """Save nothing."""

    def now(self, step: int) -> None:
        """Save nothing."""


def _trained(trainee, rows, case: Case) -> dict[str, object]:
    """Train by the loop of a run, and return the CPU seconds of every step, with the core's speed around it."""
    from kivnun.train.loop import fit
    from kivnun.train.passes import PassBudget
    from kivnun.train.schedule import Schedule

    seconds: list[float] = []
    flops = [core_flops(case.precision)]
    began = [time.process_time()]

    def stepped(_event: object) -> None:
        seconds.append(time.process_time() - began[0])
        flops.append(core_flops(case.precision))
        began[0] = time.process_time()

    fit(
        trainee,
        rows,
        case.order(),
        Schedule(case.steps, 1e-4, 0.0, "constant", 0.0, 1.0),
        PassBudget(case.pass_tokens),
        emit=stepped,
        evaluate=lambda step: None,
        evaluate_every_steps=case.steps,
        saver=NoSaver(),
        stop_requested=lambda: False,
    )
    return {"step_cpu_s": seconds, "flops": flops}


def _scored(trainee, rows, case: Case) -> dict[str, object]:
    """Return the CPU seconds of scoring some rows and of some replies, as evaluations make them."""
    from kivnun.evaluate.heldout import held_out_nll
    from kivnun.model.generate import SamplingParams

    began = time.process_time()
    held_out_nll(trainee, rows[:SCORED_ROWS], case.pass_tokens)
    scored = time.process_time() - began
    began = time.process_time()
    trainee.sample([row.ids[: row.prompt_len].tolist() for row in rows[:PROMPTS]], SamplingParams(NEW_TOKENS, ()))
    return {"score_cpu_s": scored, "generate_cpu_s": time.process_time() - began, "flops_after": core_flops(case.precision)}


def core_flops(precision: str) -> float:
    """Return this core's operations in a CPU second at the product that `plan.time.machine_speed` takes."""
    import torch

    from kivnun.model.load import DTYPES
    from kivnun.model.speed import INPUTS, OUTPUTS, TOKENS

    x_TI, w_OI = (torch.ones(size, INPUTS, dtype=DTYPES[precision]) for size in (TOKENS, OUTPUTS))
    spent = []
    for _ in range(PRODUCTS):
        began = time.process_time()
        torch.mm(x_TI, w_OI.T)
        spent.append(time.process_time() - began)
    return 2.0 * TOKENS * INPUTS * OUTPUTS / sorted(spent)[PRODUCTS // 2]


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
