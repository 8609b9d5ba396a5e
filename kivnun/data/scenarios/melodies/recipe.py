"""Tunes in ABC notation: two repeated parts of four bars, in the key and meter and from the first bar that the prompt gives.

Pairs of key and meter and titles are split. A tune walks over the chords of its key (tonic, then subdominant and dominant, then
home), with passing notes, and its third bar mostly repeats the first; every tune passes `abc_notation.parse`. The built-in base
has seen tunes, but none with repeats, and none in a held-out pair of key and meter. Next: `evaluate/melodies.py`.
"""

from __future__ import annotations

import re

from kivnun.data.abc_notation import LETTERS, parse
from kivnun.data.scenarios.draws import Draws
from kivnun.data.scenarios.names import invented
from kivnun.data.scenarios.scenario import Example, Row, Topic, chat
from kivnun.data.splits import wanted
from kivnun.errors import DataError

KEYS = ("C", "G", "D", "A", "F", "Bb", "Am", "Em", "Dm", "Bm", "Gm", "Ddor", "Ador", "Edor", "Gmix", "Dmix", "Amix")
RHYTHMS = {
    "4/4": ((2, 2, 2, 2), (3, 1, 2, 2), (4, 2, 2), (2, 1, 1, 4), (2, 2, 4)),
    "3/4": ((2, 2, 2), (4, 2), (3, 1, 2), (2, 1, 1, 2)),
    "2/4": ((2, 2), (1, 1, 2), (2, 1, 1), (3, 1)),
    "6/8": ((3, 3), (2, 1, 3), (2, 1, 2, 1), (1, 1, 1, 3)),
    "9/8": ((3, 3, 3), (2, 1, 2, 1, 3), (2, 1, 3, 3)),
}
"""Eighth notes of each bar, by meter; each rhythm fills its bar."""
CHORDS = ((0, 2, 4), (3, 5, 7), (4, 6, 8), (0, 2, 4))
"""The degrees that the strong notes of the four bars are taken from."""
ASK = 'Tune "{title}" in {key}, {meter}, two repeated parts, beginning {bar}'
NOUNS = ("Harbour", "Mill", "Lantern", "River", "Garden", "Winter", "Road", "Window", "Island", "Farewell", "Morning", "Bridge")
FORMS = ("The {} {}", "{}'s {}", "{} {}")


def examples(split: str, count: int, seed: int) -> list[Example]:
    """Return rows that ask for a tune by title, key and meter, and give one."""
    found: list[Example] = []
    for number in range(count):
        draws = Draws(seed, "scenario.melodies", split, number)
        key, meter = draws.pick(PAIRS[split])
        title = _title(draws, split)
        topics: tuple[Topic, ...] = (("melody", f"{key} {meter}"), ("title", title))
        found.append(Example(row(title, key, meter, _tune(draws, title, key, meter)), topics))
    return found


def row(title: str, key: str, meter: str, abc: str) -> Row:
    return chat(ASK.format(title=title, key=key, meter=meter, bar=first_bar(abc)), abc)


def first_bar(abc: str) -> str:
    """Return the first bar of a tune, as written."""
    body = next(line for line in abc.split("\n") if line[1:2] != ":" or line.startswith("|"))
    return next(bar.strip() for bar in re.split(r"[|:\[\]]+", body) if bar.strip())


def convert(record: Row) -> Row:
    """Return the row of a record {"abc": ...}, a whole tune of one voice; the prompt is made from its header. Raises DataError."""
    abc = record.get("abc")
    if not isinstance(abc, str):
        raise DataError("a record holds a tune in ABC notation under the key 'abc'")
    tune = parse(abc)
    return row(tune.title, tune.key, tune.meter_text, abc.strip("\n"))


def _pairs(split: str) -> tuple[tuple[str, str], ...]:
    return tuple((key, meter) for key in KEYS for meter in RHYTHMS if wanted("melody", f"{key} {meter}", split))


PAIRS = {split: _pairs(split) for split in ("train", "test")}


def _title(draws: Draws, split: str) -> str:
    while True:
        title = draws.pick(FORMS).format(invented(draws).capitalize(), draws.pick(NOUNS))
        if wanted("title", title, split):
            return title


def _tune(draws: Draws, title: str, key: str, meter: str) -> str:
    head = f"X:1\nT:{title}\nM:{meter}\nL:1/8\nK:{key}\n"
    low = LETTERS.index(key[0])
    parts = [_part(draws, low, meter), _part(draws, low + 2, meter)]
    parts[1][-1] = [(low + (7 if low < 4 else 0), sum(RHYTHMS[meter][0]))]
    return head + "\n".join("|: " + " | ".join(" ".join(_note(*note) for note in bar) for bar in part) + " :|" for part in parts)


def _part(draws: Draws, low: int, meter: str) -> list[list[tuple[int, int]]]:
    """Return four bars of (step, eighths): `step` counts letters from middle C."""
    rhythms = [draws.pick(RHYTHMS[meter]), draws.pick(RHYTHMS[meter])]
    step = low + draws.pick((0, 2, 4))
    bars: list[list[tuple[int, int]]] = []
    for place, chord in enumerate(CHORDS):
        bar: list[tuple[int, int]] = []
        for length in rhythms[place % 2]:
            if length >= 2:
                step = min((low + degree + octave for degree in chord for octave in (-7, 0, 7)), key=lambda s: (abs(s - step), s))
            bar.append((step, length))
            step = max(-2, min(13, step + draws.pick((-2, -1, -1, 1, 1, 2))))
        bars.append(bar)
    if draws.chance(0.5):
        bars[2] = bars[0]
    return bars


def _note(step: int, length: int) -> str:
    octave, letter = divmod(step, 7)
    name = LETTERS[letter] + "," * -octave if octave <= 0 else LETTERS[letter].lower() + "'" * (octave - 1)
    return name if length == 1 else f"{name}{length}"
