"""A strict parser of ABC 2.1 for tunes of one voice: header, notes with their pitch and length, bars that add up.

`parse` returns the tune or raises DataError with the line and what is wrong; it never mends. Read are: information fields and
inline fields; notes, accidentals, octaves, lengths, broken rhythm; rests; chords; grace notes; tuplets; ties and slurs; bar lines,
repeats and endings; decorations, annotations and chord symbols; comments, continued lines and lyrics. Several voices (`V:`), macros
(`m:`) and user symbols (`U:`) are refused. A bar must last as long as the meter says. The first bar of a part may be shorter, an
upbeat; then the last bar of that part, or of a later one, may lack as much.

Source: Chris Walshaw and others 2011, "The abc music standard 2.1", sections 3 (fields), 4 (the tune body) and 7.
Next: `scenarios/melodies/recipe.py`, which writes such tunes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from kivnun.errors import DataError

LETTERS = "CDEFGAB"
SEMITONES = (0, 2, 4, 5, 7, 9, 11)
MODES = {"maj": 0, "ion": 0, "": 0, "min": 3, "m": 3, "aeo": 3, "mix": 1, "dor": 2, "phr": 4, "lyd": -1, "loc": 5}
"""How many sharps fewer than the major key on the same note."""
SHARPS = {letter: count for count, letter in enumerate("FCGDAEB", start=-1)}
HEADER_FIELDS = "ABCDFGHKLMNOPQRSTWXZrsIw"
BODY_FIELDS = "IKLMNPQRTrsWw"
REFUSED_FIELDS = {"V": "several voices", "m": "macros", "U": "user symbols"}
ACCIDENTALS = {"": None, "=": 0, "^": 1, "^^": 2, "_": -1, "__": -2}
TUPLETS = {2: 3, 3: 2, 4: 3, 6: 2, 8: 3}
"""In the time of how many, for tuplets that do not depend on the meter."""
WHOLE = Fraction(1)

_FIELD = re.compile(r"([A-Za-z]):\s*(.*?)\s*$", re.ASCII)
_NOTE = r"(?P<accidental>\^\^|\^|__|_|=)?(?P<letter>[A-Ga-g])(?P<octave>[',]*)"
_LENGTH = r"(?P<number>\d{0,4})(?P<slashes>/{0,6})(?P<divisor>\d{0,4})"
_TOKENS = re.compile(
    "|".join(
        (
            r"(?P<space>[ \t`]+)",
            r"(?P<inline>\[[A-Za-z]:[^\]\n]*\])",
            r"(?P<ending>\[[1-9](?:[-,][1-9])*)",
            r"(?P<bar>:*\|[\]|]?:*(?:[1-9](?:[-,][1-9])*)?|\[\|:*|::)",
            r"(?P<quoted>\"[^\"\n]*\")",
            r"(?P<decoration>![A-Za-z0-9+<>().]+!|[.~HLMOPSTuv](?=[\^_=A-Ga-gzx\[\"!({~.]))",
            r"(?P<tuplet>\([2-9](?::[1-9]?(?::[1-9]?)?)?)",
            r"(?P<slur>[()])",
            r"(?P<grace>\{/?[\^_=A-Ga-g',0-9/ ]+\})",
            r"(?P<chord>\[(?:[\^_=]*[A-Ga-g][',]*\d{0,4}/{0,6}\d{0,4}-?)+\])" + r"(?P<chord_length>\d{0,4}/{0,6}\d{0,4})",
            r"(?P<note>" + _NOTE + ")" + _LENGTH,
            r"(?P<bars_rest>Z\d{0,4})",
            r"(?P<rest>[zx])(?P<rest_length>\d{0,4}/{0,6}\d{0,4})",
            r"(?P<tie>-)",
            r"(?P<broken>>{1,3}|<{1,3})",
        )
    ),
    re.ASCII,
)


class Note(NamedTuple):
    """One sounding note: MIDI pitch (60 is middle C), and where it begins and how long it lasts, in whole notes."""

    pitch: int
    start: Fraction
    length: Fraction


class Bar(NamedTuple):
    """One bar: how long it lasts in whole notes, and whether a part of the tune ends with it (a repeat or a double bar)."""

    length: Fraction
    ends_part: bool


@dataclass(frozen=True, slots=True)
class Tune:
    """A parsed tune. `meter` is None where the tune has none (M:none); `key` is as written."""

    title: str
    key: str
    meter: Fraction | None
    meter_text: str
    notes: tuple[Note, ...]
    bars: tuple[Bar, ...]

    @property
    def parts(self) -> tuple[int, ...]:
        """Return the number of bars of each part."""
        ends = [place + 1 for place, bar in enumerate(self.bars) if bar.ends_part]
        return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


def parse(text: str) -> Tune:
    """Return the tune that `text` holds. Raises DataError naming the line."""
    lines = text.strip("\n").split("\n")
    header = _Header()
    body_from = header.read(lines)
    body = _Body(header)
    for number, line in enumerate(lines[body_from:], start=body_from + 1):
        body.line(number, line)
    return body.tune()


@dataclass
class _Header:
    title: str = ""
    key: str = ""
    meter_text: str = "none"
    meter: Fraction | None = None
    unit: Fraction | None = None

    def read(self, lines: list[str]) -> int:
        """Read up to the field K, which ends the header; return the number of lines read."""
        for number, line in enumerate(lines, start=1):
            code = line.split("%", 1)[0].rstrip()
            if not code and line.startswith("%"):
                continue
            found = _FIELD.match(code)
            if found is None:
                raise _error(number, "is no field, and the header has no K: yet")
            name, value = found.groups()
            if name in REFUSED_FIELDS:
                raise _error(number, f"has {REFUSED_FIELDS[name]} ({name}:); a tune of one voice is read")
            if name not in HEADER_FIELDS:
                raise _error(number, f"has the field {name}:, which the header of a tune does not know")
            wanted = {1: "X", 2: "T"}.get(number)
            if wanted is not None and name != wanted:
                raise _error(number, f"must be the field {wanted}:, a tune begins with X: and T:")
            self.field(number, name, value)
            if name == "K":
                return number
        raise DataError("the tune has no field K:, which ends its header")

    def field(self, number: int, name: str, value: str) -> None:
        if name == "X" and not value.isdecimal():
            raise _error(number, "X: must be a number")
        if name == "T":
            self.title = self.title or value
        if name == "M":
            self.meter_text, self.meter = value, _meter(number, value)
        if name == "L":
            self.unit = _unit(number, value)
        if name == "K":
            key_accidentals(value, number)
            self.key = value


def key_accidentals(key: str, number: int = 0) -> dict[str, int]:
    """Return letter -> +1 or -1 for the letters that a key changes. Raises DataError where it is no key."""
    if key in ("", "none"):
        return {}
    found = re.match(r"([A-G])([#b]?)\s*([A-Za-z]*)((?:\s+[\^_=][a-g])*)(\s+(?:clef=)?(?:treble|bass|alto|tenor)\S*)?$", key)
    mode = found.group(3).lower() if found else ""
    mode = mode if mode == "m" else mode[:3]
    if found is None or mode not in MODES or (found.group(3) == "M" and mode == "m"):
        raise _error(number, "K: names no key, like G, Bb, Am or Ddor")
    sharps = SHARPS[found.group(1)] + 7 * {"": 0, "#": 1, "b": -1}[found.group(2)] - MODES[mode]
    if abs(sharps) > 7:
        raise _error(number, f"K: would have {abs(sharps)} sharps or flats, there are at most 7")
    changed = dict.fromkeys("FCGDAEB"[: max(sharps, 0)], 1) | dict.fromkeys("BEADGCF"[: max(-sharps, 0)], -1)
    for sign, letter in re.findall(r"([\^_=])([a-g])", found.group(4)):
        changed[letter.upper()] = {"^": 1, "_": -1, "=": 0}[sign]
    return changed


def _meter(number: int, value: str) -> Fraction | None:
    if value == "none":
        return None
    named = {"C": "4/4", "C|": "2/2"}.get(value, value)
    found = re.match(r"\(?(\d+(?:\+\d+)*)\)?/(1|2|4|8|16|32|64)$", named)
    upper = sum(map(int, found.group(1).split("+"))) if found else 0
    if found is None or upper == 0:
        raise _error(number, "M: must be C, C|, none or a fraction like 6/8")
    return Fraction(upper, int(found.group(2)))


def _unit(number: int, value: str) -> Fraction:
    found = re.match(r"1(?:/(1|2|4|8|16|32|64|128|256|512))?$", value)
    if found is None:
        raise _error(number, "L: must be 1 or 1 over a power of two, like 1/8")
    return Fraction(1, int(found.group(1) or 1))


@dataclass
class _Body:
    """Reads the lines after the header. `time` is where the next note begins, `bar_from` where this bar began."""

    header: _Header
    notes: list[Note] = field(default_factory=list[Note])
    bars: list[Bar] = field(default_factory=list[Bar])
    time: Fraction = Fraction(0)
    bar_from: Fraction = Fraction(0)
    upbeats: list[Fraction] = field(default_factory=list[Fraction])
    part_begins: bool = True
    in_bar: dict[tuple[str, int], int] = field(default_factory=dict[tuple[str, int], int])
    tuplet: tuple[Fraction, int] = (WHOLE, 0)
    broken: Fraction | None = None
    last: tuple[Fraction, int] | None = None
    tied: bool = False
    open_slurs: int = 0
    open_repeat: bool = False
    number: int = 0

    def __post_init__(self) -> None:
        head = self.header
        self.key = key_accidentals(head.key)
        # Section 3.1.7: without L: the unit is a sixteenth in meters under 3/4, else an eighth.
        short = head.meter is not None and head.meter < Fraction(3, 4)
        self.unit = head.unit or Fraction(1, 16 if short else 8)
        self.meter = head.meter

    def line(self, number: int, line: str) -> None:
        self.number = number
        code = line.split("%", 1)[0].rstrip().removesuffix("\\")
        if not code.strip():
            if line.startswith("%"):
                return
            raise self.error("is empty: an empty line ends a tune")
        found = _FIELD.match(code)
        if found is not None and not code.startswith("|"):
            self.field(*found.groups())
            return
        place = 0
        while place < len(code):
            token = _TOKENS.match(code, place)
            if token is None or token.end() == place:
                raise self.error(f"cannot be read at character {place + 1}")
            self.token(token)
            place = token.end()

    def field(self, name: str, value: str) -> None:
        if name in REFUSED_FIELDS:
            raise self.error(f"has {REFUSED_FIELDS[name]} ({name}:); a tune of one voice is read")
        if name not in BODY_FIELDS:
            raise self.error(f"has the field {name}:, which may not stand in the body of a tune")
        if name == "K":
            self.key = key_accidentals(value, self.number)
        if name == "L":
            self.unit = _unit(self.number, value)
        if name == "M":
            if self.time != self.bar_from:
                raise self.error("changes the meter within a bar")
            self.meter = _meter(self.number, value)

    def token(self, token: re.Match[str]) -> None:
        kind = token.lastgroup if token.lastgroup in ("space", "inline", "ending", "quoted", "decoration") else None
        if kind in ("space", "quoted", "decoration", "ending"):
            return
        if kind == "inline":
            self.field(token.group()[1], token.group()[3:-1].strip())
        elif token.group("bar") is not None:
            self.bar(token.group("bar"))
        elif token.group("note") is not None:
            pitch = self.pitch(token.group("accidental") or "", token.group("letter"), token.group("octave"))
            self.sound((pitch,), self.length(token.group("number") + token.group("slashes") + token.group("divisor")))
        elif token.group("chord") is not None:
            self.chord(token.group("chord")[1:-1], token.group("chord_length"))
        elif token.group("rest") is not None:
            self.sound((), self.length(token.group("rest_length")))
        elif token.group("bars_rest") is not None:
            self.rest_of_bars(int(token.group("bars_rest")[1:] or 1))
        elif token.group("tuplet") is not None:
            self.begin_tuplet(token.group("tuplet"))
        elif token.group("broken") is not None:
            self.break_rhythm(token.group("broken"))
        elif token.group("slur") is not None:
            self.open_slurs += 1 if token.group() == "(" else -1
            if self.open_slurs < 0:
                raise self.error("ends a slur that was not begun")
        elif token.group("tie") is not None:
            if self.last is None or self.last[1] == 0:
                raise self.error("has a tie that follows no note")
            self.tied = True

    def length(self, text: str) -> Fraction:
        """Return how long a note written with this length lasts, in whole notes."""
        found = re.match(r"(\d{0,4})(/{0,6})(\d{0,4})$", text)
        assert found is not None, text
        upper, slashes, lower = int(found.group(1) or 1), len(found.group(2)), found.group(3)
        if upper == 0 or (lower and (int(lower) == 0 or slashes != 1)):
            raise self.error("has a note whose length is no fraction")
        return self.unit * Fraction(upper, int(lower) if lower else 2**slashes)

    def pitch(self, accidental: str, letter: str, octave: str) -> int:
        """Return the MIDI pitch; an accidental holds to the end of the bar, for its octave (section 4.2)."""
        height = octave.count("'") - octave.count(",") + (1 if letter.islower() else 0)
        name = letter.upper()
        change = ACCIDENTALS[accidental]
        if change is not None:
            self.in_bar[name, height] = change
        change = self.in_bar.get((name, height), self.key.get(name, 0))
        return 60 + SEMITONES[LETTERS.index(name)] + 12 * height + change

    def sound(self, pitches: tuple[int, ...], written: Fraction) -> None:
        factor, left = self.tuplet
        length = written * factor if left else written
        self.tuplet = (factor, max(left - 1, 0))
        if self.broken is not None:
            length, self.broken = length * self.broken, None
        held = self.tied and len(pitches) == 1 and self.notes and self.notes[-1].pitch == pitches[0]
        if self.tied and not held:
            raise self.error("ties two notes that are not the same")
        if held:
            self.notes[-1] = self.notes[-1]._replace(length=self.notes[-1].length + length)
        else:
            self.notes.extend(Note(pitch, self.time, length) for pitch in pitches)
        self.tied = False
        self.last = length, len(pitches)
        self.time += length

    def chord(self, inside: str, outer: str) -> None:
        pitches: list[int] = []
        lengths: list[Fraction] = []
        for accidental, letter, octave, length in re.findall(r"(\^\^|\^|__|_|=)?([A-Ga-g])([',]*)(\d{0,4}/{0,6}\d{0,4})-?", inside):
            pitches.append(self.pitch(accidental, letter, octave))
            lengths.append(self.length(length))
        self.sound(tuple(pitches), lengths[0] * self.length(outer) / self.unit)

    def rest_of_bars(self, count: int) -> None:
        if self.meter is None or count == 0 or self.time != self.bar_from:
            raise self.error("has a rest of whole bars where no bar begins, or in free meter")
        for rest in range(count):
            self.sound((), self.meter)
            if rest < count - 1:
                self.bar("|")

    def begin_tuplet(self, text: str) -> None:
        parts = [int(part) if part else 0 for part in text[1:].split(":")] + [0, 0]
        count, time, notes = parts[:3]
        compound = self.meter is not None and self.meter.numerator % 3 == 0 and self.meter.denominator >= 8
        time = time or TUPLETS.get(count) or (3 if compound else 2)
        if self.tuplet[1]:
            raise self.error("begins a tuplet within another")
        self.tuplet = Fraction(time, count), notes or count

    def break_rhythm(self, text: str) -> None:
        if self.last is None or self.broken is not None:
            raise self.error("has a broken rhythm that follows no note")
        short = Fraction(1, 2 ** len(text))
        first, second = (2 - short, short) if text[0] == ">" else (short, 2 - short)
        length, count = self.last
        change = length * (first - 1)
        self.notes[len(self.notes) - count :] = [
            n._replace(length=n.length + change) for n in self.notes[len(self.notes) - count :]
        ]
        self.time += change
        self.last = None
        self.broken = second

    def bar(self, text: str) -> None:
        """End the bar, if one has begun, and check its length."""
        if self.tuplet[1] or self.broken is not None:
            raise self.error("ends a bar within a tuplet or a broken rhythm")
        repeat_ends = text.startswith(":")
        repeat_begins = "::" in text or (text.endswith(":") and not text.startswith("::"))
        ends_part = repeat_ends or repeat_begins or "||" in text or "]" in text or text.startswith("[")
        length = self.time - self.bar_from
        if length:
            self.check(length, ends_part)
            self.bars.append(Bar(length, ends_part))
        elif ends_part and self.bars:
            self.bars[-1] = self.bars[-1]._replace(ends_part=True)
        if repeat_begins:
            if self.open_repeat and not repeat_ends:
                raise self.error("begins a repeat within a repeat")
            self.open_repeat = True
        elif repeat_ends:
            self.open_repeat = False
        self.part_begins = self.part_begins if not length and not ends_part else ends_part
        self.bar_from = self.time
        self.in_bar = {}
        self.last = None

    def check(self, length: Fraction, ends_part: bool) -> None:
        if self.meter is None or length == self.meter:
            return
        if self.part_begins and length < self.meter:
            self.upbeats.append(length)
        elif not (ends_part and any(length + upbeat == self.meter for upbeat in self.upbeats)):
            raise self.error(f"has bar {len(self.bars) + 1} of length {length}, the meter is {self.header.meter_text}")

    def tune(self) -> Tune:
        """Return the tune; its last bar must be ended, its slurs and repeats closed."""
        if self.time != self.bar_from:
            raise self.error("ends within a bar: the last bar has no bar line")
        if not self.notes:
            raise DataError("the tune has no note")
        if self.open_slurs or self.tied:
            raise self.error("ends within a slur or a tie")
        if self.open_repeat:
            raise self.error("ends within a repeat: |: without :|")
        self.bars[-1] = self.bars[-1]._replace(ends_part=True)
        head = self.header
        return Tune(head.title, head.key, head.meter, head.meter_text, tuple(self.notes), tuple(self.bars))

    def error(self, message: str) -> DataError:
        return _error(self.number, message)


def _error(number: int, message: str) -> DataError:
    return DataError(f"line {number} {message}")
