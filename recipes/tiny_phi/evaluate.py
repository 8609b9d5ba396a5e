"""What the base can do: copying, quoting, looking up, naming entities and recalling names, and the loss of each source.

The rows come from the same makers as the corpus but from a stream of their own, so their random words, names and facts are new;
"new wording" and the demo's own test rows use phrases that the corpus does not hold. Greedy decoding, first reply only.

    python -m recipes.tiny_phi.evaluate FOLDER [OUT.json] [--rows 100]
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kivnun.data.packing import pack
from kivnun.data.rows import TokenRow, Where
from kivnun.data.scenarios.cldr import TOPICS, draw_value, iso, render
from kivnun.data.scenarios.cldr import rows as demo_rows
from kivnun.data.scenarios.draws import Draws
from kivnun.data.template import ChatTokenizer, load_tokenizer
from kivnun.model.generate import SamplingParams
from kivnun.model.load import load_base
from kivnun.train.engine import FixedModel, TorchEngine
from recipes.tiny_phi import cldr_text, copying, docs, entities, lookup, melodies
from recipes.tiny_phi.chat import Task, chat
from recipes.tiny_phi.corpus import TOKENS, VALIDATION_ROWS
from recipes.tiny_phi.tokenizer import letter_pieces
from recipes.tiny_phi.words import Words, load_words

SEED = 7
ASSISTANT, END = "<|assistant|>", "<|end|>"
NEW_WORDINGS = ("Please write the next words without any change: {}", "What I want back from you is only this: {}", "Give back: {}")
MAX_NEW_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, written out with its markers up to where the reply begins, and the reply that is wanted."""

    prompt: str
    reply: str


Score = Callable[[str, str], float]


@dataclass(frozen=True, slots=True)
class Skill:
    """One line of the table: how its questions are made (None: draw again) and how a reply is scored, 0 to 1."""

    name: str
    make: Callable[[Draws], Question | None]
    score: Score


def skills(words: Words) -> list[Skill]:
    """Return all skills but the demo's, which has rows of its own."""
    made: list[Skill] = []
    for kind in ("word", "pseudo", "pieces", "hebrew_pseudo", "code"):
        for low, high in ((1, 3), (4, 8)):
            made.append(Skill(f"repeat {low}-{high} {kind}", _repeat(words, kind, low, high, copying.REPEAT), exact))
    made += [
        Skill("repeat 1-3 pseudo, new wording", _repeat(words, "pseudo", 1, 3, NEW_WORDINGS), exact),
        Skill("repeat 1-3 pseudo, few-shot", lambda draws: _few_shot(draws, words), exact),
        Skill("few-shot pattern, rules mixed", lambda draws: last_turn(copying.pattern(draws, words)), exact),
        Skill("word after", lambda draws: first_turn(chat(draws, [copying.after(draws, words)])), exact),
        Skill("look up in a table", lambda draws: first_turn(lookup.table(draws, words)), exact),
        Skill("field of a record", lambda draws: first_turn(lookup.record(draws, words)), exact),
        Skill("answer from a passage", lambda draws: _passage(draws, words, quoted=False), exact),
        Skill("quote from a passage", lambda draws: _passage(draws, words, quoted=True), exact),
        Skill("translate with a glossary", lambda draws: first_turn(lookup.glossary(draws, words)), exact),
        Skill("entities, F1", lambda draws: _entities(draws, words), entity_f1),
        Skill("recall of names (CLDR)", lambda draws: first_turn(cldr_text.name_chat(draws)), exact),
        Skill("new value from ISO to Hebrew", _iso_value, exact),
        Skill("tune: bars that add up", lambda draws: _tune(draws, words), valid_bars),
    ]
    return made


def exact(reply: str, wanted: str) -> float:
    return float(reply.strip() == wanted.strip())


def entity_f1(reply: str, wanted: str) -> float:
    """Return the F1 of the lines; a row without entities counts 1 when that is said."""
    found, right = set(reply.strip().split("\n")), set(wanted.split("\n"))
    return 2 * len(found & right) / (len(found) + len(right))


