"""Forgetting: what tuning did to text that has nothing to do with the task.

The base and the tuned model are scored on the same rows of running text, as on the held-out rows, and the paired difference says
whether such text became less likely. The built-in rows (`unrelated.jsonl`) were written for this: a few sentences each in nine
languages, Python, and tables. They come from no book and no site, and no recipe or scenario of this package trains on them.
Next: `evaluation.py`, which keeps the figures beside those of the task, never among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kivnun.data.formats import read_records
from kivnun.data.rows import PreferenceRecord, Record, TextRecord, TokenRow, Where
from kivnun.data.template import ChatTokenizer
from kivnun.data.tokens import Draft, cut_drafts, make_drafts
from kivnun.errors import DataError, IntegrityError, RowProblem
from kivnun.evaluate.heldout import Progress, Scorer, held_out_nll
from kivnun.evaluate.intervals import Interval, difference_interval, interval_of
from kivnun.evaluate.metrics import Measure

BUILTIN = "builtin"
BUILTIN_FILE = Path(__file__).with_name("unrelated.jsonl")

ForgettingVerdict = Literal["forgot", "no detectable forgetting", "better there too", "too few rows"]


@dataclass(frozen=True, slots=True)
class Probe:
    """The rows of unrelated text. `kinds` says of each what it is written in, "" where that is not told; `truncated` counts the
    rows that were cut to the longest that the run takes; `content_hash` covers ids and weights."""

    source: str
    content_hash: str
    rows: tuple[TokenRow, ...]
    kinds: tuple[str, ...]
    truncated: int


@dataclass(frozen=True, slots=True)
class Forgetting:
    """What one model gives to a probe: its loss row by row, and with a base the interval of tuned minus base."""

    source: str
    content_hash: str
    kinds: tuple[str, ...]
    truncated: int
    loss: Measure
    interval: Interval | None
    difference: Interval | None
    compared: bool

    @property
    def nll(self) -> float:
        """Nats per token."""
        return self.loss.figure

    @property
    def verdict(self) -> ForgettingVerdict | None:
        """Return what the paired difference says; None where there is no base to compare with."""
        return forgetting_verdict(self.difference) if self.compared else None


def open_probe(setting: str | Path | None, tokenizer: ChatTokenizer, max_seq_len: int) -> Probe | None:
    """Return the rows that `evaluation.forgetting` names, cut to `max_seq_len` tokens; None for none.

    Raises DataError, with the lines, for a file that cannot be used, StorageError for one that cannot be read.
    """
    if setting is None:
        return None
    path = Path(setting) if setting != BUILTIN else BUILTIN_FILE
    records, kinds = _builtin() if setting == BUILTIN else _own(path)
    rows: list[TokenRow] = []
    kind_of_row: list[str] = []
    truncated = 0
    problems: list[RowProblem] = []
    for record, kind in zip(records, kinds, strict=True):
        try:
            kept, cut = cut_drafts(_drafts(record, tokenizer), max_seq_len)
        except DataError as error:
            problems.append(RowProblem(record.where.path, record.where.line, error.message))
            continue
        if not kept:
            problems.append(
                RowProblem(record.where.path, record.where.line, f"its first {max_seq_len:,} tokens hold none to score")
            )
        truncated += cut > 0
        rows.extend(TokenRow(d.ids, d.weights, len(rows) + at, record.where, d.prompt_len) for at, d in enumerate(kept))
        kind_of_row.extend([kind] * len(kept))
    if problems:
        raise _refusal(path, problems)
    return Probe(BUILTIN if setting == BUILTIN else path.name, _content_hash(rows), tuple(rows), tuple(kind_of_row), truncated)


def score_probe(
    scorer: Scorer,
    probe: Probe,
    micro_batch_tokens: int,
    draws: int,
    seed: int,
    base: Forgetting | None = None,
    on_progress: Progress | None = None,
) -> Forgetting:
    """Score the probe's rows, and compare with what the base got on the same ones. Raises NonFiniteLossError, IntegrityError."""
    held_out = held_out_nll(scorer, probe.rows, micro_batch_tokens, on_progress)
    loss = held_out.measures()[0]
    difference = None
    if base is not None:
        check_same_text(base, probe)
        difference = difference_interval(base.loss, loss, draws, seed)
    return Forgetting(
        source=probe.source,
        content_hash=probe.content_hash,
        kinds=probe.kinds,
        truncated=probe.truncated,
        loss=loss,
        interval=interval_of(loss, draws, seed),
        difference=difference,
        compared=base is not None,
    )


