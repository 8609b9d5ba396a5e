"""The document's table of nine rows by six techniques, what its authors later changed, and the rule that judges a cell.

Sources: microsoft/Phi-3CookBook, md/03.FineTuning/FineTuning_Scenarios.md (the document), and the same page of
microsoft/PhiCookBook as it was corrected. Next: `cells.py`, which fills the cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kivnun.evaluate.intervals import Interval

Verdict = Literal["supported", "contradicted", "no_detectable_effect", "not_applicable"]

TECHNIQUES = ("LoRA", "QLoRA", "PEFT", "DeepSpeed", "ZeRO", "DoRA")
ROWS = {
    1: "Adapting a model to a domain",
    2: "Classification, entity recognition, translation",
    3: "Question answering",
    4: "Chat responses",
    5: "Creative work",
    6: "Lower cost",
    7: "Less memory",
    8: "Fewer trained parameters",
    9: "Data parallelism over the memory of many devices",
}
YES_TO_ALL = "Y" * len(TECHNIQUES)
DOCUMENT = {**dict.fromkeys((1, 2, 3, 4, 5), YES_TO_ALL), 6: "YYNYYN", 7: "NYNYYY", 8: "NYYNNY", 9: "NNNYYY"}
UPSTREAM = {**DOCUMENT, 6: "YYYYYY", 7: "YYYYYY", 8: "YYYNNY", 9: "NNNYYN"}

RULE = (
    "A cell's effect is positive where the technique helps as the row says: a better score than the base, less cost, fewer "
    "bytes or fewer parameters than full tuning, bytes per process that fall with their number. It helps where the 95 % "
    "interval of the effect is above zero, and does not where the interval is nowhere above zero; then a Yes or a No of the "
    "document is supported or contradicted. With zero inside the interval there is no detectable effect. A cell is not "
    "applicable where the technique is no answer to the row's question: sharding (DeepSpeed, ZeRO) decides where numbers "
    "lie, not what is learned, so its cells in rows 1 to 5 show that the sharded run equals the unsharded one. A row of "
    "several tasks is judged by the task with the least favourable interval; PEFT by its best method, with the worst beside "
    "it."
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: what the document says, what its authors say now, what was measured, and what follows.

    `measured` and `baseline` are figures with their units in their names; `interval` is the 95 % interval of the effect, positive
    where the technique helps (None where there is none to give); `runs` names what it rests on.
    """

    row: int
    technique: str
    measured: dict[str, Any]
    baseline: dict[str, Any]
    interval: Interval | None
    verdict: Verdict
    runs: tuple[str, ...]

    @property
    def document(self) -> str:
        return said(DOCUMENT, self.row, self.technique)

    @property
    def upstream(self) -> str:
        return said(UPSTREAM, self.row, self.technique)

    def as_json(self) -> dict[str, Any]:
        """Return the cell as `matrix.json` holds it."""
        order = ("row", "technique", "document", "upstream", "measured", "baseline", "interval", "verdict", "runs")
        values = {**asdict(self), "document": self.document, "upstream": self.upstream}
        values["interval"] = None if self.interval is None else list(self.interval)
        return {name: values[name] for name in order}


def said(table: dict[int, str], row: int, technique: str) -> str:
    """Return "Yes" or "No"."""
    return "Yes" if table[row][TECHNIQUES.index(technique)] == "Y" else "No"


def judged(row: int, technique: str, effect: Interval | None) -> Verdict:
    """Return what RULE says of an effect's interval against the document's cell; no interval: not applicable."""
    if effect is None:
        return "not_applicable"
    helps = effect.low > 0.0
    if not helps and effect.high > 0.0:
        return "no_detectable_effect"
    return "supported" if helps == (said(DOCUMENT, row, technique) == "Yes") else "contradicted"


def least_favourable(effects: Sequence[Interval]) -> Interval:
    """Return the interval that says least for a technique: the lowest lower end, the higher end beside it."""
    return min(effects, key=lambda effect: (effect.low, effect.high))
