"""A file of questions answered by a run's model: batched, in the input's order, and exact when it is stopped and gone on with.

Rows are answered in batches of like length, which changes no answer (`docs/concepts/exactness.md`), and written as soon as all
before them are there. Beside the answers stands a record of what made them: whoever goes on must bring the same.
Next: `model/generate.py` (how an answer is made), `data/asked.py` (what a row may be).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from kivnun.artifacts import atomic_write, hash_file, hash_folder, make_folder, numeric_environment, storage_errors
from kivnun.data.asked import Asked, BadRow, prompt_ids, read_asked
from kivnun.data.packing import micro_batches, pack
from kivnun.data.rows import TokenRow, Where
from kivnun.data.template import ChatTokenizer
from kivnun.errors import DataError, IntegrityError, RowProblem, RunFolderError
from kivnun.model.families import longest_row
from kivnun.model.generate import SamplingParams
from kivnun.model.kernels import names_of
from kivnun.opened import OpenedRun
from kivnun.run_folder import differences
from kivnun.train.engine import FixedModel

# Rows whose lengths are compared before they are put into batches; no more than these are answered again after a stop.
WINDOW_BATCHES = 16

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PredictParams:
    """All that decides an answer beside the model and the row. `base`: the base's own answer. `logprob`: told with each answer."""

    base: bool = False
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logprob: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """A row with the ids that the model is given, and how many it may add."""

    row: Asked
    ids: list[int]
    room: int


def read_questions(path: Path, run: OpenedRun, max_new_tokens: int, *, skip_bad: bool, name: str) -> list[Question | BadRow]:
    """Return the rows to answer, in order; with `skip_bad` those that cannot be among them.

    `name` is what messages call the file. Raises DataError with every problem of every row otherwise.
    """
    longest = longest_row(run.base_folder)
    rows = [_question(row, run.tokenizer, longest, max_new_tokens) for row in read_asked(path)]
    problems = [RowProblem(name, row.line, text) for row in rows if isinstance(row, BadRow) for text in row.problems]
    if problems and not skip_bad:
        count = sum(isinstance(row, BadRow) for row in rows)
        raise DataError(
            f"{count:,} of {len(rows):,} rows cannot be answered",
            tuple(problems),
            hint="mend the rows, or give --skip-bad: their errors are then written in place of answers",
        )
    return rows


def _question(row: Asked | BadRow, tokenizer: ChatTokenizer, longest: int, max_new_tokens: int) -> Question | BadRow:
    if isinstance(row, BadRow):
        return row
    try:
        ids = prompt_ids(row, tokenizer)
    except DataError as error:
        return BadRow(row.line, row.id, (error.message,))
    if len(ids) >= longest:
        text = f"the prompt has {len(ids):,} tokens; the base takes {longest:,} in all, and the answer needs some"
        return BadRow(row.line, row.id, (text,))
    return Question(row, ids, min(max_new_tokens, longest - len(ids)))