def valid_bars(reply: str, wanted: str) -> float:
    """Return the share of the reply's bars that last as long as its meter says."""
    meter = re.search(r"^M:(\S+)$", reply, re.MULTILINE)
    body = [line for line in reply.split("\n") if line and not re.match(r"[A-Z]:", line)]
    if meter is None or meter[1] not in melodies.METERS or not body:
        return 0.0
    bars = [bar for line in body for bar in line.replace("|]", "|").split("|") if bar.strip()]
    lengths = [sum(int(n or 1) for n in re.findall(r"[A-Ga-g][,']*(\d*)", bar)) for bar in bars]
    return sum(length == melodies.METERS[meter[1]] for length in lengths) / max(1, len(bars))


def first_turn(text: str) -> Question:
    """Return the first reply of a document and all that stands before it."""
    prompt, rest = text.split(ASSISTANT, 1)
    return Question(prompt + ASSISTANT, rest.split(END, 1)[0])


def last_turn(text: str) -> Question | None:
    """Return the last reply of a chat, the turns before as examples; None for a document without turns."""
    if ASSISTANT not in text:
        return None
    prompt, rest = text.rsplit(ASSISTANT, 1)
    return Question(prompt + ASSISTANT, rest.split(END, 1)[0])


def questions(skill: Skill, count: int) -> list[Question]:
    """Return `count` questions of a skill, from the stream that only evaluation draws from."""
    found: list[Question] = []
    number = 0
    while len(found) < count:
        question = skill.make(Draws(SEED, f"evaluation.{skill.name}", number))
        number += 1
        if question is not None:
            found.append(question)
    return found


def answer(model: FixedModel, tokenizer: ChatTokenizer, asked: Sequence[Question], max_new_tokens: int) -> list[str]:
    params = SamplingParams(max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids)
    replies = model.sample([tokenizer.encode(question.prompt) for question in asked], params)
    return [tokenizer.decode(ids, skip_special=True) for ids in replies]


