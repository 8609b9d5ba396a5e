"""One evaluation of one model: held-out loss, task metrics, intervals, and the paired difference to the base.

The pipeline calls `evaluate_scorer` for the base before training and for the tuned model after it, writes
`evaluation_fields` into the event and `result_fields` into the final object. `save_evaluation` keeps what each row got, so
that a resumed run pairs its tuned rows with the base's without scoring the base again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kivnun.artifacts import atomic_write
from kivnun.data.rows import TokenRow, Trainable
from kivnun.data.template import ChatTokenizer
from kivnun.errors import DataError, IntegrityError, SpecError
from kivnun.evaluate.choice import choose_labels
from kivnun.evaluate.forgetting import Forgetting, Probe, forgetting_fields, from_record, score_probe, to_record
from kivnun.evaluate.heldout import Progress, Scorer, held_out_nll
from kivnun.evaluate.intervals import Interval, difference_interval, interval_of, verdict_of
from kivnun.evaluate.metrics import DIFFERENCE, Measure, higher_is_better
from kivnun.evaluate.tasks import Sample, generation_rows, reference_reply, run_tasks
from kivnun.randomness import permutation
from kivnun.spec.tune import EvaluationSpec

StageProgress = Callable[[str, int, int], None]
"""Called with ("score" or "generate", rows done, rows in all)."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one model got on the held-out rows. `measures` keeps each row's part.

    `intervals` holds the 95 % interval of each figure, and with a base also that of tuned minus base as `nll_difference` and so
    on; there is none for a figure that rests on fewer than ten rows. `keys` names the rows by what they hold: `rows` those that
    were scored, `replies` those that a reply or a label was asked of. `forgetting` is of other text, and part of no measure;
    neither is `accuracy`, the share of trained tokens that no other was likelier than, which the record of the run tells.
    """

    rows: int
    measures: dict[str, Measure]
    intervals: dict[str, Interval]
    samples: tuple[Sample, ...]
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    forgetting: Forgetting | None = None
    accuracy: float = math.nan

    @property
    def nll(self) -> float:
        """Nats per trained token."""
        return self.measures["nll"].figure

    @property
    def metrics(self) -> dict[str, float]:
        """Every figure but the loss."""
        return {name: measure.figure for name, measure in self.measures.items() if name != "nll"}


def evaluate_scorer(
    scorer: Scorer,
    rows: Sequence[Trainable],
    tokenizer: ChatTokenizer,
    settings: EvaluationSpec,
    seed: int,
    on_progress: StageProgress | None = None,
    *,
    micro_batch_tokens: int,
    base: Evaluation | None = None,
    probe: Probe | None = None,
) -> Evaluation:
    """Score `rows`, generate for those that have a prompt, and compare with `base` on the same rows where it is given. With a
    `probe`, score that text too.

    Nothing is generated when `settings` asks for no metric and no sample. Raises DataError when there is no held-out row,
    SpecError when a metric needs replies and no row has any.
    """
    if not rows:
        raise DataError("there is no held-out row to evaluate on", hint="set data.validation to a share or a file")
    held_out = held_out_nll(scorer, rows, micro_batch_tokens, _stage(on_progress, "score"))
    measures = {measure.name: measure for measure in held_out.measures()}
    if "perplexity" in settings.metrics:
        measures["perplexity"] = Measure("perplexity", measures["nll"].rows_ND)
    samples: list[Sample] = []
    with_prompt = [name for name in settings.metrics if name != "perplexity"]
    picked = generation_rows(rows, settings.generate_rows if with_prompt else settings.samples, seed)
    if with_prompt and not picked:
        raise SpecError(
            f"evaluation.metrics asks for {', '.join(with_prompt)}, but no held-out row has a prompt and a reply",
            hint="running text has no replies to compare: remove evaluation.metrics",
        )
    keys = {"rows": tuple(map(row_key, rows)), "replies": tuple(reply_key(row, tokenizer) for row in picked)}
    if "macro_f1" in with_prompt:
        measures["macro_f1"] = choose_labels(scorer, picked, micro_batch_tokens, _stage(on_progress, "score"))
        with_prompt.remove("macro_f1")
    if not with_prompt:
        picked = picked[: settings.samples]
    if picked:
        stage = _stage(on_progress, "generate")
        result = run_tasks(scorer, picked, tokenizer, with_prompt, settings.max_new_tokens, stage)
        measures.update((measure.name, measure) for measure in result.measures)
        samples = _some(result.samples, settings.samples, seed)
    found = Evaluation(len(rows), measures, {}, tuple(samples), keys, accuracy=held_out.accuracy)
    evaluation = _with_intervals(found, settings.bootstrap, seed, base)
    if probe is None:
        return evaluation
    before, stage = base.forgetting if base is not None else None, _stage(on_progress, "score")
    forgetting = score_probe(scorer, probe, micro_batch_tokens, settings.bootstrap, seed, before, stage)
    return replace(evaluation, forgetting=forgetting)


def row_key(row: Trainable) -> str:
    """Return a name of what the row holds, its tokens and their weights, wherever it stands: equal rows have equal ones."""
    digest = hashlib.blake2b(digest_size=8)
    for side in row.sides:
        digest.update(f"|{side.length} {side.prompt_len}|".encode())
        digest.update(side.ids.astype("<i4").tobytes())
        digest.update(side.weights.astype("<f4").tobytes())
    return digest.hexdigest()


def reply_key(row: TokenRow, tokenizer: ChatTokenizer) -> str:
    """Return a name of the row's prompt and reply as text, so that bases with different tokenizers have the same one."""
    prompt = tokenizer.decode(row.ids[: row.prompt_len].tolist(), skip_special=True).strip()
    return hashlib.blake2b(json.dumps([prompt, reference_reply(row, tokenizer)]).encode(), digest_size=8).hexdigest()


