"""The runs that the table rests on: one job each, done in a process of its own kind, kept as one file, never done twice.

A job is named by what it is. Its file appears when it is done; what it needed on the way is thrown away.
Next: `plan.py` (which jobs there are), `work.py` (who does them).
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from kivnun.artifacts import atomic_write, make_folder
from kivnun.evaluate.evaluation import Evaluation, load_evaluation
from kivnun.evaluate.metrics import Measure
from kivnun.events import AdapterOpened, Evaluated, Event, StepDone
from kivnun.matrix.methods import METHODS

Kind = Literal["base", "sweep", "score", "cost"]
DEV_SHARE = 0.15  # of the training rows, on which a sweep chooses its rate
COST_POINTS = 20  # looks at the validation loss in a run that measures cost


@dataclass(frozen=True, slots=True)
class Job:
    """One run: the base scored, a rate tried, a method scored, or its cost measured."""

    kind: Kind
    task: str
    method: str
    rate: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        parts = [self.kind, self.task, self.method]
        if self.kind != "base":
            parts += [f"rate-{self.rate:g}", f"seed-{self.seed}"]
        return "/".join(parts)


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a job. `cpu_s` is of training alone; `trace` holds (step, validation nll, cpu seconds of training so far)."""

    job: Job
    figures: dict[str, float]
    base: dict[str, float]
    trainable: int
    steps: int
    trained_tokens: int
    cpu_s: float
    trace: list[tuple[int, float, float]]
    measures: dict[str, Measure]


def result_path(folder: Path, job: Job) -> Path:
    return folder / "runs" / f"{job.name}.json"


def read_done(folder: Path, job: Job) -> Done | None:
    """Return a job's result, or None when it is not done."""
    path = result_path(folder, job)
    if not path.is_file():
        return None
    held = json.loads(path.read_text(encoding="utf-8"))
    measures = {name: Measure(name, np.array(rows, dtype=np.float64)) for name, rows in held.pop("measures").items()}
    held["job"], held["trace"] = Job(**held["job"]), [tuple(point) for point in held["trace"]]
    return Done(measures=measures, **held)


def do(folder: Path, job: Job) -> None:
    """Do a job and keep its result; one that is there already is left. Called in a worker process."""
    if result_path(folder, job).is_file():
        return
    work = folder / "work" / job.name.replace("/", "_")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    done = _score_base(folder, job, work) if job.kind == "base" else _train(folder, job, work)
    record = {**asdict(done), "measures": {name: measure.rows_ND.tolist() for name, measure in done.measures.items()}}
    path = result_path(folder, job)
    make_folder(path.parent)
    atomic_write(path, json.dumps(record, ensure_ascii=False) + "\n")
    shutil.rmtree(work, ignore_errors=True)


def base_evaluation(folder: Path, task: str, precision: str) -> Path:
    return folder / "bases" / f"{task}_{precision}.json"


def spec_tree(folder: Path, job: Job) -> dict[str, Any]:
    """Return the spec of a job: the task's own, with the method's adapter and what the kind of job asks for."""
    data = folder / "data" / job.task
    tree: dict[str, Any] = yaml.safe_load((data / "spec.yaml").read_text(encoding="utf-8"))
    method = METHODS[job.method]
    base = tree["base"] if isinstance(tree["base"], dict) else {"model": tree["base"]}
    tree["base"] = {**base, "precision": method.precision}
    tree["adapter"], tree["seed"] = method.adapter, job.seed
    tree["schedule"] = {**tree["schedule"], "learning_rate": job.rate or None}
    tree["data"] = {**tree["data"], "train": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl")}
    tree["evaluation"] = {**tree.get("evaluation", {}), "samples": 0, "bootstrap": 100, "forgetting": None}
    tree["checkpoints"] = {"every_epoch": False, "every_seconds": None}
    tree["compute"] = {"kind": "local", "device": "cpu", "threads": 1}
    if job.kind == "sweep":
        tree["data"]["validation"] = DEV_SHARE
    if job.kind in ("sweep", "cost"):
        tree["evaluation"]["metrics"] = []
    return tree


def _score_base(folder: Path, job: Job, work: Path) -> Done:
    """Score the base on a task's held-out rows, in the precision of the method."""
    from kivnun.pipeline import score_base

    path = base_evaluation(folder, job.task, METHODS[job.method].precision)
    path.parent.mkdir(parents=True, exist_ok=True)
    scored = score_base(_spec(folder, job, work), path)
    figures = _figures(scored)
    return Done(job, figures, figures, 0, 0, 0, 0.0, [], scored.measures)


def _train(folder: Path, job: Job, work: Path) -> Done:
    from kivnun.pipeline import tune

    spec = _spec(folder, job, work)
    if job.kind == "cost":
        spec = _looking_often(spec)
    known = base_evaluation(folder, job.task, METHODS[job.method].precision)
    watch = _Watch()
    run = work / "run"
    result = tune(spec, "", run, listener=watch, known_base=known if job.kind != "sweep" and known.is_file() else None)
    scored = load_evaluation(run / "evaluation" / "tuned.json")
    base = load_evaluation(run / "evaluation" / "base.json")
    keep = job.kind == "score"
    return Done(
        job=job,
        figures=_figures(scored),
        base=_figures(base),
        trainable=watch.trainable,
        steps=result["steps"],
        trained_tokens=result["trained_tokens"],
        cpu_s=watch.cpu_s,
        trace=watch.trace,
        measures=scored.measures if keep else {},
    )


def _spec(folder: Path, job: Job, work: Path) -> Any:
    from kivnun.spec import load_spec

    path = work / "spec.yaml"
    path.write_text(yaml.safe_dump(spec_tree(folder, job), allow_unicode=True), encoding="utf-8")
    return load_spec(path, ())


def _looking_often(spec: Any) -> Any:
    """Return the spec with a look at the validation loss after every twentieth part of the run."""
    from kivnun.data.loader import load_dataset
    from kivnun.data.template import load_tokenizer
    from kivnun.model.families import find_base, longest_row
    from kivnun.parts import resolve_facts, row_order
    from kivnun.spec import resolve

    base = find_base(spec.base.model, spec.base.revision)
    tokenizer = load_tokenizer(base, spec.data.template)
    dataset = load_dataset(spec.data, tokenizer, spec.seed, spec.data.max_seq_len or longest_row(base))
    resolved, _ = resolve(spec, resolve_facts(dataset, base))
    every = max(1, row_order(resolved, dataset).steps // COST_POINTS)
    return spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"every_steps": every})})


def _figures(scored: Evaluation) -> dict[str, float]:
    return {"nll": scored.nll, **scored.metrics}


class _Watch:
    """Listens to a run: CPU seconds of its steps, and the validation loss on the way."""

    def __init__(self) -> None:
        self.cpu_s, self.trainable = 0.0, 0
        self.trace: list[tuple[int, float, float]] = []
        self._last = time.process_time()

    def __call__(self, event: Event) -> None:
        now = time.process_time()
        if isinstance(event, StepDone):
            self.cpu_s += now - self._last
        elif isinstance(event, AdapterOpened):
            self.trainable = event.trainable_parameters
        elif isinstance(event, Evaluated):
            self.trace.append((event.step, event.nll, self.cpu_s))
        self._last = time.process_time()
