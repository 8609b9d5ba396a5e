"""Continuous batching: what a row says is, to the bit, what it says alone, whoever joins and leaves beside it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from answer_parts import until
from kivnun.artifacts import hash_folder
from kivnun.errors import IntegrityError
from kivnun.model.adapter_folder import load_peft
from kivnun.model.adapters import Adapter, AdapterShape, new_adapter, resolve_targets
from kivnun.model.generate import SamplingParams, generate
from kivnun.model.load import Base, load_base
from kivnun.serve.adapter_files import load_adapter
from kivnun.serve.adapters import AdapterCache, AdapterFolders
from kivnun.serve.base_tokens import BaseTokens
from kivnun.serve.constraints import schema_grammar
from kivnun.serve.listening import Told
from kivnun.serve.loading import THREADS
from kivnun.serve.protocol import AdapterName, Ask, Begun, Done, Failed, Piece, TokenLogprobs
from kivnun.serve.scheduler import Capacity, Scheduler

NAMES = ("none", "low", "high")


@dataclass
class Bench:
    """A base, two adapters on it, and a scheduler over them."""

    base: Base
    folders: dict[str, Path]
    hashes: dict[str, str]
    scheduler: Scheduler
    cache: AdapterCache[Adapter]


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    loaded = load_base(base, "fp32")
    folders: dict[str, Path] = {}
    for name, rank in (("low", 4), ("high", 12)):
        adapter = new_adapter(
            loaded, AdapterShape("lora", rank, 16.0, 0.0, False, resolve_targets(loaded, "all-linear")), "kaiming", rank
        )
        tiny.stir(adapter)
        folders[name] = tmp_path_factory.mktemp(name)
        adapter.save(folders[name], "tiny")
    hashes = {name: hash_folder(folder) for name, folder in folders.items()}
    by_hash = {hashes[name]: folder for name, folder in folders.items()}
    cache: AdapterCache[Adapter] = AdapterCache(
        lambda _tenant, name: nullcontext(by_hash[name.content_hash]), lambda folder: load_adapter(loaded, folder)
    )
    scheduler = Scheduler("tiny", "1", loaded, BaseTokens(base), cache, Capacity(rows=7, prefill_tokens=24))
    yield Bench(loaded, folders, hashes, scheduler, cache)
    scheduler.close()


def question(
    bench: Bench, prompts: list[list[int]], adapter: str = "none", limit: int = 8, n: int = 1, *, tenant: str = "a",
    temperature: float = 0.0, seed: int = 0, logprobs: int | None = 3, grammar: str | None = None, prompt_logprobs: bool = False,
    stop_ids: tuple[int, ...] = (), bias: tuple[tuple[int, float], ...] = (), presence: float = 0.0, frequency: float = 0.0,
) -> Ask:  # fmt: skip
    named = None if adapter == "none" else AdapterName(manifest="a/b", content_hash=bench.hashes[adapter])
    return Ask(
        id=1, tenant=tenant, adapter=named, prompts=prompts, limits=[limit] * len(prompts), n=n, stop_ids=list(stop_ids),
        stop=[], temperature=temperature, top_p=0.95, seed=seed, logprobs=logprobs, grammar=grammar,
        prompt_logprobs=prompt_logprobs,
        logit_bias=list(bias), presence_penalty=presence, frequency_penalty=frequency,
    )  # fmt: skip


@dataclass
class Heard:
    """All that is said to a question. `on_piece` is called in the model's thread with the number of pieces so far."""

    on_piece: Callable[[int], None] = lambda _count: None
    said: list[Told] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    pieces: int = 0

    def __call__(self, what: Told) -> None:
        self.said.append(what)
        if isinstance(what, Piece):
            self.pieces += 1
            self.on_piece(self.pieces)
        if isinstance(what, Done | Failed):
            self.ended.set()

    def tokens(self) -> dict[int, list[TokenLogprobs]]:
        found: dict[int, list[TokenLogprobs]] = {}
        for piece in self.said:
            if isinstance(piece, Piece):
                found.setdefault(piece.choice, []).extend(piece.tokens)
        return found


