"""What a job will be, from its wish and its files: numbers for every `auto`, the spec that its worker runs, what that will take.

    files -> examples (`examples_report.py`) -> hyperparameters -> spec -> plan (kivnun/plan)

Loads no torch. Asked by the duty that validates jobs (`validating.py`) and by dry runs (`dry_run.py`), so that both say the same.
"""

from __future__ import annotations

import functools
import math
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np

from kivnun.data.template import load_tokenizer
from kivnun.data.tokens import RowTokenizer, make_drafts
from kivnun.errors import BaseModelError, DataError, IntegrityError, SpecError
from kivnun.jobs.config import BaseEntry, ServiceConfig
from kivnun.jobs.toy import ToySpec
from kivnun.jobs.tuning import Job
from kivnun.plan.bases import BaseFiles, base_files
from kivnun.plan.devices import Device, find_device, has_gpu, this_machine
from kivnun.plan.plan import longest_of, make_plan, question_with
from kivnun.plan.rows import LETTERS_A_TOKEN, RunRows
from kivnun.plan.time import machine_speed
from kivnun.plan.verdict import Plan, Question
from kivnun.service import hyperparameters
from kivnun.service.estimating import EstimatingTokenizer, ToyRows
from kivnun.service.examples_report import Examples, Reader
from kivnun.service.hyperparameters import Hyperparameters
from kivnun.spec import parse_spec, resolve
from kivnun.spec.tune import OBJECTIVE_OF_FORMAT
from kivnun.spec.yaml_text import write_yaml

TRAINING, VALIDATION, START = "training.jsonl", "validation.jsonl", "start"
FEWEST_EXAMPLES = 10
SAVED_EVERY_S = 30.0
CHECKPOINTS_SHOWN = 3
TOY_STEP_S = 0.001
TOY_LONGEST = 1 << 20
WANTED = {"supervised": "conversations (messages) or prompts with completions", "dpo": "preferences"}


class JobRefused(Exception):
    """A job whose files or wishes cannot be carried out: what its `error` says."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


@dataclass(frozen=True)
class Outlook:
    """What a job will be. `spec` is YAML; `planned_tokens` are those trained in all epochs; `seconds` is None where nobody knows;
    `plan` is None for a toy."""

    hyperparameters: Hyperparameters
    examples: Examples
    spec: str
    total_steps: int
    planned_tokens: int
    seconds: float | None
    plan: Plan | None
    counted: bool

    def facts(self) -> dict[str, Any]:
        """Return what a job keeps of it (`jobs.tuning.Job.facts`), without the report."""
        rows = self.examples.rows
        assert rows is not None
        return {
            "learning_rate": self.hyperparameters.learning_rate,
            "examples": self.examples.examples,
            "held_out": self.examples.held_out,
            "tokens": rows.tokens,
            "trained_tokens": rows.trained_tokens,
            "truncated": self.examples.truncated,
            "refused": self.examples.refused.lines,
            "overlap": self.examples.overlap,
        }


def check_quota(found: Outlook, most: int | None) -> None:
    """Raise JobRefused for a job that would train more tokens than one job of its tenant may."""
    if most is not None and found.planned_tokens > most:
        raise JobRefused(
            "exceeded_quota",
            f"the job would train {found.planned_tokens:,} tokens, and {most:,} are allowed in one job: ask for fewer epochs, or "
            "send fewer examples",
            "training_file",
        )


Machine = Callable[[Question], Question]
"""Tells a question how fast the machine is that it is about."""


def outlook(job: Job, config: ServiceConfig, folder: Path, report: TextIO, machine: Machine, whole: float = 1.0) -> Outlook:
    """Return what a job will be. `folder` holds its files, and the adapter it continues, by the names above.

    `whole` is how many times as long the training file is as what of it lies there. Raises JobRefused."""
    entry = config.bases[job.base]
    validation = folder / VALIDATION if job.validation_file is not None else None
    try:
        files = None if entry.trainer == "toy" else base_files(config.model_of(job.base), entry.revision)
        read = [folder / TRAINING, *([] if validation is None else [validation])]
        reader = _toy_reader(job, entry, read) if files is None else _reader(job, entry, files)
        examples = reader.read(folder / TRAINING, validation, report)
    except DataError as error:
        raise JobRefused("invalid_training_file", error.message, "training_file") from None
    except BaseModelError as error:
        said = error.message.replace(config.model_of(job.base), job.base)  # where the operator keeps it is nobody's business
        raise JobRefused("model_not_available", f"the base of this job cannot be used here: {said}", "model") from None
    examples = _scaled(examples, whole)
    _check(job, examples, reader)
    assert examples.rows is not None
    if files is None:
        return _toy(job, examples, examples.rows)
    return _planned(job, entry, config.model_of(job.base), files, examples, examples.rows, reader, folder, machine)


def this_machine_asked(question: Question) -> Question:
    """Return a question with the speed of this machine's processor, where that is what it is about."""
    if question.device.kind != "cpu" or question.sizes is None:
        return question
    spec, _ = resolve(question.spec, question.facts)
    return replace(question, here=replace(question.here, speed=_speed("fp32" if spec.base.precision == "fp32" else "bf16")))


