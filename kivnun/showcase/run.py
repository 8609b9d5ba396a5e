"""The showcase from nothing to its page: questions, runs, scores, figures. Start reading here.

    questions -> base scored -> for each arm and seed: kivnun's own pipeline, then scored -> showcase.json -> showcase.html

Three arms: `tuned` (questions on other topics than the test's), `shuffled` (the same with answers at random), `contaminated` (the
test questions themselves). Each run is a run folder like any other; what is finished is not done again.
Next: `figures.py` (how a bar is computed), `page.py` (how it is shown).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kivnun import __version__
from kivnun.artifacts import atomic_write, code_hash, hash_file, make_folder, numeric_environment
from kivnun.data.near import NearDuplicates, near_duplicates
from kivnun.data.scenarios import cldr
from kivnun.data.scenarios.multiple_choice.questions import (
    KINDS,
    Question,
    contaminated_rows,
    questions,
    shuffled_rows,
    training_rows,
)
from kivnun.errors import RunFolderError
from kivnun.evaluate.evaluation import Evaluation, load_evaluation
from kivnun.events import Event
from kivnun.opened import open_run
from kivnun.pipeline import tune
from kivnun.showcase.documentation import docstrings
from kivnun.showcase.figures import MEASURES, Figure, figure, of_questions
from kivnun.showcase.page import render
from kivnun.showcase.scores import Scores, kept_scores, score_model
from kivnun.spec import load_spec

BASE = "kivnun/tiny-phi"
SEED = 7  # of the questions; runs have seeds of their own
NEAR = 0.8


@dataclass(frozen=True, slots=True)
class Size:
    """How much is done. Rows are two per question; `contaminated_epochs` goes over the test questions alone."""

    name: str
    train_questions: int
    test_questions: int
    unrelated_rows: int
    texts: int
    seeds: int
    epochs: int
    contaminated_epochs: int
    batch_rows: int


FULL = Size("full", 1_000, 270, 60, 120, 3, 5, 24, 32)
QUICK = Size("quick", 450, 90, 20, 20, 1, 5, 24, 16)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of training, what it is for, and its rows."""

    name: str
    title: str
    meaning: str


ARMS = (
    Arm("tuned", "Tuned", "trained on questions of other topics than the test’s"),
    Arm("shuffled", "Answers shuffled", "the same questions with answers drawn at random: a control that must not improve"),
    Arm("contaminated", "Trained on the test", "trained on the test questions themselves: what contamination looks like"),
)


