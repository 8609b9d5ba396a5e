"""The toy trainer: what `pipeline.tune` does to a run's folder, with a chain of hashes for a model.

The same files, events, checkpoints and answers to a signal as a real run, so that everything around a trainer can be tested in
milliseconds. Its adapter follows from seed, data and steps alone: another order or a lost step gives other bytes.
Next: `trainer.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from kivnun.artifacts import (
    MANIFEST,
    atomic_folder,
    atomic_write,
    discard,
    environment_difference,
    hash_folder,
    make_folder,
    numeric_environment,
    sweep,
)
from kivnun.errors import DataError, InterruptedRun, NonFiniteLossError, RunFolderError
from kivnun.events import (
    CheckpointSaved,
    DataLoaded,
    Evaluated,
    EventLog,
    Resumed,
    RunFinished,
    RunInterrupted,
    RunStarted,
    StepDone,
    read_events,
    utc_now,
)
from kivnun.jobs.toy import ToySpec, read_toy, rows_of, rows_of_step, tokens_of
from kivnun.train.checkpoint import CheckpointStore

EXPOSED = 3  # adapters of epochs that stay


def tune_toy(text: str, folder: Path = Path()) -> None:
    """Run a toy spec in `folder`, which holds its data; go on with what is there already. Raises KivnunError as a real run does."""
    spec, run = read_toy(text), folder / "run"
    rows = rows_of((folder / "training.jsonl").read_bytes())
    if not rows or spec.rows not in (None, len(rows)):
        raise DataError(f"training.jsonl has {len(rows)} rows, the spec says {spec.rows}", hint="judge the file again")
    asked: list[int] = []
    if not spec.ignores_stop:
        signal.signal(signal.SIGTERM, lambda number, _frame: asked.append(number))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    make_folder(run)
    if (run / MANIFEST).is_file():
        return
    sweep(run)
    with EventLog(run / "events.jsonl", utc_now) as log:
        _Toy(spec, folder, run, rows, log, asked).execute()


@dataclass
class _Toy:
    spec: ToySpec
    folder: Path
    run: Path
    rows: list[bytes]
    log: EventLog
    asked: list[int]

    def execute(self) -> None:
        spec, held_out = self.spec, self.folder / "validation.jsonl"
        self.log.append(RunStarted(run="run", spec_hash=hashlib.sha256(spec.to_yaml().encode()).hexdigest()))
        tokens = sum(map(tokens_of, self.rows))
        num_held_out = len(rows_of(held_out.read_bytes())) if held_out.is_file() else 0
        self.log.append(DataLoaded("messages", len(self.rows), num_held_out, tokens, tokens, 0, 0))
        store = CheckpointStore(self.run / "checkpoints", keep=2)
        step, state = self._restored(store)
        steps = spec.steps_of(len(self.rows))
        per_epoch = steps // spec.epochs
        while step < steps:
            step += 1
            state = self._step(step, steps, (step - 1) // per_epoch, state)
            ends_epoch = step % per_epoch == 0
            if ends_epoch and num_held_out and step < steps:
                self._evaluate(step, state, num_held_out)
            every = spec.checkpoint_every_steps
            stop = bool(self.asked) and step < steps
            if stop or ends_epoch or (every is not None and step % every == 0):
                self._save(store, step, steps, state, "exposed" if ends_epoch else "stopped" if stop else None)
            if stop:
                self.log.append(RunInterrupted(step=step))
                raise InterruptedRun(f"stopped after step {step} of {steps}, which is saved", hint="go on with --resume")
        with atomic_folder(self.run / "adapter") as place:
            write_adapter(place, state)
        if num_held_out:
            self._evaluate(step, state, num_held_out)
        done = [event for event in read_events(self.run / "events.jsonl") if isinstance(event, StepDone)]
        self.log.append(RunFinished("succeeded", steps, sum(event.trained_tokens for event in done), 0.0, 0))
        atomic_write(self.run / MANIFEST, "{}\n")

    def _restored(self, store: CheckpointStore) -> tuple[int, bytes]:
        store.recover()
        checkpoint = store.latest()
        if checkpoint is not None:
            changed = environment_difference(checkpoint.fields["environment"], _environment())
            if changed:
                raise RunFolderError(f"run cannot be resumed to the same bits: {'; '.join(changed)}", hint="start over")
            self.log.append(Resumed(step=checkpoint.step, path=f"checkpoints/{checkpoint.path.name}"))
            return checkpoint.step, bytes.fromhex((checkpoint.path / "state").read_text(encoding="ascii"))
        if any(isinstance(event, StepDone) for event in read_events(self.run / "events.jsonl")):
            self.log.append(Resumed(step=0, path=""))
        start = self.folder / "start"
        parts = [str(self.spec.seed), *(hashlib.sha256(row).hexdigest() for row in self.rows)]
        parts += [hash_folder(start)] if start.is_dir() else []
        return 0, hashlib.sha256("\n".join(parts).encode()).digest()

    def _step(self, step: int, steps: int, epoch: int, state: bytes) -> bytes:
        began = time.monotonic()
        if step == self.spec.dies_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.spec.fails_at_step:
            raise NonFiniteLossError(f"the loss of step {step} is nan; rows in it: training.jsonl:1", hint="nothing was updated")
        rows = rows_of_step(self.spec, self.rows, step)
        state = hashlib.sha256(b"".join([state, step.to_bytes(8, "big"), *rows])).digest()
        time.sleep(self.spec.seconds_of(step))
        tokens = sum(map(tokens_of, rows))
        self.log.append(
            StepDone(
                step=step, steps=steps, epoch=epoch, loss=2.0 * (1 - step / (steps + 1)) + state[0] / 1000, grad_norm=1.0,
                learning_rate=0.001, rows=len(rows), tokens=tokens, trained_tokens=tokens, computed_tokens=tokens,
                seconds=time.monotonic() - began,
            )
        )  # fmt: skip
        return state

    def _evaluate(self, step: int, state: bytes, rows: int) -> None:
        self.log.append(Evaluated("tuned", step, 1.0 + state[1] / 1000, rows, {}, {}, []))

    def _save(self, store: CheckpointStore, step: int, steps: int, state: bytes, shown: str | None) -> None:
        if shown is not None and step < steps:
            place = self.run / shown
            with atomic_folder(place / f"step-{step:06d}") as adapter:
                write_adapter(adapter, state)
            for old in sorted(place.glob("step-*"))[:-EXPOSED]:
                discard(old)
        self.log.sync()
        path = store.save(step, lambda folder: _write_state(folder, state), {"environment": _environment()})
        self.log.append(CheckpointSaved(step=step, path=f"checkpoints/{path.name}", seconds=0.0))


def _environment() -> dict[str, Any]:
    return numeric_environment(1, "cpu")


def _write_state(folder: Path, state: bytes) -> None:
    (folder / "state").write_text(state.hex(), encoding="ascii")


def write_adapter(folder: Path, state: bytes) -> None:
    """Write a state as an adapter's files."""
    save_file({"toy": np.frombuffer(state, dtype=np.uint8)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "TOY"}) + "\n", encoding="utf-8")
