"""The parser of ABC notation: what the standard allows for one voice is read, what is malformed is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kivnun.data.abc_notation import Tune, key_accidentals, parse
from kivnun.errors import DataError

HEAD = "X:1\nT:A tune\nM:4/4\nL:1/8\nK:C\n"


def tune(body: str, **fields: str) -> Tune:
    head = {"X": "1", "T": "A tune", "M": "4/4", "L": "1/8", "K": "C"} | fields
    return parse("".join(f"{name}:{value}\n" for name, value in head.items() if value) + body)


def pitches(body: str, **fields: str) -> list[int]:
    return [note.pitch for note in tune(body, M="none", **fields).notes]


def lengths(body: str, **fields: str) -> list[Fraction]:
    return [note.length * 8 for note in tune(body, M="none", **fields).notes]


VALID = {
    "plain bars": "C2 D2 E2 F2 | G4 c4 |]",
    "without spaces": "C2D2E2F2|G4c4|]",
    "a repeat": "|: C8 | D8 :|",
    "two repeats": "|: C8 :|: D8 :|",
    "a double repeat sign": "|: C8 :: D8 :|",
    "a repeat from the start": "C8 | D8 :|",
    "endings": "|: C8 |1 D8 :|2 E8 |]",
    "endings in brackets": "|: C8 | [1 D8 :| [2 E8 ||",
    "an upbeat and its complement": "G2 | C8 | D6 |]",
    "an upbeat in a repeat": "|: G2 | C8 | D6 :|: A2 | C8 | D6 :|",
    "accidentals and octaves": "^C,2 __D2 =e'2 _f2 |",
    "fractions": "C3/2D/2 E// E// E/ E F4 |",
    "broken rhythm": "C>D E<F G>>A B2 |",
    "a triplet": "(3CDE F2 G4 |",
    "a tuplet with numbers": "(3:2:3 CDE F2 G4 |",
    "chords": "[CEG]4 [C2E2G2]2 |",
    "rests": "z4 C2 x2 | z8 | Z |",
    "grace notes": "{g}C4 {/fg}D4 |",
    "ties and slurs": "(C4 D4-) | D8 |",
    "decorations": ".C2 ~D2 !trill!E2 vF2 |",
    "chord symbols": '"Am"C4 "^text"D4 |',
    "comments": "% a comment\nC8 | % another\nD8 |]",
    "a continued line": "C8 | D8 | \\\nE8 |]",
    "lyrics": "C4 D4 |\nw: sun shine\nE8 |]",
    "inline fields": "[K:G] F8 | [M:3/4] C6 |]",
    "a field in the body": "C8 |\nK:D\nF8 |]",
    "two lines": "C8 | D8 |\nE8 | F8 |]",
}
INVALID = {
    "a bar too long": ("C9 | D8 |]", "has bar 1 of length 9/8"),
    "a bar too short": ("C8 | D7 | E8 |]", "has bar 2 of length 7/8"),
    "a last bar too short": ("C8 | D7 |]", "has bar 2"),
    "an upbeat without its complement": ("G2 | C8 | D5 |]", "has bar 3"),
    "a short bar after a line break": ("C8 |\nD4 |\nE8 |]", "line 7 has bar 2"),
    "no last bar line": ("C8 | D8", "ends within a bar"),
    "a letter that is no note": ("C4 H4 |", "cannot be read at character 4"),
    "a sign without a note": ("^2 C8 |", "cannot be read at character 1"),
    "an octave before the note": ("'C8 |", "cannot be read"),
    "a length of nothing": ("C0 D8 |", "no fraction"),
    "a division by nothing": ("C1/0 D8 |", "no fraction"),
    "two slashes and a number": ("C//3 D8 |", "no fraction"),
    "a repeat that does not end": ("|: C8 | D8 |]", "within a repeat"),
    "a repeat in a repeat": ("|: C8 |: D8 :|", "begins a repeat within"),
    "a tie into another note": ("C4-D4 |", "not the same"),
    "a tie at the end": ("C8- |]", "within a slur or a tie"),
    "a tie after nothing": ("-C8 |", "follows no note"),
    "an open slur": ("(C8 | D8 |]", "within a slur"),
    "a slur that was not begun": ("C8) |", "was not begun"),
    "an unfinished tuplet": ("C6 (3DE | F8 |]", "within a tuplet"),
    "broken rhythm without a second note": ("C8> | D8 |]", "within a tuplet or a broken"),
    "a chord that is open": ("[CEG C8 |", "cannot be read"),
    "text": ("This is no tune |", "cannot be read"),
    "no note": ("z8 | z8 |]", "has no note"),
    "no body": ("", "has no note"),
    "an empty line": ("C8 |\n\nD8 |]", "an empty line ends a tune"),
    "several voices": ("V:1\nC8 |]", "several voices"),
    "a field that may not be here": ("X:2\nC8 |]", "may not stand in the body"),
    "a rest of bars within a bar": ("C4 Z |", "where no bar begins"),
}
HEADERS = {
    "no number first": ("T:A\nX:1\nK:C\nC|", "must be the field X:"),
    "no title second": ("X:1\nM:4/4\nK:C\nC|", "must be the field T:"),
    "no key": ("X:1\nT:A\nM:4/4\n", "no field K:"),
    "notes before the key": ("X:1\nT:A\nM:4/4\nC8 |]", "is no field"),
    "a number that is none": ("X:one\nT:A\nK:C\nC|", "X: must be a number"),
    "a meter that is none": ("X:1\nT:A\nM:4\nK:C\nC|", "M: must be"),
    "a meter over three": ("X:1\nT:A\nM:4/3\nK:C\nC|", "M: must be"),
    "a unit that is none": ("X:1\nT:A\nL:1/7\nK:C\nC|", "L: must be"),
    "a key that is none": ("X:1\nT:A\nK:H\nC|", "K: names no key"),
    "a mode that is none": ("X:1\nT:A\nK:Cmoll\nC|", "K: names no key"),
    "a key of eight sharps": ("X:1\nT:A\nK:G#\nC|", "at most 7"),
    "an unknown field": ("X:1\nT:A\nY:1\nK:C\nC|", "does not know"),
}


@pytest.mark.parametrize("body", VALID.values(), ids=VALID)
def test_well_formed_tunes_are_read(body: str) -> None:
    assert tune(body).notes


@pytest.mark.parametrize(("body", "why"), INVALID.values(), ids=INVALID)
def test_malformed_tunes_are_refused_with_the_reason(body: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        tune(body)


@pytest.mark.parametrize(("text", "why"), HEADERS.values(), ids=HEADERS)
def test_malformed_headers_are_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        parse(text)


@given(st.text(alphabet="ABCDEFGabcdefgz|:[](){}^_=,'0123456789/ <>-.~\"!\n\\%KMLXTw", max_size=60))
def test_any_body_is_a_tune_or_refused(body: str) -> None:
    try:
        found = tune(body)
    except DataError:
        return
    assert all(note.length > 0 for note in found.notes)
    assert sum(bar.length for bar in found.bars) >= max(note.start + note.length for note in found.notes)


def test_pitches_follow_octave_key_and_accidental() -> None:
    assert pitches("C, C c c' |") == [48, 60, 72, 84]
    assert pitches("F =F ^F _B |", K="G") == [66, 65, 66, 70]
    assert pitches("^F F f | F |") == [66, 66, 77, 65]  # an accidental holds to the end of the bar, in its octave
    assert pitches("[CEG] |") == [60, 64, 67]


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("C", {}),
        ("Am", {}),
        ("Ddor", {}),
        ("D Dorian", {}),
        ("Gmix", {}),
        ("Flyd", {}),
        ("G", {"F": 1}),
        ("Bb", {"B": -1, "E": -1}),
        ("F#m", {"F": 1, "C": 1, "G": 1}),
        ("Ephr", {}),
        ("none", {}),
        ("D phr ^f", {"B": -1, "E": -1, "F": 1}),
        ("G =f", {"F": 0}),
    ],
)
def test_key_signatures(key: str, changed: dict[str, int]) -> None:
    assert key_accidentals(key) == changed


def test_lengths_follow_unit_tuplet_and_broken_rhythm() -> None:
    assert lengths("C C2 C/2 C/ C// C3/2 |") == [1, 2, Fraction(1, 2), Fraction(1, 2), Fraction(1, 4), Fraction(3, 2)]
    assert lengths("C D |", L="1/4") == [2, 2]
    assert lengths("C>D E<F G>>A |") == [Fraction(n, 4) for n in (6, 2, 2, 6, 7, 1)]
    assert lengths("(3CDE (2FG |") == [Fraction(2, 3)] * 3 + [Fraction(3, 2)] * 2
    assert lengths("C-C D |") == [2, 1]
    assert [note.start * 8 for note in tune("C2 z2 D4 |").notes] == [0, 4]


def test_without_a_unit_the_meter_decides() -> None:
    assert tune("C8 |", L="").meter == 1
    assert tune("C8 |", L="", M="2/4").notes[0].length == Fraction(1, 2)  # eight sixteenths


def test_parts_end_at_repeats_and_double_bars() -> None:
    assert tune("|: C8 | D8 :|: E8 | F8 | G8 :|").parts == (2, 3)
    assert tune("C8 | D8 || E8 |]").parts == (2, 1)
    assert tune("C8 | D8 | E8 |").parts == (3,)


def test_the_header_is_kept() -> None:
    found = parse("X:12\nT:The Quiet Mill\nC:Trad.\nM:C|\nQ:1/4=120\nL:1/8\nK:Edor % dorian\nE8 |]")
    assert (found.title, found.key, found.meter_text, found.meter) == ("The Quiet Mill", "Edor", "C|", Fraction(1))
