"""Tunes that a model wrote: how new they are beside those it was trained on, and a picture of them.

Novelty is the share of the runs of four notes in a reply that no training tune has, transposed or not; a reply that is no tune has
none to count. It needs the training rows, so it is computed from a finished run and not with the spec's metrics. The picture is a
piano roll, one SVG without script or font: time to the right, pitch upwards. Next: `cli/scenario.py`, which writes both.

Source of the measure: n-gram novelty as in McCoy et al. 2023, "How much do language models copy from their training data?".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from kivnun.data.abc_notation import Tune, parse
from kivnun.data.formats import stream_records
from kivnun.data.rows import ChatRecord
from kivnun.errors import DataError, RunFolderError
from kivnun.evaluate.intervals import Interval, interval_of
from kivnun.evaluate.metrics import Measure
from kivnun.events import Evaluated, read_events
from kivnun.run_folder import RunFolder
from kivnun.spec import load_spec

GRAM = 4
DRAWS = 1000
PANEL_WIDTH, PANEL_HEIGHT, GAP, HEAD = 430, 108, 18, 22
LANE_TOP, LANE_BOTTOM = 20, 8
REFERENCE, WRITTEN, LINES, INK = "#b0b0b0", "#2a6f97", "#d8d8d8", "#222222"
Gram = tuple[tuple[int, Fraction], ...]


@dataclass(frozen=True, slots=True)
class Novelty:
    """The share of runs of four notes that are not in training, over the replies that are tunes, with a 95 % interval; how many of
    the replies are tunes, and how many are a training tune as a whole. `share` is None when no reply is a tune."""

    share: float | None
    interval: Interval | None
    replies: int
    tunes: int
    copies: int


def novelty(replies: Sequence[str], training: Sequence[str], seed: int = 0) -> Novelty:
    """Return how new the replies are beside the training texts; texts that are no tune in ABC notation are passed over."""
    known_tunes = [tune for text in training if (tune := parsed(text)) is not None]
    known = {gram for tune in known_tunes for gram in grams(tune)}
    whole = {_melody(tune) for tune in known_tunes}
    tunes = [tune for text in replies if (tune := parsed(text)) is not None]
    counts = np.array([[sum(g not in known for g in grams(t)), len(grams(t))] for t in tunes if grams(t)], dtype=np.float64)
    measure = Measure("novelty", counts) if len(counts) else None
    return Novelty(
        measure.figure if measure else None,
        interval_of(measure, DRAWS, seed) if measure else None,
        len(replies),
        len(tunes),
        sum(_melody(tune) in whole for tune in tunes),
    )


def novelty_of_run(run: Path) -> dict[str, Novelty]:
    """Return the novelty of the base's and the tuned model's kept replies, and of the references, beside the run's training rows.

    Raises RunFolderError when the run kept no replies: `evaluation.samples` says how many.
    """
    training = training_replies(run)
    samples = run_samples(run)
    texts = {
        "base": [sample["reply"] for sample in samples["base"]],
        "tuned": [sample["reply"] for sample in samples["tuned"]],
        "references": [sample["reference"] for sample in samples["tuned"]],
    }
    return {which: novelty(replies, training) for which, replies in texts.items()}


def training_replies(run: Path) -> list[str]:
    """Return the last reply of each training row of a run, from the files that its spec names."""
    spec = load_spec(RunFolder(run).resolved)
    streams = [
        stream_records(source.path, spec.data.format, spec.data.columns, spec.data.instruction) for source in spec.data.train
    ]
    return [record.messages[-1]["content"] for stream in streams for record in stream if isinstance(record, ChatRecord)]


def run_samples(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the replies that a finished run kept, of base and tuned. Raises RunFolderError."""
    latest: dict[str, list[dict[str, Any]]] = {"base": [], "tuned": []}
    for event in read_events(run / "events.jsonl"):
        if isinstance(event, Evaluated) and event.samples:
            latest[event.which] = event.samples
    if not latest["tuned"]:
        raise RunFolderError(f"{run} holds no replies of a tuned model", hint="set evaluation.samples, and let the run finish")
    return latest


def parsed(text: str) -> Tune | None:
    """Return the tune, or None where the text is none."""
    try:
        return parse(text)
    except DataError:
        return None


def grams(tune: Tune) -> list[Gram]:
    """Return every run of GRAM notes: each note's distance in pitch from the first of them, and its length."""
    notes = tune.notes
    return [
        tuple((note.pitch - notes[start].pitch, note.length) for note in notes[start : start + GRAM])
        for start in range(len(notes) - GRAM + 1)
    ]


def _melody(tune: Tune) -> Gram:
    return tuple((note.pitch - tune.notes[0].pitch, note.length) for note in tune.notes)


def piano_rolls(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return an SVG of one line per sample: the reference on the left, what the model wrote on the right, on one scale of pitch."""
    width = 2 * PANEL_WIDTH + 3 * GAP
    height = HEAD + len(samples) * (PANEL_HEIGHT + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *(
            f'<text x="{x}" y="{GAP}" fill="{INK}">{name}</text>'
            for x, name in ((GAP, "reference"), (PANEL_WIDTH + 2 * GAP, "model"))
        ),
    ]
    for number, sample in enumerate(samples):
        top = HEAD + GAP / 2 + number * (PANEL_HEIGHT + GAP)
        heights = [note.pitch for text in (sample["reference"], sample["reply"]) if (tune := parsed(text)) for note in tune.notes]
        parts += _panel(GAP, top, sample["reference"], REFERENCE, heights)
        parts += _panel(PANEL_WIDTH + 2 * GAP, top, sample["reply"], WRITTEN, heights)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: float, top: float, text: str, colour: str, heights: Sequence[int]) -> list[str]:
    """Return one roll: frame, bar lines (strong where a part ends), boxes for notes; `heights` are the pitches it has room for."""
    frame = f'<rect x="{left}" y="{top}" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}" fill="none" stroke="{LINES}"/>'
    try:
        tune = parse(text)
    except DataError as error:
        return [frame, _caption(left, top, f"no tune: {error.message}")]
    low = min(heights)
    lane = (PANEL_HEIGHT - LANE_TOP - LANE_BOTTOM) / (max(heights) - low + 1)
    scale = PANEL_WIDTH / float(sum(bar.length for bar in tune.bars))
    parts, time = [frame, _caption(left, top, f"{tune.title}, {tune.key}, {tune.meter_text}")], Fraction(0)
    for bar in tune.bars[:-1]:
        time += bar.length
        x = left + float(time) * scale
        stroke = f'stroke="{INK}" stroke-width="1.5"' if bar.ends_part else f'stroke="{LINES}"'
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top + LANE_TOP}" y2="{top + PANEL_HEIGHT}" {stroke}/>')
    for note in tune.notes:
        x, y = left + float(note.start) * scale, top + PANEL_HEIGHT - LANE_BOTTOM - (note.pitch - low + 1) * lane
        size = f'width="{max(float(note.length) * scale - 1, 1):.1f}" height="{max(lane - 0.5, 1.5):.1f}"'
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} rx="1" fill="{colour}"/>')
    return parts


def _caption(left: float, top: float, text: str) -> str:
    return f'<text x="{left + 5}" y="{top + 14}" fill="{INK}">{escape(text[:64])}</text>'
