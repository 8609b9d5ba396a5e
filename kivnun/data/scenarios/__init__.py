"""Scenarios: tasks with their data, drawn from what every machine has, one folder each. Start with `scenario.py`.

for scenario in SCENARIOS:
    scenario.write(folder / scenario.name)      # train.jsonl, validation.jsonl, spec.yaml, overlap.json
"""

from __future__ import annotations

from kivnun.data.scenarios.scenario import Example, Row, Scenario
from kivnun.errors import SpecError

SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "domain", 1, "Adapt to a domain: NumPy's documentation", "perplexity", False, ("perplexity",), 240, 100, replies=False
    ),
    Scenario("classification", 2, "Which language is a line in?", "macro_f1", True, ("macro_f1",), 1800, 240),
    Scenario("entities", 2, "Named entities as character spans", "entity_f1", True, ("entity_f1", "exact_match"), 700, 100),
    Scenario("translation", 2, "English values into Hebrew", "exact_match", True, ("exact_match", "chrf"), 600, 150),
    Scenario("question_answering", 3, "Questions on a passage of facts", "qa_f1", True, ("qa_f1", "exact_match"), 900, 100),
    Scenario(
        "chat",
        4,
        "A persona with a fixed format",
        "format_compliance",
        True,
        ("format_compliance", "ended_turn", "exact_match"),
        240,
        80,
    ),
    Scenario("melodies", 5, "Tunes in ABC notation", "tune_validity", True, ("tune_validity", "ended_turn"), 300, 48),
)
"""Every built-in scenario, in the order of the technique table's rows."""


def find_scenario(name: str) -> Scenario:
    """Return the scenario of that name. Raises SpecError."""
    for scenario in SCENARIOS:
        if scenario.name == name:
            return scenario
    raise SpecError(
        f"there is no scenario {name!r}; there are {', '.join(scenario.name for scenario in SCENARIOS)}",
        hint="kivnun scenario list says what each is",
    )


__all__ = ["SCENARIOS", "Example", "Row", "Scenario", "find_scenario"]
