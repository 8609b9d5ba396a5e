"""Tunes in ABC notation: scales, keys, meters, bars that add up, and phrases that return. Made by rules, so valid by construction.

Pairs of key and meter, and titles, are split by `held_out`; every function here gives the training side. Next: `prose.py`.
"""

from __future__ import annotations

from kivnun.data.scenarios.draws import Draws
from kivnun.data.splits import held_out
from recipes.tiny_phi.chat import Task, chat
from recipes.tiny_phi.stocks import stock
from recipes.tiny_phi.words import ADJECTIVES, NOUNS, Words

KEYS = ("C", "G", "D", "A", "F", "Bb", "Am", "Em", "Dm", "Bm", "Gm", "Ddor", "Ador", "Edor", "Gmix", "Dmix", "Amix")
METERS = {"4/4": 8, "3/4": 6, "2/4": 4, "6/8": 6, "9/8": 9}
"""Eighth notes in a bar."""
RHYTHMS = {
    "4/4": (
        (2, 2, 2, 2),
        (2, 1, 1, 2, 2),
        (1, 1, 1, 1, 2, 2),
        (3, 1, 2, 2),
        (4, 2, 2),
        (1, 1, 1, 1, 1, 1, 1, 1),
        (4, 4),
        (2, 2, 1, 1, 2),
    ),
    "3/4": ((2, 2, 2), (4, 2), (2, 1, 1, 2), (3, 1, 2), (1, 1, 1, 1, 2), (2, 4)),
    "2/4": ((2, 2), (1, 1, 2), (2, 1, 1), (1, 1, 1, 1), (3, 1)),
    "6/8": ((3, 3), (2, 1, 2, 1), (1, 1, 1, 3), (1, 1, 1, 1, 1, 1), (2, 1, 3), (3, 2, 1)),
    "9/8": ((3, 3, 3), (2, 1, 2, 1, 3), (1, 1, 1, 2, 1, 3), (1, 1, 1, 1, 1, 1, 3)),
}
LETTERS = "CDEFGAB"
DANCES = {
    "4/4": ("reel", "march", "song"),
    "3/4": ("waltz", "song"),
    "2/4": ("polka", "march"),
    "6/8": ("jig", "lullaby"),
    "9/8": ("slip jig",),
}
ASKS = stock("melodies.asks")


def tonic(key: str) -> int:
    """Return the tonic's place among the letters, C = 0."""
    return LETTERS.index(key[0])


def note(step: int, length: int) -> str:
    """Return a note in ABC: `step` counts letters from middle C, `length` counts eighths."""
    octave, letter = divmod(step, 7)
    name = LETTERS[letter]
    text = name + "," * -octave if octave <= 0 else name.lower() + "'" * (octave - 1)
    return text if length == 1 else f"{text}{length}"


def tune(draws: Draws, key: str, meter: str) -> list[str]:
    """Return the lines of a tune: two or four of four bars each, in the form AABA, AB or ABAC, ending on the tonic."""
    root = tonic(key)
    phrases = {name: _phrase(draws, root, meter) for name in "ABC"}
    form = draws.pick(("AB", "AB", "AABA", "ABAC"))
    lines = [phrases[name] for name in form]
    lines[-1] = [*lines[-1][:-1], [(root + (7 if root < 4 else 0), METERS[meter])]]
    return [_line(bars, last=place == len(lines) - 1) for place, bars in enumerate(lines)]


def title(draws: Draws, words: Words) -> str:
    """Return a title of the training side."""
    while True:
        noun = draws.pick(NOUNS).capitalize()
        name = draws.pick(
            (
                f"The {draws.pick(ADJECTIVES).capitalize()} {noun}",
                f"{words.person(draws)}'s {noun}",
                f"{words.pseudo(draws).capitalize()} {noun}",
                f"{noun} of {words.place(draws)}",
            )
        )
        if not held_out("title", name):
            return name


def key_and_meter(draws: Draws) -> tuple[str, str]:
    """Return a pair of the training side."""
    while True:
        key, meter = draws.pick(KEYS), draws.pick(tuple(METERS))
        if not held_out("melody", f"{key} {meter}"):
            return key, meter


def document(draws: Draws, words: Words) -> str:
    """Return a tune with its head, alone or asked for in a chat."""
    key, meter = key_and_meter(draws)
    name = title(draws, words)
    dance = draws.pick(DANCES[meter])
    head = f"X:{draws.between(1, 99)}\nT:{name}\n" + (f"R:{dance}\n" if draws.chance(0.4) else "") + f"M:{meter}\nL:1/8\nK:{key}\n"
    abc = head + "\n".join(tune(draws, key, meter))
    if draws.chance(0.5):
        return abc
    return chat(draws, [Task(draws.pick(ASKS).format(key=key, meter=meter, dance=dance, title=name), abc)])


def _phrase(draws: Draws, root: int, meter: str) -> list[list[tuple[int, int]]]:
    """Return four bars of (step, length): a walk by small steps around the tonic, with a rhythm that comes back."""
    rhythms = [draws.pick(RHYTHMS[meter]), draws.pick(RHYTHMS[meter])]
    step = root + draws.pick((0, 2, 4))
    bars = []
    for place in range(4):
        bar = []
        for length in rhythms[place % 2]:
            bar.append((step, length))
            step = max(-3, min(13, step + draws.pick((-2, -1, -1, 0, 1, 1, 2, draws.pick((-4, 4, 3, -3))))))
        bars.append(bar)
    if draws.chance(0.4):
        bars[2] = bars[0]
    return bars


def _line(bars: list[list[tuple[int, int]]], last: bool) -> str:
    return " | ".join(_bar(bar) for bar in bars) + (" |]" if last else " |")


def _bar(bar: list[tuple[int, int]]) -> str:
    return " ".join(note(step, length) for step, length in bar)