def answers_of(
    run: OpenedRun, source: Path, params: PredictParams, *, batch_rows: int = 32, skip_bad: bool = False, name: str | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Yield the output rows of every row of `source`, in order, as they are ready. Raises as `read_questions`."""
    rows = read_questions(source, run, params.max_new_tokens, skip_bad=skip_bad, name=name or str(source))
    return _answers(run, rows, params, batch_rows)


def _answers(
    run: OpenedRun, rows: Sequence[Question | BadRow], params: PredictParams, batch_rows: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield output rows in the order of `rows`, a batch's worth or none at a time."""
    model, tokenizer, score_tokens = run.base_model if params.base else run.tuned, run.tokenizer, _score_tokens(run, rows)
    size = batch_rows * WINDOW_BATCHES
    for start in range(0, len(rows), size):
        window = rows[start : start + size]
        ready: dict[int, dict[str, Any]] = {row.line: _error(row) for row in window if isinstance(row, BadRow)}
        asked = sorted((row for row in window if isinstance(row, Question)), key=lambda row: len(row.ids))
        waiting = [row.line if isinstance(row, BadRow) else row.row.line for row in window]
        for at in range(0, len(asked), batch_rows):
            batch = asked[at : at + batch_rows]
            for question, answer in zip(batch, _answer(model, tokenizer, batch, params, score_tokens), strict=True):
                ready[question.row.line] = answer
            yield _take_ready(waiting, ready)
        yield _take_ready(waiting, ready)


def _take_ready(waiting: list[int], ready: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Take from `waiting` the lines at its front whose answers are there, and return these."""
    count = next((at for at, line in enumerate(waiting) if line not in ready), len(waiting))
    taken, waiting[:] = waiting[:count], waiting[count:]
    return [ready.pop(line) for line in taken]


def _answer(
    model: FixedModel, tokenizer: ChatTokenizer, batch: Sequence[Question], params: PredictParams, score_tokens: int
) -> list[dict[str, Any]]:
    left = [question.room for question in batch]

    def full(place: int, _token: int) -> bool:
        left[place] -= 1
        return left[place] == 0

    longest = max(left)
    sampling = SamplingParams(longest, tokenizer.stop_ids, params.temperature, params.top_p, params.seed)
    # A row draws by its own line, so that it says the same whatever it is answered with.
    written = model.sample([question.ids for question in batch], sampling, full, [question.row.line for question in batch])
    scores = _log_probs(model, batch, written, score_tokens) if params.logprob else [None] * len(batch)
    return [
        _output(question, ids, left[place] == 0, tokenizer, score)
        for place, (question, ids, score) in enumerate(zip(batch, written, scores, strict=True))
    ]


def _output(question: Question, ids: list[int], cut: bool, tokenizer: ChatTokenizer, score: float | None) -> dict[str, Any]:
    row = question.row
    stream = tokenizer.stream_decoder()
    text = "".join([*(stream.push(token) for token in ids), stream.finish()])
    return {
        "line": row.line,
        **({} if row.id is None else {"id": row.id}),
        **({} if row.reference is None else {"reference": row.reference}),
        "answer": text,
        "finish_reason": "length" if cut else "stop",
        "tokens": len(ids),
        **({} if score is None else {"logprob": score}),
    }


def _error(row: BadRow) -> dict[str, Any]:
    return {"line": row.line, **({} if row.id is None else {"id": row.id}), "error": "; ".join(row.problems)}


def _log_probs(model: FixedModel, batch: Sequence[Question], written: Sequence[list[int]], score_tokens: int) -> list[float]:
    """Return the summed log-probability (nats, at temperature 1) of each answer's tokens, its end not counted."""
    sums = [0.0] * len(batch)
    rows = [
        _scored(question, ids, place) for place, (question, ids) in enumerate(zip(batch, written, strict=True)) if ids
    ]  # an empty answer has nothing to score
    for part in micro_batches(rows, score_tokens):
        packed = pack(part)
        values_S = model.forward(packed)
        for segment, row in enumerate(part):
            sums[cast(TokenRow, row).row] = float(values_S[packed.segment_S == segment].sum(dtype=np.float64))
    return sums


def _scored(question: Question, ids: list[int], place: int) -> TokenRow:
    weights = np.zeros(len(question.ids) + len(ids), dtype=np.float32)
    weights[len(question.ids) :] = 1
    whole = np.asarray([*question.ids, *ids], dtype=np.int32)
    return TokenRow(whole, weights, place, Where("", question.row.line), len(question.ids))


# --- the file of answers -----------------------------------------------------------------------------------------------------


def predict_file(
    run: OpenedRun,
    source: Path,
    output: Path,
    params: PredictParams,
    *,
    batch_rows: int = 32,
    resume: bool = False,
    skip_bad: bool = False,
    name: str | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> dict[str, Any]:
    """Answer every row of `source` in `output` and return {output, rows, answered, errors, tokens, finish_reasons}.

    `name` is what messages call the source (None: its path). With `resume` it goes on after the last whole answer. Raises
    DataError for bad rows, RunFolderError when the output is there already or was begun otherwise, IntegrityError when it holds
    something else, StorageError.
    """
    if not resume and (output.exists() or _record_of(output).exists()):
        raise RunFolderError(f"{output} exists already", hint="choose another --output, or go on with it with --resume")
    rows = read_questions(source, run, params.max_new_tokens, skip_bad=skip_bad, name=name or str(source))
    _check_record(output, _made_by(run, source, params, skip_bad))
    with _opened(output) as file:
        done = _recover(file, output, rows)
        on_progress(done, len(rows))
        for written in _answers(run, rows[done:], params, batch_rows):
            if written:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written).encode())
                file.flush()
                os.fsync(file.fileno())
            done += len(written)
            on_progress(done, len(rows))
    return {"output": str(output), **summary(json.loads(line) for line in output.read_bytes().splitlines())}


def summary(rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of output rows: rows, answered, errors, tokens, and how answers ended."""
    count = answered = tokens = 0
    reasons = {"stop": 0, "length": 0}
    for row in rows:
        count += 1
        if "answer" in row:
            answered, tokens = answered + 1, tokens + row["tokens"]
            reasons[row["finish_reason"]] += 1
    return {"rows": count, "answered": answered, "errors": count - answered, "tokens": tokens, "finish_reasons": reasons}


def _score_tokens(run: OpenedRun, rows: Sequence[Question | BadRow]) -> int:
    """Return the tokens of a pass that scores: the run's own, or the longest row with its answer."""
    longest = max((len(row.ids) + row.room for row in rows if isinstance(row, Question)), default=0)
    return max(cast(int, run.spec.compute.micro_batch_tokens), longest)


def _record_of(output: Path) -> Path:
    return output.with_name(output.name + ".record.json")


def _made_by(run: OpenedRun, source: Path, params: PredictParams, skip_bad: bool) -> dict[str, Any]:
    """Return all that decides the bytes of the output."""
    compute, place = run.spec.compute, run.folder.model if run.is_full else run.folder.adapter
    return {
        "kind": "predictions",
        "input": {"sha256": hash_file(source), "skip_bad": skip_bad},
        "spec_hash": run.spec.content_hash(),
        "base_hash": run.base.content_hash,
        "tuned_hash": None if params.base or not place.is_dir() else hash_folder(place),
        "tokenizer_hash": run.tokenizer.content_hash,
        "params": asdict(params),
        "environment": numeric_environment(cast(int, compute.threads), compute.device, names_of(run.base.kernels)),
    }


def _check_record(output: Path, now: Mapping[str, Any]) -> None:
    """Write down what makes the answers, or refuse to go on with those that something else began."""
    path = _record_of(output)
    if not path.exists():
        if output.exists():
            raise RunFolderError(f"{output} was not begun by predict: {path.name} is missing", hint="choose another --output")
        make_folder(path.parent)
        atomic_write(path, json.dumps(now, indent=2, ensure_ascii=False) + "\n")
        return
    try:
        before: object = json.loads(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(f"{path} is not JSON: {error}", hint="choose another --output") from error
    changed = differences(before, json.loads(json.dumps(now)))
    if changed:
        raise RunFolderError(
            f"{output} was begun otherwise: {'; '.join(changed)}", hint="go on with what began it, or choose another --output"
        )


@contextmanager
def _opened(output: Path) -> Generator[BinaryIO]:
    """Give the output, open for this process alone."""
    with storage_errors(output), open(output, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(f"another process writes {output}", hint="wait for it, or stop it") from None
        yield file


def _recover(file: BinaryIO, output: Path, rows: Sequence[Question | BadRow]) -> int:
    """Cut a torn last line off and return how many whole answers there are. Raises IntegrityError where they answer other rows."""
    file.seek(0)
    held = file.read()
    whole = held[: held.rfind(b"\n") + 1]
    file.truncate(len(whole))
    lines = whole.splitlines()
    wanted = [row.line if isinstance(row, BadRow) else row.row.line for row in rows]
    for number, (raw, line) in enumerate(zip(lines, wanted, strict=False), start=1):
        try:
            found = json.loads(raw)["line"]
        except (ValueError, KeyError, TypeError):
            found = None
        if found != line:
            raise IntegrityError(f"{output}:{number} is no answer to line {line}", hint="choose another --output")
    if len(lines) > len(wanted):
        raise IntegrityError(f"{output} holds {len(lines)} answers to {len(wanted)} rows", hint="choose another --output")
    return len(lines)