class RunScreen(Protocol):
    """What shows a run: the events of the pipeline, and how far an evaluation is."""

    def __call__(self, event: Event) -> None: ...

    def scoring(self, stage: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Shows:
    """How people see what goes on: `say` one line, `run` a screen for one run, `working` a bar for what takes a while."""

    say: Callable[[str], None]
    run: Callable[[], AbstractContextManager[RunScreen]]
    working: Callable[[str], AbstractContextManager[Callable[[str, int, int], None]]]


def run_showcase(output: Path, size: Size, shows: Shows, *, resume: bool = False) -> dict[str, Any]:
    """Do all that is not done yet and return the record, which showcase.json holds too; the page is showcase.html.

    Raises RunFolderError where the folder is in use and `resume` is not asked for, or holds a showcase of another size.
    """
    began = time.monotonic()
    _claim(output, resume)
    shows.say("making the questions")
    train, test = questions("train", size.train_questions, SEED), questions("test", size.test_questions, SEED)
    _write_data(output / "data", size, train, test)
    texts = docstrings(size.texts)
    names = [f"{arm.name}-{seed}" for seed in range(1, size.seeds + 1) for arm in ARMS]
    for number, name in enumerate(names, start=1):
        shows.say(f"run {number} of {len(names)}: {name}")
        _tune(output, name, size, shows)
    scores = _score_all(output, names, test, texts, shows)
    near = _near(train, test)
    record = _record(output, size, train, test, scores, near)
    record |= {"seconds": round(time.monotonic() - began, 1), "resumed": resume}
    atomic_write(output / "showcase.json", json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")
    atomic_write(output / "showcase.html", render(record))
    return record


def _claim(output: Path, resume: bool) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not resume:
        raise RunFolderError(f"{output} exists already", hint="choose another --output, or go on with it with --resume")
    for place in (output, output / "data", output / "specs", output / "runs", output / "scores"):
        make_folder(place)


def _write_data(folder: Path, size: Size, train: Sequence[Question], test: Sequence[Question]) -> None:
    """Write the rows that are trained, the test questions, and the unrelated rows: English values into Hebrew, the demo's task."""
    rows: dict[str, Sequence[Any]] = {
        "tuned": training_rows(train, SEED),
        "contaminated": contaminated_rows(test),
        "unrelated": cldr.rows("test", size.unrelated_rows, SEED),
        "test": [_question_fields(question) for question in test],
        **{f"shuffled-{seed}": shuffled_rows(train, SEED + seed) for seed in range(1, size.seeds + 1)},
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path = folder / f"{name}.jsonl"
        if not (path.is_file() and path.read_text(encoding="utf-8") == text):
            atomic_write(path, text)


def spec_text(name: str, size: Size) -> str:
    """Return the spec of one run, named by its arm and seed. All arms differ in their rows and epochs alone."""
    arm, seed = name.split("-")
    rows = name if arm == "shuffled" else arm
    epochs = size.contaminated_epochs if arm == "contaminated" else size.epochs
    return f"""# One run of the showcase: {arm}, seed {seed}. The held-out rows are an unrelated task, to see what is forgotten.
version: 1
base: {BASE}
data: {{train: ../data/{rows}.jsonl, validation: ../data/unrelated.jsonl}}
adapter: {{kind: lora, rank: 32, alpha: 64}}
schedule: {{epochs: {epochs}, batch_rows: {size.batch_rows}, learning_rate: 4e-3}}
evaluation: {{metrics: [exact_match], max_new_tokens: 48, samples: 3, every_steps: 1000000, forgetting: null}}
seed: {seed}
compute: {{threads: 1}}
"""


def _tune(output: Path, name: str, size: Size, shows: Shows) -> None:
    spec, text = output / "specs" / f"{name}.yaml", spec_text(name, size)
    atomic_write(spec, text)
    with shows.run() as screen:
        tune(load_spec(spec), text, output / "runs" / name, resume=True, listener=screen, on_progress=screen.scoring)


def _score_all(
    output: Path, names: Sequence[str], test: Sequence[Question], texts: Sequence[str], shows: Shows
) -> dict[str, Scores]:
    """Return the scores of the base and of every run, by name."""
    asked = hash_file(output / "data" / "test.jsonl")
    found: dict[str, Scores] = {}
    for name in ("base", *names):
        opened = open_run(output / "runs" / (names[0] if name == "base" else name))
        of = f"{asked} {len(texts)} {'base' if name == 'base' else hash_file(opened.folder.path / 'manifest.json')} {__version__}"
        with shows.working(f"scoring {name}") as show:

            def compute(name: str = name, show: Callable[[str, int, int], None] = show, opened: Any = opened) -> Scores:
                model = opened.base_model if name == "base" else opened.tuned
                return score_model(model, opened.tokenizer, test, texts, show)

            found[name] = kept_scores(output / "scores" / f"{name}.json", of, compute)
        shows.say(f"scored: {name}")
    return found


def _near(train: Sequence[Question], test: Sequence[Question]) -> NearDuplicates:
    return near_duplicates([_as_text(question) for question in train], [_as_text(question) for question in test])


def _as_text(question: Question) -> str:
    return f"{question.asks[0]}\n{question.best}"


# --- the record --------------------------------------------------------------------------------------------------------------


def _record(
    output: Path, size: Size, train: Sequence[Question], test: Sequence[Question], scores: dict[str, Scores], near: NearDuplicates
) -> dict[str, Any]:
    closest = near.closest
    return {
        "version": 1,
        "kivnun": __version__,
        "date": datetime.now(UTC).date().isoformat(),
        "size": size.name,
        "base": BASE,
        "code_hash": code_hash(),
        "environment": numeric_environment(1, "cpu"),
        "spec": spec_text("tuned-1", size),
        "epochs": {"tuned": size.epochs, "shuffled": size.epochs, "contaminated": size.contaminated_epochs},
        "arms": {arm.name: {"title": arm.title, "meaning": arm.meaning} for arm in ARMS},
        "seeds": size.seeds,
        "train_questions": len(train),
        "test_questions": len(test),
        "kinds": {kind.name: {"skill": kind.skill, "test": sum(q.kind == kind.name for q in test)} for kind in KINDS},
        "figures": bars(test, scores, size.seeds),
        "by_kind": by_kind(test, scores, size.seeds),
        "forgetting": _forgetting(output, scores, size.seeds),
        "near_duplicates": {
            "equal": near.equal,
            "topics_shared": len({(q.kind, q.topic) for q in train} & {(q.kind, q.topic) for q in test}),
            "above": {str(level): near.above(level) for level in (0.5, 0.6, 0.7, NEAR, 0.9)},
            "closest": {
                "likeness": round(closest.likeness, 4),
                "test": _as_text(test[closest.test]),
                "train": _as_text(train[closest.train]),
            },
        },
        "questions": [_question_fields(question) for question in test],
        "log_probs": {name: one.as_json() for name, one in scores.items()},
    }


def bars(test: Sequence[Question], scores: dict[str, Scores], seeds: int) -> dict[str, dict[str, Any]]:
    """Return arm -> measure -> figure, with `base` among the arms: the chart, from what each model gave to each answer."""
    base = of_questions(test, scores["base"])
    found: dict[str, dict[str, Any]] = {"base": {name: figure(base[name][None]).as_json() for name in (*MEASURES, "listed")}}
    for arm, runs in _by_arm(test, scores, seeds):
        found[arm] = {name: figure(np.stack([run[name] for run in runs]), base[name]).as_json() for name in (*MEASURES, "listed")}
    return found


def by_kind(test: Sequence[Question], scores: dict[str, Scores], seeds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return kind -> arm -> measure -> mean, without intervals: some forty questions each."""
    arms = [("base", [of_questions(test, scores["base"])]), *_by_arm(test, scores, seeds)]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        own = np.array([question.kind == kind.name for question in test])
        if own.any():
            found[kind.name] = {
                arm: {name: float(np.mean([run[name][own] for run in runs])) for name in (*MEASURES, "listed")}
                for arm, runs in arms
            }
    return found


def _by_arm(test: Sequence[Question], scores: dict[str, Scores], seeds: int) -> Iterator[tuple[str, list[dict[str, np.ndarray]]]]:
    for arm in ARMS:
        yield arm.name, [of_questions(test, scores[f"{arm.name}-{seed}"]) for seed in range(1, seeds + 1)]


def _forgetting(output: Path, scores: dict[str, Scores], seeds: int) -> dict[str, Any]:
    """Return arm -> what the unrelated rows and texts got: the demo's exact matches and loss, and the loss of documentation."""
    found: dict[str, Any] = {}
    text = {name: np.array(one.text) for name, one in scores.items()}
    for arm in ARMS:
        names = [f"{arm.name}-{seed}" for seed in range(1, seeds + 1)]
        runs = [output / "runs" / name / "evaluation" for name in names]
        base, tuned = load_evaluation(runs[0] / "base.json"), [load_evaluation(run / "tuned.json") for run in runs]
        measured = {
            "exact_match": _compared(tuned, base, "exact_match", higher=True),
            "nll": _compared(tuned, base, "nll", higher=False),
            "text_nll": _weighted([text[name] for name in names], text["base"], higher=False),
        }
        found[arm.name] = {name: one.as_json() for name, one in measured.items()}
        found["base"] = {name: {"value": one.value - (one.difference or 0.0)} for name, one in measured.items()}
    return found


def _compared(tuned: Sequence[Evaluation], base: Evaluation, name: str, *, higher: bool) -> Figure:
    return _weighted([one.measures[name].rows_ND for one in tuned], base.measures[name].rows_ND, higher=higher)


def _weighted(tuned: Sequence[np.ndarray], base: np.ndarray, *, higher: bool) -> Figure:
    """Return the figure of rows of (sum, weight)."""
    weights = base[:, 1]
    return figure(np.stack([rows[:, 0] / weights for rows in tuned]), base[:, 0] / weights, weights, higher=higher)


def _question_fields(question: Question) -> dict[str, Any]:
    return {
        "kind": question.kind,
        "topic": question.topic,
        "question": question.asks[0],
        "true": question.true,
        "false": question.false,
        "options": question.options,
    }
