"""Names of people and invented towns for the scenarios, on the side of the split that is asked for."""

from __future__ import annotations

from kivnun.data.scenarios.draws import Draws
from kivnun.data.splits import wanted

FIRST_NAMES = (
    *("Ada", "Amos", "Anna", "Bela", "Carl", "Clara", "Dana", "David", "Edna", "Elias", "Emma", "Felix", "Gila", "Hanna", "Ida"),
    *("Jonas", "Julia", "Karin", "Leon", "Lina", "Maria", "Maro", "Nadav", "Nora", "Oskar", "Paula", "Rosa", "Ruben", "Sara"),
    *("Simon", "Tamar", "Tomas", "Uri", "Vera", "Viktor", "Yael", "Yosef", "Zoe"),
)
ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "h", "k", "kl", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w", "z")
NUCLEI = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
CODAS = ("", "l", "m", "n", "nd", "r", "rn", "s", "sk", "t", "th")
TOWN_ENDS = ("burg", "dale", "ford", "ham", "mouth", "port", "stad", "ton", "ville", "wick")


def invented(draws: Draws) -> str:
    """Return an invented word of one or two syllables."""
    return "".join(
        draws.pick(ONSETS) + draws.pick(NUCLEI) + (draws.pick(CODAS) if last else "")
        for last in ([False, True] if draws.chance(0.7) else [True])
    )


def person(draws: Draws, split: str) -> str:
    """Return a first name with an invented surname, of the wanted side."""
    while True:
        name = f"{draws.pick(FIRST_NAMES)} {invented(draws).capitalize()}"
        if wanted("person", name, split):
            return name


def town(draws: Draws) -> str:
    return (invented(draws) + draws.pick(TOWN_ENDS)).capitalize()
