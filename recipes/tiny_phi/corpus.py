"""Writes the corpus: ten sources of documents, packed into rows of at most 255 tokens, and what each source came to.

Every generated document is a pure function of (seed, source, number). Short documents share a row, with an end-of-text mark
between them, so that a step is about the same work whatever it draws. Nothing is dropped silently: `corpus.json` counts the
documents that were split, drawn again or left out for a held-out value. Next: `build.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import babel
from tokenizers import Tokenizer

from kivnun.data.scenarios.draws import Draws
from recipes.tiny_phi import chats, classify, cldr_text, copying, docs, entities, lookup, melodies, prose
from recipes.tiny_phi.leaks import find_held_out
from recipes.tiny_phi.tokenizer import END_OF_TEXT
from recipes.tiny_phi.words import Words

ROW_TOKENS = 255  # the loader adds the end-of-text token: 256
SEED = 7
CHUNK = 2_000
TOKENS = {
    "copying": 6_500_000,
    "lookup": 5_000_000,
    "entities": 2_000_000,
    "classify": 1_200_000,
    "chats": 1_600_000,
    "glossary": 2_200_000,
    "values": 2_600_000,
    "melodies": 1_200_000,
    "prose": 1_200_000,
    "modules": 300_000,
}
"""Tokens wanted of each generated source. Docs are finite (about 1.5 M) and are passed over four times (`spec.yaml`)."""
VALIDATION_ROWS = 20
DOCS_VALIDATION_EVERY = 70


@dataclass
class SourceReport:
    """What one source came to. `bytes_per_token` is UTF-8 bytes over tokens, markers left in."""

    documents: int = 0
    rows: int = 0
    tokens: int = 0
    utf8_bytes: int = 0
    split: int = 0
    drawn_again: int = 0
    left_out: int = 0
    bytes_per_token: float = 0.0
    left_out_topics: list[str] = field(default_factory=list)


def makers(words: Words, documented: list[tuple[str, str]]) -> dict[str, Callable[[Draws], str]]:
    """Return the generated sources: name -> a function from draws to one document."""
    return {
        "copying": lambda draws: copying.document(draws, words),
        "lookup": lambda draws: lookup.document(draws, words),
        "entities": lambda draws: entities.document(draws, words),
        "classify": lambda draws: classify.document(draws, words),
        "chats": lambda draws: chats.document(draws, words),
        "glossary": cldr_text.glossary_document,
        "values": cldr_text.values_document,
        "melodies": lambda draws: melodies.document(draws, words),
        "prose": lambda draws: prose.document(draws, words),
        "modules": lambda draws: docs.module_chat(draws, documented),
    }


def sample_texts(words: Words, documented: list[tuple[str, str]], seed: int = SEED) -> Iterator[str]:
    """Give about 9 MB over all sources for the tokenizer to learn its merges from; a third is documentation."""
    for number, (_, text) in enumerate(documented):
        if number % 4 != 0:
            yield text
    shares = {"values": 500_000, "glossary": 2_400_000, "copying": 500_000, "lookup": 700_000}
    for name, make in makers(words, documented).items():
        written = number = 0
        while written < shares.get(name, 350_000):
            text = make(Draws(seed, f"tokenizer.{name}", number))
            written, number = written + len(text), number + 1
            yield text


def write_corpus(
    folder: Path, tokenizer: Tokenizer, words: Words, documented: list[tuple[str, str]], scale: float = 1.0
) -> dict[str, SourceReport]:
    """Write train/<source>.jsonl, validation.jsonl and corpus.json into `folder`; `scale` shortens the generated sources."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    reports: dict[str, SourceReport] = {}
    validation: list[str] = []
    for name, make in makers(words, documented).items():
        reports[name] = SourceReport()
        wanted = int(TOKENS[name] * scale)
        rows = pack_rows(generated(make, name, "train", tokenizer, reports[name]))
        _write_rows(folder / "train" / f"{name}.jsonl", _until(rows, wanted, reports[name]))
        held = pack_rows(generated(make, name, "validation", tokenizer, SourceReport()))
        validation += [text for text, _ in _first(held, VALIDATION_ROWS)]
    reports["docs"] = SourceReport()
    rows = list(pack_rows(split_documents([text for _, text in documented], tokenizer, reports["docs"])))
    validation += [text for text, _ in rows[::DOCS_VALIDATION_EVERY]]
    training = [row for number, row in enumerate(rows) if number % DOCS_VALIDATION_EVERY]
    _write_rows(folder / "train" / "docs.jsonl", _until(iter(training), 10**12, reports["docs"]))
    _write_rows(folder / "validation.jsonl", iter(validation))
    _write_report(folder, reports)
    return reports