def answered(bench: Bench, asked: Ask) -> Heard:
    heard = Heard()
    bench.scheduler.ask(asked, heard)
    assert heard.ended.wait(30)
    return heard


PROMPTS = st.lists(st.integers(3, 40), min_size=1, max_size=30)
ASKED = st.tuples(
    PROMPTS, st.sampled_from(NAMES), st.integers(1, 10), st.integers(1, 3), st.sampled_from([0.0, 0.9]), st.integers(0, 5)
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(subject=ASKED, company=st.lists(st.tuples(ASKED, st.integers(0, 8), st.sampled_from("ab")), max_size=6))
def test_an_answer_is_the_same_alone_and_among_others_that_come_and_go(bench: Bench, subject: tuple, company: list) -> None:
    def make(asked: tuple, tenant: str) -> Ask:
        prompt, adapter, limit, n, temperature, seed = asked
        return question(bench, [prompt], adapter, limit, n, tenant=tenant, temperature=temperature, seed=seed)

    alone = answered(bench, make(subject, "a"))
    others: list[Heard] = []

    def join(count: int) -> None:
        for asked, after, tenant in company:
            if after == count:
                others.append(Heard())
                bench.scheduler.ask(make(asked, tenant), others[-1])

    among = Heard(on_piece=join)
    join(0)
    bench.scheduler.ask(make(subject, "a"), among)
    assert among.ended.wait(30)
    assert all(heard.ended.wait(30) for heard in others)
    assert among.tokens() == alone.tokens()
    assert isinstance(alone.said[-1], Done)
    assert among.said[-1] == alone.said[-1]


def test_an_answer_is_that_of_generate(bench: Bench) -> None:
    prompts = [[5, 6, 7], [8], list(range(3, 30))]
    heard = answered(bench, question(bench, prompts, "low", 6, temperature=0.7, seed=4))
    adapter = load_peft(bench.base, bench.folders["low"])
    with bench.base.using(adapter.sites):
        expected = generate(bench.base, prompts, SamplingParams(6, (), 0.7, 0.95, 4), streams=[0, 0, 0])
    assert [[token for token, _, _ in heard.tokens()[place]] for place in range(3)] == expected


def test_log_probabilities_are_the_models_own(bench: Bench) -> None:
    prompt = [5, 6, 7, 9]
    heard = answered(bench, question(bench, [prompt], "high", 5, logprobs=4, prompt_logprobs=True))
    begun = heard.said[0]
    assert isinstance(begun, Begun)
    assert begun.prompt_logprobs is not None
    written = heard.tokens()[0]
    ids = prompt + [token for token, _, _ in written]
    with bench.base.using(load_peft(bench.base, bench.folders["high"]).sites):
        logits_TV = tiny.packed_logits(bench.base, [ids])[0]
    expected_TV = torch.log_softmax(logits_TV.float(), dim=1)
    told = begun.prompt_logprobs[0] + written
    assert told[0] == (5, None, [])
    for at, (token, logprob, top) in enumerate(told[1:]):
        assert token == ids[at + 1]
        assert logprob == pytest.approx(float(expected_TV[at, token]), abs=1e-4)
        best = torch.topk(expected_TV[at], 4)
        assert [one for one, _ in top] == best.indices.tolist()
        assert [value for _, value in top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_biases_and_penalties_change_what_is_chosen(bench: Bench) -> None:
    plain = [token for token, _, _ in answered(bench, question(bench, [[5]], limit=12)).tokens()[0]]
    assert answered(bench, question(bench, [[5]], limit=3, bias=((17, 100.0),))).tokens()[0][0][0] == 17
    never = [token for token, _, _ in answered(bench, question(bench, [[5]], limit=12, bias=((plain[0], -100.0),))).tokens()[0]]
    assert plain[0] not in never
    fresh = [
        token for token, _, _ in answered(bench, question(bench, [[5]], limit=12, frequency=2.0, bias=((17, 9.0),))).tokens()[0]
    ]
    often = [token for token, _, _ in answered(bench, question(bench, [[5]], limit=12, bias=((17, 9.0),))).tokens()[0]]
    assert fresh.count(17) < often.count(17)


def test_a_form_is_kept_whatever_is_drawn(bench: Bench) -> None:
    grammar = schema_grammar(
        {"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"], "additionalProperties": False}, "s"
    )
    heard = answered(
        bench, question(bench, [[5]], limit=60, n=4, temperature=1.5, grammar=grammar, stop_ids=bench.scheduler._tokens.stop_ids)
    )
    texts = {piece.choice: "" for piece in heard.said if isinstance(piece, Piece)}
    for piece in heard.said:
        if isinstance(piece, Piece):
            texts[piece.choice] += piece.text
    assert {text.replace(" ", "").replace("\n", "") for text in texts.values()} <= {'{"a":1}', '{"a":22}'}
    assert isinstance(heard.said[-1], Done)
    assert heard.said[-1].reasons == ["stop"] * 4


def test_a_form_without_an_answer_is_told(bench: Bench) -> None:
    heard = answered(bench, question(bench, [[5]], grammar=schema_grammar({"$ref": "#"}, "s")))
    assert isinstance(heard.said[-1], Failed)
    assert heard.said[-1].code == "invalid"
    until(lambda: bench.scheduler.questions == 0)


def test_a_cancelled_answer_leaves_its_row_at_once(bench: Bench) -> None:
    heard = Heard()
    cancel = bench.scheduler.ask(question(bench, [[5]], "low", 100_000, n=3), heard)
    until(lambda: heard.pieces > 3)
    cancel()
    until(lambda: bench.scheduler.rows == 0 and bench.scheduler.questions == 0)
    count = len(heard.said)
    assert not heard.ended.wait(0.1)
    assert len(heard.said) == count
    assert isinstance(answered(bench, question(bench, [[5]])).said[-1], Done)


def test_a_tenant_with_many_questions_does_not_keep_another_waiting(bench: Bench) -> None:
    greedy = [Heard() for _ in range(30)]
    for heard in greedy:
        bench.scheduler.ask(question(bench, [[5, 6]], limit=20, tenant="greedy"), heard)
    late = Heard()
    bench.scheduler.ask(question(bench, [[7]], limit=20, tenant="late"), late)
    assert late.ended.wait(30)
    assert sum(heard.ended.is_set() for heard in greedy) < 20
    assert all(heard.ended.wait(30) for heard in greedy)


def test_too_many_questions_are_told_to_come_back(base: Path, bench: Bench) -> None:
    small = Scheduler("tiny", "1", bench.base, BaseTokens(base), bench.cache, Capacity(waiting=3, waiting_of_tenant=2))
    try:
        heard = [Heard() for _ in range(5)]
        for one, tenant in zip(heard, "aaabb", strict=True):
            small.ask(question(bench, [[5]], limit=5_000, tenant=tenant), one)
        assert [bool(one.said) and isinstance(one.said[0], Failed) for one in heard] == [False, False, True, False, True]
    finally:
        small.close()
    assert all(isinstance(one.said[-1], Failed) for one in heard)


def test_a_pass_that_fails_ends_its_own_answers_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Heard()
    bench.scheduler.ask(question(bench, [[5]], limit=400), other)
    until(lambda: other.pieces > 2)

    def broken(base: Base, ids: list[int], count: int) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("kivnun.serve.scheduler.prompt_log_probs", broken)
        heard = answered(bench, question(bench, [[5]], "low", prompt_logprobs=True))
    assert isinstance(heard.said[-1], Failed)
    assert (heard.said[-1].code, "memory" in heard.said[-1].message) == ("broken", False)
    assert other.ended.wait(30)
    assert isinstance(other.said[-1], Done)


def test_an_adapter_in_memory_waits_for_nobodys_disk(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    answered(bench, question(bench, [[5]], "low", 1))
    opened, fetch = threading.Event(), bench.cache._fetch

    def slow(tenant: str, name: AdapterName) -> AbstractContextManager[Path]:
        assert opened.wait(30)
        return fetch(tenant, name)

    monkeypatch.setattr(bench.cache, "_fetch", slow)
    bench.cache._held.pop(bench.hashes["high"], None)
    cold = Heard()
    bench.scheduler.ask(question(bench, [[5]], "high", 1), cold)
    assert isinstance(answered(bench, question(bench, [[5]], "low", 1)).said[-1], Done)
    assert not cold.said
    opened.set()
    assert cold.ended.wait(30)
    assert isinstance(cold.said[-1], Done)


def test_a_slow_store_of_one_tenant_delays_no_other_tenants_first_token(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, fetch = threading.Event(), bench.cache._fetch

    def slow(tenant: str, name: AdapterName) -> AbstractContextManager[Path]:
        assert tenant == "b" or opened.wait(30)
        return fetch(tenant, name)

    monkeypatch.setattr(bench.cache, "_fetch", slow)
    monkeypatch.setattr(bench.cache, "_held", type(bench.cache._held)())
    waiting = [Heard() for _ in range(2 * THREADS)]
    for heard in waiting:  # more than there are threads
        bench.scheduler.ask(question(bench, [[5]], "high", 1, tenant="a"), heard)
    grammar = schema_grammar({"enum": [1]}, "s")
    assert isinstance(answered(bench, question(bench, [[5]], "low", 1, tenant="b")).said[-1], Done)
    assert isinstance(answered(bench, question(bench, [[5]], limit=9, tenant="b", grammar=grammar)).said[-1], Done)
    assert not any(heard.said for heard in waiting)
    opened.set()
    assert all(heard.ended.wait(30) and isinstance(heard.said[-1], Done) for heard in waiting)


def test_twenty_questions_for_one_cold_adapter_load_it_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Path] = []
    load = bench.cache._load
    monkeypatch.setattr(bench.cache, "_load", lambda folder: (loads.append(folder), load(folder))[1])
    monkeypatch.setattr(bench.cache, "_held", type(bench.cache._held)())
    asked = [Heard() for _ in range(20)]
    for number, heard in enumerate(asked):
        bench.scheduler.ask(question(bench, [[5, 6]], "low", 4, tenant="abcde"[number % 5]), heard)
    assert all(heard.ended.wait(30) for heard in asked)
    assert loads == [bench.folders["low"]]
    assert all(heard.tokens() == asked[0].tokens() for heard in asked)
    until(lambda: bench.scheduler.questions == 0)
    assert bench.cache._held[bench.hashes["low"]].users == 0


def test_a_tenants_questions_begin_in_the_order_in_which_they_were_put(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.cache, "_held", type(bench.cache._held)())
    begun: list[tuple[str, int]] = []
    asked: list[Heard] = []
    for number in range(12):
        tenant, heard = "ab"[number % 2], Heard()

        class Noted(list[Told]):
            def append(self, what: Told, told: tuple[str, int] = (tenant, number)) -> None:
                if isinstance(what, Begun):
                    begun.append(told)
                super().append(what)

        heard.said = Noted()
        asked.append(heard)
        grammar = schema_grammar({"enum": [number]}, "s")
        bench.scheduler.ask(question(bench, [[5]], ("low", "high")[number % 3 == 0], 2, tenant=tenant, grammar=grammar), heard)
    assert all(heard.ended.wait(30) for heard in asked)
    for tenant in "ab":
        numbers = [number for name, number in begun if name == tenant]
        assert numbers == sorted(numbers)


def test_what_waits_to_be_loaded_is_told_that_the_worker_ends(base: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, fetch = threading.Event(), bench.cache._fetch

    def slow(tenant: str, name: AdapterName) -> AbstractContextManager[Path]:
        assert opened.wait(30)
        return fetch(tenant, name)

    monkeypatch.setattr(bench.cache, "_fetch", slow)
    monkeypatch.setattr(bench.cache, "_held", type(bench.cache._held)())
    ending = Scheduler("tiny", "1", bench.base, BaseTokens(base), bench.cache)
    asked = [Heard() for _ in range(3)]
    for heard in asked:
        ending.ask(question(bench, [[5]], "low", 5_000), heard)
    closing = threading.Thread(target=ending.close)
    closing.start()
    until(lambda: ending._loading._ended)
    opened.set()
    closing.join(30)
    assert all(isinstance(heard.said[-1], Failed) for heard in asked)


class Stored:
    """A store of adapters' folders, as `AdapterFolders` reads it; `on_fetch` is called before each file."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders
        self.on_fetch: Callable[[str], None] = lambda _name: None

    def read(self, name: str, start: int, count: int) -> Iterator[bytes]:
        folder = self._folders[name.partition("/")[2]]
        files = [{"path": path.name, "blob": f"{name}/{path.name}", "bytes": path.stat().st_size} for path in folder.iterdir()]
        yield json.dumps({"files": files}).encode()

    def fetch(self, name: str, target: Path) -> None:
        self.on_fetch(name)
        _, folder, file = name.split("/")
        target.write_bytes((self._folders[folder] / file).read_bytes())


def test_room_for_one_adapter_is_not_made_of_another_that_is_being_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kivnun.serve.adapters.checked_name", lambda name: name)
    made: dict[str, Path] = {}
    for letter in "wxyz":
        made[letter] = tmp_path / letter
        made[letter].mkdir()
        (made[letter] / "file").write_text(letter * 100)
    names = {letter: AdapterName(manifest=f"t/{letter}", content_hash=hash_folder(folder)) for letter, folder in made.items()}
    store = Stored(made)
    folders = AdapterFolders(store, tmp_path / "kept", max_bytes=150)  # type: ignore[arg-type]
    with folders.fetched("t", names["w"]):
        pass
    with folders.fetched("t", names["w"]) as there, folders.fetched("t", names["x"]):
        assert (there / "file").read_text() == "w" * 100, "it was there before it was lent"
    with folders.fetched("t", names["x"]) as first:
        with folders.fetched("t", names["y"]) as second:
            assert [(place / "file").read_text() for place in (first, second)] == ["x" * 100, "y" * 100]

        def meanwhile(name: str) -> None:
            store.on_fetch = lambda _name: None
            with folders.fetched("t", names["y"]):
                pass

        store.on_fetch = meanwhile
        with folders.fetched("t", names["z"]) as third:  # while it is fetched, another makes room
            assert (third / "file").read_text() == "z" * 100
            assert (first / "file").read_text() == "x" * 100
    with folders.fetched("t", names["w"]):
        assert [place.name for place in (tmp_path / "kept").iterdir()] == [names["w"].content_hash]


def test_an_adapter_that_cannot_be_had_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_tenant: str, _name: AdapterName) -> AbstractContextManager[Path]:
        raise IntegrityError("the store lacks it", hint="restore it")

    monkeypatch.setattr(bench.cache, "_fetch", absent)
    monkeypatch.setattr(bench.cache, "_held", type(bench.cache._held)())
    heard = answered(bench, question(bench, [[5]], "low"))
    assert isinstance(heard.said[-1], Failed)
    assert heard.said[-1].code == "broken"


def test_prompts_are_scored_one_by_one_between_the_tokens_of_others(bench: Bench) -> None:
    pieces_when_begun: list[int] = []
    writing, scoring = Heard(), Heard()

    def ask(count: int) -> None:
        if count == 1:  # in the model's thread, so the next step finds both
            bench.scheduler.ask(question(bench, [[5, 6, 7]] * 5, limit=1, tenant="b", prompt_logprobs=True), scoring)

    writing.on_piece = ask
    said = scoring.said

    class Noted(list[Told]):
        def append(self, what: Told) -> None:
            if isinstance(what, Begun):
                pieces_when_begun.append(writing.pieces)
            super().append(what)

    scoring.said = Noted(said)
    bench.scheduler.ask(question(bench, [[3, 4]], limit=12), writing)
    assert writing.ended.wait(30)
    assert scoring.ended.wait(30)
    assert pieces_when_begun[0] > 1  # 1 where all prompts are scored at once
    (begun,) = (what for what in scoring.said if isinstance(what, Begun))
    assert begun.prompt_logprobs is not None
    assert len({str(prompt) for prompt in begun.prompt_logprobs}) == 1
    assert len(begun.prompt_logprobs) == 5


def test_a_model_that_cannot_go_on_ends_its_process(bench: Bench, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    died = threading.Event()
    scheduler = Scheduler("tiny", "1", bench.base, BaseTokens(base), bench.cache, die=died.set)
    monkeypatch.setattr(scheduler, "_admitted", lambda: 1 / 0)
    scheduler.ask(question(bench, [[3, 4]]), Heard())
    assert died.wait(30)
