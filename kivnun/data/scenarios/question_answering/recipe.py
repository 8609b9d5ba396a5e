"""Questions over a given passage: facts of CLDR about two countries, and a short answer that stands in the passage.

The countries of held-out passages are in no training passage. What is asked for (a currency, a language, a share, a code, a name)
may be the same on both sides: it is read off the passage, never known. Next: `../chat/recipe.py`.
"""

from __future__ import annotations

from babel.languages import get_territory_language_info
from babel.numbers import get_territory_currencies

from kivnun.data.scenarios.cldr_names import codes, names
from kivnun.data.scenarios.draws import Draws
from kivnun.data.scenarios.scenario import Example, Row, chat
from kivnun.errors import DataError

TEMPLATE = "Passage: {passage}\nQuestion: {question}"
IN_LANGUAGES = {"fr": "French", "de": "German", "es": "Spanish", "it": "Italian"}
FACTS_EACH = 2
Fact = tuple[str, tuple[tuple[str, str], ...]]
"""A sentence, and the questions that it answers with their answers."""


def examples(split: str, count: int, seed: int) -> list[Example]:
    """Return rows of a passage about two countries and one question, no prompt twice."""
    seen: set[str] = set()
    found: list[Example] = []
    number = 0
    while len(found) < count:
        draws = Draws(seed, "scenario.question_answering", split, number)
        number += 1
        places = draws.sample(codes("territory", split, "en"), 2)
        facts = [fact for code in places for fact in _some(draws, _facts(draws, code), FACTS_EACH)]
        question, answer = draws.pick(draws.pick(facts)[1])
        passage = " ".join(sentence for sentence, _ in draws.shuffled(facts))
        if answer not in question and (passage + question) not in seen:
            seen.add(passage + question)
            found.append(Example(row(passage, question, answer), tuple(("territory", code) for code in places)))
    return found


def row(passage: str, question: str, answer: str) -> Row:
    return chat(TEMPLATE.format(passage=passage, question=question), answer)


def convert(record: Row) -> Row:
    """Return the row of a record {"context", "question", "answer"}, or SQuAD's "answers": {"text": [...]}. Raises DataError."""
    context, question, answer, answers = (record.get(key) for key in ("context", "question", "answer", "answers"))
    texts: object = answers.get("text") if isinstance(answers, dict) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    if answer is None and isinstance(texts, list) and texts:
        answer = texts[0]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(context, str) or not isinstance(question, str) or not isinstance(answer, str):
        raise DataError("a record holds the strings 'context', 'question' and 'answer', or answers.text, a list that is not empty")
    return row(context, question, answer)


def _some(draws: Draws, facts: list[Fact], count: int) -> list[Fact]:
    return draws.sample(facts, min(count, len(facts)))


def _facts(draws: Draws, code: str) -> list[Fact]:
    """Return what CLDR knows of a country, each fact in one of its wordings."""
    country = names("territory", "en")[code]
    facts: list[Fact] = [
        (
            draws.pick((f"The code of {country} is {code}.", f"{code} stands for {country}.")),
            ((f"What is the code of {country}?", code), (f"Which country does {code} stand for?", country)),
        )
    ]
    for currency in get_territory_currencies(code)[:1]:
        if currency in names("currency", "en"):
            money = names("currency", "en")[currency]
            sentence = draws.pick((f"People in {country} pay with the {money}.", f"The {money} is the money of {country}."))
            facts.append(
                (sentence, ((f"What do people in {country} pay with?", money), (f"What is the money of {country}?", money)))
            )
    facts += _spoken(draws, code, country)
    for locale in draws.sample(tuple(IN_LANGUAGES), 2):
        if names("territory", locale).get(code, country) != country:
            name, language = names("territory", locale)[code], IN_LANGUAGES[locale]
            sentence = draws.pick((f"In {language}, {country} is called {name}.", f"{name} is the {language} name of {country}."))
            facts.append((sentence, ((f"What is {country} called in {language}?", name),)))
    return facts


def _spoken(draws: Draws, code: str, country: str) -> list[Fact]:
    """Return the two largest languages of a country with the share that speaks each; of those with equal shares one."""
    by_share = {
        float(info["population_percent"]): language
        for language, info in sorted(get_territory_language_info(code).items())
        if language in names("language", "en") and info["population_percent"] is not None
    }
    shares = {language: share for share, language in by_share.items()}
    facts: list[Fact] = []
    for language in sorted(shares, key=lambda name: (-shares[name], name))[:2]:
        name, share = names("language", "en")[language], f"{shares[language]:g} percent"
        sentence = draws.pick((f"{share} of the people of {country} speak {name}.", f"{name} is spoken by {share} of {country}."))
        questions = (
            (f"How many percent of the people of {country} speak {name}?", share),
            (f"Which language do {share} of {country} speak?", name),
        )
        facts.append((sentence, questions))
    return facts