def check_same_text(base: Forgetting, probe: Probe) -> None:
    """Raise IntegrityError where the base was scored on other text than `probe` holds now."""
    if base.content_hash != probe.content_hash:
        raise IntegrityError(
            f"the text of evaluation.forgetting ({probe.source}) is not the one that the base was scored on",
            hint="restore the file, or start over in another --output",
        )


def forgetting_verdict(difference: tuple[float, float] | None) -> ForgettingVerdict:
    """Return what an interval of tuned minus base loss says: forgot, or better, only where it excludes zero."""
    if difference is None:
        return "too few rows"
    low, high = difference
    if low <= 0.0 <= high:
        return "no detectable forgetting"
    return "forgot" if low > 0.0 else "better there too"


def forgetting_fields(scored: Forgetting | None) -> dict[str, Any]:
    """Return a score as plain JSON for the event and the final object; {} where nothing was scored."""
    if scored is None:
        return {}
    fields: dict[str, Any] = {
        "source": scored.source,
        "rows": scored.loss.rows,
        "truncated": scored.truncated,
        "content_hash": scored.content_hash,
        "nll": scored.nll,
        "by_kind": _by_kind(scored),
    }
    if scored.interval is not None:
        fields["interval"] = list(scored.interval)
    if scored.difference is not None:
        fields["difference"] = list(scored.difference)
    return fields if scored.verdict is None else {**fields, "verdict": scored.verdict}


def to_record(scored: Forgetting | None) -> dict[str, Any]:
    """Return what `from_record` reads: the fields, and what each row got."""
    if scored is None:
        return {}
    return {**forgetting_fields(scored), "kinds": list(scored.kinds), "per_row": scored.loss.rows_ND.tolist()}


def from_record(record: Mapping[str, Any]) -> Forgetting | None:
    """Return the score that `to_record` wrote; None for {}, as in evaluations from before there was a probe."""
    if not record:
        return None
    return Forgetting(
        source=record["source"],
        content_hash=record["content_hash"],
        kinds=tuple(record["kinds"]),
        truncated=record["truncated"],
        loss=Measure("nll", np.array(record["per_row"], dtype=np.float64)),
        interval=Interval(*record["interval"]) if "interval" in record else None,
        difference=Interval(*record["difference"]) if "difference" in record else None,
        compared="verdict" in record,
    )


def _by_kind(scored: Forgetting) -> dict[str, float]:
    """Return the loss of each kind of text: sums over its rows, as for the whole."""
    sums: dict[str, np.ndarray] = {}
    for kind, row in zip(scored.kinds, scored.loss.rows_ND, strict=True):
        if kind:
            sums[kind] = sums.get(kind, np.zeros(2)) + row
    return {kind: float(scored.loss.value(total)) for kind, total in sums.items()}


def _builtin() -> tuple[list[Record], list[str]]:
    lines = [json.loads(line) for line in BUILTIN_FILE.read_text(encoding="utf-8").splitlines()]
    records: list[Record] = [TextRecord(line["text"], Where(BUILTIN, number)) for number, line in enumerate(lines, start=1)]
    return records, [line["kind"] for line in lines]


def _own(path: Path) -> tuple[list[Record], list[str]]:
    name, records, problems = read_records(path)
    if problems:
        raise _refusal(path, problems)
    if any(isinstance(record, PreferenceRecord) for record in records):
        raise DataError(
            f"evaluation.forgetting: {path} holds rows in the format {name}",
            hint="give running text, prompts with completions, or conversations",
        )
    if not records:
        raise DataError(f"evaluation.forgetting: {path} holds no row", hint="give some text, or set it to builtin or null")
    return records, [""] * len(records)


def _drafts(record: Record, tokenizer: ChatTokenizer) -> list[Draft]:
    """Return the rows of a record. Of running text the end-of-text token is not scored: it says nothing of the text."""
    if not isinstance(record, TextRecord):
        return make_drafts(record, tokenizer)
    ids = np.asarray(tokenizer.encode(record.text), dtype=np.int32)
    weights = np.ones(len(ids), dtype=np.float32)
    weights[:1] = 0  # nothing predicts the first token
    if len(ids) < 2:
        raise DataError("the text has fewer than two tokens: none of them can be predicted")
    return [Draft(ids, weights, 0)]


def _refusal(path: Path, problems: Sequence[RowProblem]) -> DataError:
    return DataError(
        f"evaluation.forgetting: {len(problems):,} rows of {path} cannot be used", tuple(problems), hint="mend or remove the rows"
    )


def _content_hash(rows: Sequence[TokenRow]) -> str:
    digest = hashlib.sha256(str(len(rows)).encode())
    for row in rows:
        digest.update(f"|{row.length}|".encode())
        digest.update(row.ids.astype("<i4").tobytes())
        digest.update(row.weights.astype("<f4").tobytes())
    return digest.hexdigest()
