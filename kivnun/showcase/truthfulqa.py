"""A TruthfulQA file scored with a base, or with a run before and after. Next: `kivnun/evaluate/truthfulqa.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kivnun.artifacts import atomic_write
from kivnun.data.choices import ChoiceQuestion
from kivnun.data.template import ChatTokenizer
from kivnun.evaluate.intervals import difference_interval, interval_of, verdict_of
from kivnun.evaluate.truthfulqa import PRIMER, TruthfulQA, longest_answer, score_truthfulqa
from kivnun.model.families import longest_row
from kivnun.opened import OpenedRun, open_base, open_run
from kivnun.train.engine import FixedModel

DRAWS = 2_000
SEED = 7
MICRO_BATCH_TOKENS = 2048

StageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Found:
    """What each model got, base first, and what a reader must be told."""

    scores: dict[str, TruthfulQA]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return figures in 0 to 1 with their intervals and, of two models, the paired difference with its verdict."""
        measures = {name: {m.name: m for m in scores.measures()} for name, scores in self.scores.items()}
        models = {
            name: {
                **{key: measure.figure for key, measure in own.items()},
                "intervals": {key: list(ends) for key, measure in own.items() if (ends := interval_of(measure, DRAWS, SEED))},
            }
            for name, own in measures.items()
        }
        questions = len(next(iter(self.scores.values())).answers)
        record: dict[str, Any] = {"questions": questions, "models": models, "warnings": list(self.warnings)}
        record["intervals"] = any(own["intervals"] for own in models.values())
        if len(measures) == 2:
            base, tuned = measures.values()
            ends = {key: difference_interval(base[key], tuned[key], DRAWS, SEED) for key in base}
            record["difference"] = {
                **{key: tuned[key].figure - base[key].figure for key in base},
                "intervals": {key: list(own) for key, own in ends.items() if own is not None},
                "verdicts": {key: verdict_of(own, higher_is_better=True) for key, own in ends.items()},
            }
        return record


def score_base(model: str, asked: Sequence[ChoiceQuestion], on_progress: StageProgress, *, primer: bool) -> Found:
    """Return the figures of a base as it is."""
    opened, text = open_base(model), PRIMER if primer else ""
    stage = _stage(on_progress, "base")
    scores = score_truthfulqa(opened.base_model, asked, opened.tokenizer, MICRO_BATCH_TOKENS, stage, primer=text)
    return Found({"base": scores}, tuple(_too_long(opened.folder, asked, opened.tokenizer, text)))


def score_run(run: Path, asked: Sequence[ChoiceQuestion], on_progress: StageProgress, *, primer: bool) -> Found:
    """Return the figures of a run's base and of its result, and say how many of the questions it was trained on."""
    opened, text = open_run(run), PRIMER if primer else ""
    found: dict[str, TruthfulQA] = {}
    models: dict[str, Callable[[], FixedModel]] = {"base": lambda: opened.base_model, "tuned": lambda: opened.tuned}
    for name, model in models.items():
        stage = _stage(on_progress, name)
        found[name] = score_truthfulqa(model(), asked, opened.tokenizer, MICRO_BATCH_TOKENS, stage, primer=text)
    return Found(found, (*_too_long(opened.base_folder, asked, opened.tokenizer, text), *_overlap(opened, asked)))


def write_items(path: Path, asked: Sequence[ChoiceQuestion], found: Found) -> None:
    """Write one line per question: its line in the file, its category, and what each model gave to each answer."""
    lines: list[str] = []
    for number, question in enumerate(asked):
        models = {
            name: {"mc1": float(own.mc1_N[number]), "mc2": float(own.mc2_N[number]), "log_probs": own.answers[number]}
            for name, own in found.scores.items()
        }
        row = {"line": question.where.line, "category": question.category, "question": question.question, "models": models}
        lines.append(json.dumps(row, ensure_ascii=False))
    atomic_write(path, "\n".join(lines) + "\n")


def _too_long(folder: Path, asked: Sequence[ChoiceQuestion], tokenizer: ChatTokenizer, primer: str) -> list[str]:
    longest, limit = longest_answer(asked, tokenizer, primer), longest_row(folder)
    if longest <= limit:
        return []
    return [
        f"the longest question with its answer is {longest:,} tokens, the base was made for {limit:,}: its figures are of no use"
    ]


def _overlap(opened: OpenedRun, asked: Sequence[ChoiceQuestion]) -> list[str]:
    """Return a warning where questions of the file stand in the run's training rows, whatever is around them there."""
    unseen = [_plain(question.question) for question in asked]
    for row in (side for item in opened.dataset.train.rows for side in item.sides):
        trained = _plain(opened.tokenizer.decode(row.ids.tolist(), skip_special=True))
        unseen = [question for question in unseen if question not in trained]
    seen = len(asked) - len(unseen)
    if not seen:
        return []
    return [
        f"{seen:,} of {len(asked):,} questions stand in the run's training rows: the tuned figures say nothing of new questions"
    ]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _stage(on_progress: StageProgress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(f"scoring {name}", done, total)