def evaluate(folder: Path, count: int, validation: Path | None) -> dict[str, Any]:
    """Return {skills: {name: {score, rows, example}}, demo: {...}, losses: {source: nats per token}} of the base in `folder`."""
    tokenizer = load_tokenizer(folder)
    model = TorchEngine(load_base(folder, "fp32")).base_model()
    words = load_words([text for _, text in docs.entries()], letter_pieces_of(folder))
    result: dict[str, Any] = {"skills": {}}
    for skill in skills(words):
        asked = questions(skill, count if "tune" not in skill.name else max(1, count // 5))
        replies = answer(model, tokenizer, asked, MAX_NEW_TOKENS if "tune" not in skill.name else 2 * MAX_NEW_TOKENS)
        result["skills"][skill.name] = _line(skill.score, asked, replies)
    result["demo"] = _line(exact, *_demo(model, tokenizer, count))
    if validation is not None:
        result["losses"] = source_losses(model, tokenizer, validation)
    return result


def letter_pieces_of(folder: Path) -> list[str]:
    from tokenizers import Tokenizer

    return letter_pieces(Tokenizer.from_file(str(folder / "tokenizer.json")))


def source_losses(model: FixedModel, tokenizer: ChatTokenizer, validation: Path) -> dict[str, float]:
    """Return the mean loss (nats per token) of each source's held-out rows, which the file holds in the order of TOKENS."""
    texts = [json.loads(line)["text"] for line in validation.read_text(encoding="utf-8").splitlines()]
    names = [name for name in TOKENS for _ in range(VALIDATION_ROWS)]
    names += ["docs"] * (len(texts) - len(names))
    sums: dict[str, list[float]] = {}
    for number, (name, text) in enumerate(zip(names, texts, strict=True)):
        ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=np.int32)
        weights = np.ones(len(ids), dtype=np.float32)
        weights[0] = 0.0
        log_probs = model.forward(pack([TokenRow(ids, weights, number, Where(str(validation), number + 1), len(ids))]))
        total = sums.setdefault(name, [0.0, 0.0])
        total[0] -= float(log_probs.sum(dtype=np.float64))
        total[1] += len(log_probs)
    return {name: round(total / tokens, 4) for name, (total, tokens) in sums.items()}


def main(arguments: Sequence[str]) -> None:
    """Print the table and write evaluation.json."""
    rows = int(arguments[arguments.index("--rows") + 1]) if "--rows" in arguments else 100
    paths = [Path(a) for n, a in enumerate(arguments) if not a.startswith("--") and (n == 0 or arguments[n - 1] != "--rows")]
    folder, out = paths[0], paths[1] if len(paths) > 1 else Path("evaluation.json")
    validation = Path("build/tiny_phi/corpus/validation.jsonl")
    started = time.monotonic()
    result = evaluate(folder, rows, validation if validation.is_file() else None)
    out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for line in table(result):
        print(line)
    print(f"{time.monotonic() - started:.0f} s; written to {out}", file=sys.stderr)


def table(result: dict[str, Any]) -> Iterator[str]:
    """Give the lines of a Markdown table of an evaluation."""
    yield "| skill, 0-shot unless named | score | rows |"
    yield "|---|---|---|"
    for name, line in {**result["skills"], "the demo's test rows (English to Hebrew)": result["demo"]}.items():
        yield f"| {name} | {100 * line['score']:.1f} % | {line['rows']} |"
    if "losses" in result:
        yield ""
        yield "| source | held-out loss, nats per token |"
        yield "|---|---|"
        for name, loss in result["losses"].items():
            yield f"| {name} | {loss:.3f} |"


def _line(score: Score, asked: Sequence[Question], replies: Sequence[str]) -> dict[str, Any]:
    scores = [score(reply, question.reply) for reply, question in zip(replies, asked, strict=True)]
    worst = scores.index(min(scores))
    example = {"prompt": asked[worst].prompt, "wanted": asked[worst].reply, "got": replies[worst]}
    return {"score": round(sum(scores) / len(scores), 4), "rows": len(scores), "worst": example}


def _demo(model: FixedModel, tokenizer: ChatTokenizer, count: int) -> tuple[list[Question], list[str]]:
    messages = [row["messages"] for row in demo_rows("test", count, SEED)]
    asked = [Question(f"<|user|>{user['content']}{END}{ASSISTANT}", reply["content"]) for user, reply in messages]
    return asked, answer(model, tokenizer, asked, 48)


def _repeat(words: Words, kind: str, low: int, high: int, wordings: Sequence[str]) -> Callable[[Draws], Question]:
    def make(draws: Draws) -> Question:
        text = " ".join(words.words(draws, draws.between(low, high), kind))
        return first_turn(chat(draws, [Task(draws.pick(wordings).format(text), text)]))

    return make


def _few_shot(draws: Draws, words: Words) -> Question | None:
    texts = [" ".join(words.words(draws, draws.between(1, 3), "pseudo")) for _ in range(4)]
    return last_turn(chat(draws, [Task(text, text) for text in texts]))


def _passage(draws: Draws, words: Words, quoted: bool) -> Question | None:
    question = first_turn(lookup.passage(draws, words))
    if question.reply in ("The text does not say.", "Not in the text."):
        return None
    return question if question.reply.endswith(".") == quoted else None


def _entities(draws: Draws, words: Words) -> Question:
    ask = f"{draws.pick(entities.ASKS)} One per line: person, place, org."
    return first_turn(chat(draws, [entities.task(draws, words, 0, entities.LABELS[0], ask)]))


def _iso_value(draws: Draws) -> Question | None:
    value = draw_value(draws.pick(TOPICS), "test", draws.unit)
    said = render(value, "he")
    if said is None:
        return None
    return first_turn(chat(draws, [Task(draws.pick(cldr_text.ASK_ISO).format(iso(value), "Hebrew"), said)]))


def _tune(draws: Draws, words: Words) -> Question | None:
    text = melodies.document(draws, words)
    return first_turn(text) if ASSISTANT in text else None


if __name__ == "__main__":
    main(sys.argv[1:])