@functools.cache
def _speed(precision: str) -> float:
    try:
        return machine_speed(precision)
    except (subprocess.SubprocessError, OSError, ValueError):
        return 1.0  # as the reference machine: an estimate is better than none


@functools.cache
def device_here() -> Device:
    """Return what a run takes on this machine."""
    return find_device("cuda") if has_gpu() else this_machine()


def _reader(job: Job, entry: BaseEntry, files: BaseFiles) -> Reader:
    longest = min(entry.max_seq_len or longest_of(files), longest_of(files))
    tokenizer = _tokenizer(files)
    used = tokenizer or EstimatingTokenizer(LETTERS_A_TOKEN)
    return Reader(lambda record: make_drafts(record, used), longest, _truncates(job), tokenizer is not None)


def _toy_reader(job: Job, entry: BaseEntry, read: Sequence[Path]) -> Reader:
    return Reader(ToyRows.of(read).drafts, entry.max_seq_len or TOY_LONGEST, _truncates(job))


def _truncates(job: Job) -> bool:
    return job.extensions.get("x_over_long") == "truncate"


def _tokenizer(files: BaseFiles) -> RowTokenizer | None:
    if files.folder is None or not (files.folder / "tokenizer.json").is_file():
        return None
    return load_tokenizer(files.folder)


def _check(job: Job, examples: Examples, reader: Reader) -> None:
    """Raise JobRefused for files that the job cannot be trained on, the training file first."""
    _check_format(job, examples.format, "training_file", "training")
    if job.validation_file is not None:
        _check_format(job, examples.validation_format, "validation_file", "validation")
        if examples.validation_format != examples.format:
            raise JobRefused(
                "invalid_validation_file",
                f"the validation file holds {examples.validation_format} and the training file {examples.format}: give both in one "
                "format",
                "validation_file",
            )
    for refused, param in ((examples.refused, "training_file"), (examples.validation_refused, "validation_file")):
        if not refused.lines:
            continue
        name = param.replace("_", " ")
        if refused.too_long == refused.lines:
            cut = "" if job.method["type"] == "dpo" or reader.truncate else ", or send x_over_long: truncate"
            raise JobRefused(
                "context_length_exceeded",
                f"{refused.lines:,} examples of the {name} are longer than {reader.max_seq_len:,} tokens: {refused.words()}. "
                f"Shorten them{cut}",
                param,
            )
        raise JobRefused(f"invalid_{param}", f"{refused.lines:,} lines of the {name} cannot be used: {refused.words()}", param)
    if examples.examples < FEWEST_EXAMPLES:
        raise JobRefused(
            "invalid_n_examples",
            f"Training file has {examples.examples} example(s), but must have at least {FEWEST_EXAMPLES} examples",
            "training_file",
        )


def _check_format(job: Job, found: str, param: str, name: str) -> None:
    method = job.method["type"]
    if OBJECTIVE_OF_FORMAT.get(found) != method:
        raise JobRefused(
            f"invalid_{param}", f"the method {method} needs {WANTED[method]}, and the {name} file holds {found}", param
        )


def _scaled(examples: Examples, whole: float) -> Examples:
    """Return what a file holds of which a part was read, taken to go on as it began."""
    if whole <= 1 or examples.rows is None:
        return examples
    rows = examples.rows
    count = round(len(rows.lengths) * whole)
    sides_each = len(rows.sides) // len(rows.lengths)
    lengths = np.resize(rows.lengths, count)
    trained = round((rows.trained_tokens or 0) * float(lengths.sum()) / max(1, rows.tokens))
    rows = replace(
        rows,
        lengths=lengths,
        sides=np.resize(rows.sides, count * sides_each),
        sizes=(count,),
        trained_tokens=trained,
        counted=False,
    )
    return replace(examples, rows=rows, examples=round(examples.examples * whole))


