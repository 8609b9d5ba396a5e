"""The words that skills are practised on: real, invented and random ones, so that copying cannot be replaced by knowing.

Names of people are split by `held_out("person", name)`, territories by their code; every function here gives the training side.
"""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass, field

from babel import Locale

from kivnun.data.scenarios.draws import Draws
from kivnun.data.splits import held_out
from recipes.tiny_phi.stocks import stock

ONSETS = stock("words.onsets")
NUCLEI = ["a", "a", "a", "e", "e", "e", "i", "i", "o", "o", "o", "u", "u", "ai", "ea", "ee", "ia", "io", "oo", "ou"]
CODAS = stock("words.codas")
HEBREW_LETTERS = "אבגדהוזחטיכלמנסעפצקרשתויהלמ"
HEBREW_FINALS = {"כ": "ך", "מ": "ם", "נ": "ן", "פ": "ף", "צ": "ץ"}
FIRST_NAMES = stock("words.first_names")
HEBREW_NAMES = stock("words.hebrew_names")
NOUNS = stock("words.nouns")
ADJECTIVES = stock("words.adjectives")
VERBS = stock("words.verbs")
HEBREW_NOUNS = stock("words.hebrew_nouns")
HEBREW_ADJECTIVES = stock("words.hebrew_adjectives")
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "grey", "orange", "purple", "pink", "silver", "golden"]
PLACE_ENDS = ["a", "ia", "burg", "ford", "ham", "mouth", "stad", "ton", "ville", "wick", "dale", " Bay", " Hills", "port"]
ORG_FORMS = stock("words.org_forms")
WORD = re.compile(r"[A-Za-z]{3,12}")


@dataclass(frozen=True, slots=True)
class Words:
    """Stocks of words and the ways to draw from them. `pieces` are letter tokens of the tokenizer, empty before there is one."""

    english: tuple[str, ...]
    pieces: tuple[str, ...] = ()
    hebrew_pieces: tuple[str, ...] = ()
    territories: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)

    def pseudo(self, draws: Draws) -> str:
        """Return an invented English-looking word."""
        return "".join(
            draws.pick(ONSETS) + draws.pick(NUCLEI) + (draws.pick(CODAS) if last else "")
            for last in ([False, True] if draws.chance(0.7) else [True])
        )

    def hebrew_pseudo(self, draws: Draws) -> str:
        letters = "".join(draws.pick(HEBREW_LETTERS) for _ in range(draws.between(3, 6)))
        return letters[:-1] + HEBREW_FINALS.get(letters[-1], letters[-1])

    def from_pieces(self, draws: Draws) -> str:
        """Return two to four random letter tokens run together: nothing but copying can reproduce it."""
        if not self.pieces:
            return self.pseudo(draws)
        return "".join(draws.pick(self.pieces) for _ in range(draws.between(2, 4)))

    def code(self, draws: Draws) -> str:
        """Return something like QX-4821, 77310 or b4f9."""
        letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
        kind = draws.below(5)
        if kind == 0:
            return "".join(draws.pick(letters) for _ in range(draws.between(2, 3))) + "-" + self.digits(draws, 3, 5)
        if kind == 1:
            return self.digits(draws, 3, 8)
        if kind == 2:
            return "".join(draws.pick("0123456789abcdef") for _ in range(draws.between(4, 8)))
        if kind == 3:
            return draws.pick(letters) + self.digits(draws, 1, 4) + draws.pick(letters)
        return f"{self.digits(draws, 2, 3)}-{self.digits(draws, 3, 4)}"

    def digits(self, draws: Draws, shortest: int, longest: int) -> str:
        return str(draws.between(1, 9)) + "".join(str(draws.below(10)) for _ in range(draws.between(shortest, longest) - 1))

    def word(self, draws: Draws, kind: str) -> str:
        """Return one word of a kind: word, noun, pseudo, pieces, hebrew, hebrew_pseudo, code."""
        if kind == "word":
            return draws.pick(self.english)
        if kind == "noun":
            return draws.pick(NOUNS)
        if kind == "hebrew":
            return draws.pick(HEBREW_NOUNS) if draws.chance(0.5) else draws.pick(self.hebrew_pieces or HEBREW_ADJECTIVES)
        return {"pseudo": self.pseudo, "pieces": self.from_pieces, "hebrew_pseudo": self.hebrew_pseudo, "code": self.code}[kind](
            draws
        )

    def kind(self, draws: Draws) -> str:
        return draws.pick(
            ("word", "word", "noun", "noun", "pseudo", "pseudo", "pseudo", "pieces", "pieces", "hebrew", "hebrew_pseudo", "code")
        )

    def words(self, draws: Draws, count: int, kind: str | None = None) -> list[str]:
        """Return `count` words of one kind, different from each other."""
        chosen = kind or self.kind(draws)
        result: dict[str, None] = {}
        for _ in range(20 * count):
            if len(result) == count:
                break
            result[self.word(draws, chosen)] = None
        return list(result)

    def person(self, draws: Draws) -> str:
        """Return a name of the training side: one or two words, the second always invented."""
        while True:
            first = draws.pick(FIRST_NAMES) if draws.chance(0.6) else self.pseudo(draws).capitalize()
            name = first if draws.chance(0.3) else f"{first} {self.pseudo(draws).capitalize()}"
            if not held_out("person", name):
                return name

    def place(self, draws: Draws) -> str:
        """Return an invented town, or a territory of the training side."""
        if draws.chance(0.25):
            return draws.pick(self.territories["en"])[1]
        return (self.pseudo(draws) + draws.pick(PLACE_ENDS)).capitalize()

    def organisation(self, draws: Draws) -> str:
        return draws.pick(ORG_FORMS).format(self.pseudo(draws).capitalize())


def territories(locale: str, split: str = "train") -> tuple[tuple[str, str], ...]:
    """Return (code, name) of countries in that language, the training side or, with split "all", every one."""
    names: dict[str, str] = dict(Locale.parse(locale).territories)
    codes = sorted(code for code in names if len(code) == 2 and code not in ("EU", "EZ", "UN", "ZZ", "QO", "XA", "XB"))
    return tuple((code, names[code]) for code in codes if split == "all" or not held_out("territory", code))


def load_words(documents: list[str], pieces: list[str] | None = None) -> Words:
    """Return the stocks: the commonest lower-case words of the documents, countries, and the tokenizer's letter tokens."""
    counts: dict[str, int] = {}
    for document in documents:
        for word in WORD.findall(document):
            if word.islower() and not keyword.iskeyword(word):
                counts[word] = counts.get(word, 0) + 1
    english = sorted(sorted(counts), key=lambda word: -counts[word])[:5000]
    latin = [piece for piece in pieces or () if piece.isascii() and piece.isalpha()]
    hebrew = [piece for piece in pieces or () if piece.isalpha() and all("א" <= letter <= "ת" for letter in piece)]
    stock = {locale: territories(locale) for locale in ("en", "he")}
    return Words(tuple(english), tuple(latin), tuple(hebrew), stock)