def evaluation_fields(evaluation: Evaluation) -> dict[str, Any]:
    """Return the fields of an `evaluated` event but `which` and `step`."""
    return {
        "nll": evaluation.nll,
        "rows": evaluation.rows,
        "metrics": evaluation.metrics,
        "intervals": {name: tuple(interval) for name, interval in evaluation.intervals.items()},
        "samples": [asdict(sample) for sample in evaluation.samples],
        "forgetting": forgetting_fields(evaluation.forgetting),
        "accuracy": evaluation.accuracy,
    }


def result_fields(evaluation: Evaluation) -> dict[str, Any]:
    """Return `base` or `tuned` of the final object: nll, rows, each metric by its name, intervals, and verdicts on the tuned;
    `forgetting` where unrelated text was scored."""
    verdicts = {
        name.removesuffix(DIFFERENCE): verdict_of(interval, higher_is_better(name.removesuffix(DIFFERENCE)))
        for name, interval in evaluation.intervals.items()
        if name.endswith(DIFFERENCE)
    }
    return {
        "nll": evaluation.nll,
        "rows": evaluation.rows,
        **evaluation.metrics,
        "intervals": {name: list(interval) for name, interval in evaluation.intervals.items()},
        **({"verdicts": verdicts} if verdicts else {}),
        **({"forgetting": forgetting_fields(evaluation.forgetting)} if evaluation.forgetting is not None else {}),
    }


def save_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write the evaluation with what each row got, atomically, as JSON. Floats keep every bit."""
    record = {
        **evaluation_fields(evaluation),
        "per_row": {name: measure.rows_ND.tolist() for name, measure in evaluation.measures.items()},
        "row_keys": {name: list(keys) for name, keys in evaluation.keys.items()},
        "forgetting": to_record(evaluation.forgetting),
        "accuracy": None if math.isnan(evaluation.accuracy) else evaluation.accuracy,
    }
    atomic_write(path, json.dumps(record, ensure_ascii=False, allow_nan=False))


def load_evaluation(path: Path) -> Evaluation:
    """Return what `save_evaluation` wrote. Raises IntegrityError when the file is not such a record."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        measures = {name: Measure(name, np.array(rows, dtype=np.float64)) for name, rows in record["per_row"].items()}
        intervals = {name: Interval(*ends) for name, ends in record["intervals"].items()}
        samples = tuple(Sample(**fields) for fields in record["samples"])
        keys = {name: tuple(own) for name, own in record.get("row_keys", {}).items()}  # older records have none
        accuracy = record.get("accuracy")  # as the keys
        return Evaluation(
            record["rows"], measures, intervals, samples, keys, from_record(record.get("forgetting", {})),
            math.nan if accuracy is None else accuracy,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path} is not a saved evaluation: {error}", hint="delete it; the base is scored again") from error


def _with_intervals(evaluation: Evaluation, draws: int, seed: int, base: Evaluation | None) -> Evaluation:
    measures = evaluation.measures
    found = {name: interval_of(measure, draws, seed) for name, measure in measures.items()}
    if base is not None:
        for name in (name for name in measures if name in base.measures):
            found[name + DIFFERENCE] = difference_interval(base.measures[name], measures[name], draws, seed)
    return replace(evaluation, intervals={name: interval for name, interval in found.items() if interval is not None})


def _some(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """Return up to `count` samples, drawn by the seed: at even distances a file that goes round its topics shows but one."""
    return [samples[place] for place in sorted(permutation(len(samples), seed, "samples")[:count].tolist())]


def _stage(on_progress: StageProgress | None, stage: str) -> Progress | None:
    return None if on_progress is None else lambda done, total: on_progress(stage, done, total)
