"""Whole runs on a tiny base, in this process or in one that is killed; what a test compares of two of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kivnun.artifacts import hash_file
from kivnun.events import Event, StepDone, read_events
from kivnun.pipeline import tune
from kivnun.spec import load_spec
from tiny_task import HEBREW, WORDS

Tree = dict[str, Any]
Row = dict[str, Any]

SHORT: Tree = {
    "version": 1,
    "data": {"train": "train.jsonl", "validation": 0.2},
    "adapter": {"kind": "lora", "rank": 4},
    "schedule": {"epochs": 2, "batch_rows": 4, "learning_rate": 0.01},
    "evaluation": {"samples": 0, "bootstrap": 100, "forgetting": None},
    "compute": {"kind": "local", "device": "cpu", "threads": 1},
    "seed": 7,
}


def chats(count: int = 40) -> list[Row]:
    """Return conversations of one turn, their lengths uneven."""
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join([WORDS[number % 8]] * (1 + number % 3)) + f" {number}"},
                {"role": "assistant", "content": f"{HEBREW[number % 8]} {number}"},
            ]
        }
        for number in range(count)
    ]


def prompted(rows: Sequence[Row]) -> list[Row]:
    """Return conversations with one long system message before each."""
    system = {"role": "system", "content": " ".join(WORDS * 3)}
    return [{"messages": [system, *row["messages"]]} for row in rows]


def pairs(count: int = 20) -> list[Row]:
    """Return preferences of two replies of different lengths."""
    return [
        {
            "prompt": [{"role": "user", "content": f"{WORDS[number % 8]} {number}"}],
            "chosen": HEBREW[number % 8],
            "rejected": f"no {number}",
        }
        for number in range(count)
    ]


def stranger(folder: Path) -> Path:
    """Write the configuration of a base whose layers nobody knows; return its folder."""
    folder.mkdir()
    widths = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps({"model_type": "stranger", **widths}), encoding="utf-8")
    return folder


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_spec(folder: Path, base: Path | str, rows: Sequence[Row] | None = None, /, **sections: Any) -> Path:
    """Write spec.yaml, and train.jsonl where rows are given; a section given as a mapping is laid over the short spec's own, one
    with a `kind` takes its place. Return the spec's path."""
    folder.mkdir(parents=True, exist_ok=True)
    tree: Tree = {**SHORT, "base": str(base)}
    for name, value in sections.items():
        old = tree.get(name)
        tree[name] = {**old, **value} if isinstance(value, dict) and isinstance(old, dict) and "kind" not in value else value
    if rows is not None:
        write_rows(folder / "train.jsonl", rows)
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def run_spec(
    spec: Path,
    run: Path,
    *overrides: str,
    resume: bool = False,
    listener: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Run a spec in this process, as the command does."""
    return tune(load_spec(spec, overrides), spec.read_text(encoding="utf-8"), run, resume=resume, listener=listener)


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a process forked from this one (which has the libraries loaded) and return its exit code; a signal's is
    negative. What the child raises is told on stderr, and the code is 1."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(timeout=120)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise AssertionError("the child did not end")
    return child.exitcode


def kill_self() -> None:
    """End this process as `kill -9` does: nothing is flushed, no handler runs."""
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def killed(spec: Path, run: Path, when: Callable[[Event], bool], *overrides: str, resume: bool = False) -> None:
    """Run a spec in a process that dies by SIGKILL as soon as an event fulfils `when`."""

    def listen(event: Event) -> None:
        if when(event):
            kill_self()

    code = in_child(lambda: run_spec(spec, run, *overrides, resume=resume, listener=listen))
    assert code == -signal.SIGKILL, f"the run was to be killed, it ended with {code}"


def at_step(step: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, StepDone) and event.step == step


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder, by its relative name."""
    assert folder.is_dir(), f"{folder} is missing"
    return {str(file.relative_to(folder)): hash_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def result_hashes(run: Path) -> dict[str, str]:
    """Return the hashes of what a run leaves for others to load; the card beside it tells what was measured, which may differ."""
    found = hashes(run / "adapter") if (run / "adapter").is_dir() else hashes(run / "model")
    return {name: found[name] for name in found if name != "README.md"}


def newest_checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def state_hashes(run: Path) -> Mapping[str, str]:
    """Return the hashes of the newest checkpoint's weights, moments and counters; the manifest over them holds the same."""
    return hashes(newest_checkpoint(run))


def steps_of(run: Path) -> list[StepDone]:
    """Return the steps that count, in order, without what a resumed run took back."""
    return [event for event in read_events(run / "events.jsonl") if isinstance(event, StepDone)]


def numbers_of(run: Path) -> list[tuple[int, int, float, float, float, int, int, int]]:
    """Return all of each step but when it was and how long it took."""
    return [(e.step, e.epoch, e.loss, e.grad_norm, e.learning_rate, e.rows, e.tokens, e.trained_tokens) for e in steps_of(run)]