def generated(
    make: Callable[[Draws], str], name: str, stream: str, tokenizer: Tokenizer, report: SourceReport
) -> Iterator[tuple[str, int]]:
    """Give (document, tokens) without end. One that is too long for a row is drawn again under its next counter."""
    number = 0
    while True:
        texts = [make(Draws(SEED, f"{stream}.{name}", index)) for index in range(number, number + CHUNK)]
        number += CHUNK
        for text, encoded in zip(texts, tokenizer.encode_batch_fast(texts), strict=True):
            if len(encoded.ids) > ROW_TOKENS:
                report.drawn_again += 1
                continue
            leaks = find_held_out(text)
            if leaks:
                report.left_out += 1
                continue
            report.documents += 1
            yield text, len(encoded.ids)


def split_documents(texts: Iterable[str], tokenizer: Tokenizer, report: SourceReport) -> Iterator[tuple[str, int]]:
    """Give (piece, tokens) of the documents; long ones are split at line borders, those that show a held-out value are left out."""
    for text in texts:
        leaks = find_held_out(text)
        if leaks:
            report.left_out += 1
            report.left_out_topics += [f"{kind} {topic}" for kind, topic in leaks]
            continue
        report.documents += 1
        pieces = list(_pieces(text, tokenizer))
        report.split += len(pieces) > 1
        yield from pieces


def pack_rows(documents: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Give rows of documents in their order, as many as fit into a row, joined by end-of-text."""
    row: list[str] = []
    length = 0
    for text, tokens in documents:
        if row and length + 1 + tokens > ROW_TOKENS:
            yield END_OF_TEXT.join(row), length
            row, length = [], 0
        length += tokens + (1 if row else 0)
        row.append(text)
    if row:
        yield END_OF_TEXT.join(row), length


def _pieces(text: str, tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """Give the text in pieces that fit into a row, cut at line borders, or at spaces within a line that is too long."""
    piece: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        parts = [line] if len(line) < 400 else [word + " " for word in line.split(" ")]
        for part in parts:
            tokens = len(tokenizer.encode(part).ids) + 1  # merges over a border can only shorten, and rarely lengthen by one
            if piece and length + tokens > ROW_TOKENS:
                yield _counted("".join(piece), tokenizer)
                piece, length = [], 0
            piece.append(part)
            length += tokens
    if piece:
        yield _counted("".join(piece), tokenizer)


def _counted(text: str, tokenizer: Tokenizer) -> tuple[str, int]:
    text = text.strip("\n")
    tokens = len(tokenizer.encode(text).ids)
    assert tokens <= ROW_TOKENS, tokens
    return text, tokens


def _until(rows: Iterator[tuple[str, int]], tokens: int, report: SourceReport) -> Iterator[str]:
    for text, length in rows:
        report.rows += 1
        report.tokens += length + 1
        report.utf8_bytes += len(text.encode())
        yield text
        if report.tokens >= tokens:
            break
    report.bytes_per_token = round(report.utf8_bytes / max(1, report.tokens), 3)


def _first(rows: Iterator[tuple[str, int]], count: int) -> Iterator[tuple[str, int]]:
    for _ in range(count):
        yield next(rows)


def _write_rows(path: Path, texts: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _write_report(folder: Path, reports: dict[str, SourceReport]) -> None:
    content = {
        "python": docs.python_version(),
        "babel": babel.__version__,
        "seed": SEED,
        "row_tokens": ROW_TOKENS,
        "sources": {name: asdict(report) for name, report in reports.items()},
    }
    (folder / "corpus.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