def _toy(job: Job, examples: Examples, rows: RunRows) -> Outlook:
    found = hyperparameters.resolve(job.method["type"], _asked(job), examples.examples, None)
    count = len(rows.lengths)
    spec = ToySpec(seed=job.seed, epochs=found.n_epochs, batch_rows=found.batch_size, rows=count)
    assert rows.trained_tokens is not None
    steps, tokens = spec.steps_of(count), found.n_epochs * rows.trained_tokens
    return Outlook(found, examples, spec.to_yaml(), steps, tokens, steps * TOY_STEP_S, None, rows.counted)


def _planned(
    job: Job,
    entry: BaseEntry,
    model: str,
    files: BaseFiles,
    examples: Examples,
    rows: RunRows,
    reader: Reader,
    folder: Path,
    machine: Machine,
) -> Outlook:
    try:
        # The rate hangs on the size of the base, which the question knows; the question needs a spec that can be read.
        first = hyperparameters.resolve(job.method["type"], _asked(job), examples.examples, None)
        question = question_with(_read(_tree(job, entry, model, first, examples, reader), folder), device_here(), files, rows)
        found = hyperparameters.resolve(job.method["type"], _asked(job), examples.examples, question.facts.base_parameters)
        _check_targets(job, question)
        tree = _tree(job, entry, model, found, examples, reader)
        plan = make_plan(machine(replace(question, spec=_read(tree, folder))))
    except SpecError as error:
        raise JobRefused("invalid_value", error.message, "x_lora" if "adapter" in error.message else None) from None
    except (BaseModelError, IntegrityError) as error:
        raise JobRefused("model_not_available", error.message, "model") from None
    seconds = None if plan.forecast is None or math.isnan(plan.forecast.seconds) else plan.forecast.seconds
    assert rows.trained_tokens is not None
    tokens = found.n_epochs * rows.trained_tokens
    return Outlook(found, examples, write_yaml(tree), plan.steps.count, tokens, seconds, plan, rows.counted)


def _check_targets(job: Job, question: Question) -> None:
    """Raise JobRefused for a module that the base has not, where its layers are known."""
    wanted = (job.extensions.get("x_lora") or {}).get("targets")
    if question.sizes is None or not isinstance(wanted, list):
        return
    linears = question.sizes.linears
    for name in cast("list[str]", wanted):
        if not any(linear == name or linear.endswith(f".{name}") for linear in linears):
            known = ", ".join(dict.fromkeys(linear.rpartition(".")[2] for linear in linears))
            raise JobRefused("invalid_value", f"x_lora.targets names {name!r}, and {job.base} has {known}", "x_lora.targets")


def _read(tree: Mapping[str, object], folder: Path) -> Any:
    return parse_spec(write_yaml(tree), folder=folder, source="the job's spec")


def _tree(job: Job, entry: BaseEntry, model: str, found: Hyperparameters, examples: Examples, reader: Reader) -> dict[str, object]:
    """Return the spec of a job as plain values. Paths are names in the folder that the worker gives the run."""
    dpo = job.method["type"] == "dpo"
    base = {"model": model, "precision": entry.precision} | ({} if entry.revision is None else {"revision": entry.revision})
    return {
        "version": 1,
        "base": base,
        "data": {
            "train": TRAINING,
            "validation": VALIDATION if job.validation_file is not None else None,
            "format": examples.format,
            "max_seq_len": reader.max_seq_len,
            "over_long": "truncate" if reader.truncate and not dpo else "refuse",
        },
        "adapter": _adapter(job, entry),
        "objective": {"kind": "dpo", "beta": found.beta} if dpo else {"kind": "supervised"},
        "schedule": {"epochs": found.n_epochs, "batch_rows": found.batch_size, "learning_rate": found.learning_rate},
        "evaluation": {"samples": 0, "forgetting": None},
        "checkpoints": {"every_epoch": True, "every_seconds": SAVED_EVERY_S, "keep": CHECKPOINTS_SHOWN},
        "seed": job.seed,
    }


def _adapter(job: Job, entry: BaseEntry) -> dict[str, object]:
    if _continues(job):
        return {"kind": "lora", "start_from": START}
    asked = job.extensions.get("x_lora") or {}
    given = {"alpha": asked.get("alpha"), "target_modules": asked.get("targets")}
    return {"kind": "lora", "rank": asked.get("rank", entry.rank)} | {key: it for key, it in given.items() if it is not None}


def _continues(job: Job) -> bool:
    return job.model.startswith("ft:")


def _asked(job: Job) -> Mapping[str, Any]:
    return job.method[job.method["type"]]["hyperparameters"]
