"""Bases on demand: those that run fit beside each other, an idle one gives way, and one without room is refused with figures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from answer_parts import place_with, until, worker
from kivnun.cli.serve import _wanted
from kivnun.jobs import wanted
from kivnun.jobs.blobs import FolderBlobs
from kivnun.jobs.config import BaseEntry, ServiceConfig
from kivnun.jobs.database import Database
from kivnun.jobs.place import Place
from kivnun.model.attention import KVCache
from kivnun.model.generate import new_row, prefill
from kivnun.model.sampling import SamplingParams
from kivnun.plan.bases import base_files
from kivnun.plan.devices import GIB, Device
from kivnun.plan.serving import MOST_TOKENS, PREFILL_TOKENS, Serving, serving_of, serving_of_files
from kivnun.serve import resident
from kivnun.serve.adapters import AdapterFolders
from kivnun.serve.scheduler import Capacity
from kivnun.service.room import SPARE_S, Room, Wish, fitting
from service_parts import KEY, api, service_at

PHI, PHI_4 = "microsoft/Phi-4-mini-instruct", "microsoft/phi-4"
ASKED = [{"role": "user", "content": "hello"}]
sizes = st.integers(1, 100).map(float)
ages = st.sampled_from([0.0, 5.0, SPARE_S - 1, SPARE_S, SPARE_S + 7, SPARE_S + 90])
one_wish = st.tuples(sizes, ages, st.booleans())


@given(st.lists(one_wish, max_size=8), st.integers(0, 250).map(float))
def test_whatever_is_asked_for_what_runs_fits_and_only_the_idle_give_way(
    given: list[tuple[float, float, bool]], available: float
) -> None:
    wishes = [Wish(f"base-{number}", *one) for number, one in enumerate(given)]
    by_name = {wish.base: wish for wish in wishes}
    running = {wish.base for wish in wishes if wish.runs}
    before = sum(by_name[base].num_bytes for base in running)
    found = fitting(wishes, available)
    after = sum(by_name[base].num_bytes for base in found.kept)
    assert after <= max(available, before), "nothing is loaded that does not fit"
    assert {wish.base for wish in wishes if not wish.runs} == (found.kept - running) | set(found.refused), "each is told"
    gone = running - found.kept
    assert all(by_name[base].idle_s >= SPARE_S for base in gone), "what is in use stays"
    assert not gone or found.kept - running, "nothing gives way in vain"
    stays = [by_name[base].idle_s for base in running & found.kept]
    assert all(by_name[base].idle_s >= idle_s for base in gone for idle_s in stays), "the longest idle goes first"
    for base, free in found.refused.items():
        assert 0 <= free < by_name[base].num_bytes


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 20), st.integers(0, 1 << 42))
def test_a_worker_keeps_within_what_it_may_take_unless_its_base_alone_does_not(base: int, token: int, memory: int) -> None:
    serving = Serving(float(base), float(token))
    tokens = serving.held_tokens(memory)
    assert PREFILL_TOKENS <= tokens <= MOST_TOKENS
    if tokens > PREFILL_TOKENS:
        assert serving.total_bytes(memory) <= memory
    assert serving.held_tokens(memory * 2) >= tokens


def test_the_size_of_a_token_is_that_of_its_keys_and_values() -> None:
    files = base_files(PHI)
    cpu, gpu = Device("a CPU", "cpu", 64 * GIB), Device("a GPU", "cuda", 79 * GIB)
    assert serving_of_files(files, "auto", cpu).token_bytes == 32 * 2 * 8 * 128 * 2, (
        "layers, keys and values, heads, width, bfloat16"
    )
    assert serving_of_files(files, "fp32", gpu).token_bytes == 32 * 2 * 8 * 128 * 4
    weights = 3.836e9
    for precision, number in (("fp32", 4.0), ("bf16", 2.0), ("nf4", 0.7)):
        taken = serving_of_files(files, precision, cpu).base_bytes
        assert number * weights < taken < number * weights + 4e9
    other = serving_of({**files.config, "model_type": "another"}, "another", "bf16", "cpu", numbers=1_000_000)
    assert other.token_bytes == 131_072, "a family that is not known has its own widths all the same"


@pytest.mark.parametrize(("memory", "tokens"), [(None, MOST_TOKENS), (2 * GIB, 54_000), (GIB / 8, PREFILL_TOKENS)])
def test_a_loaded_base_takes_on_what_its_memory_holds_and_a_token_is_as_large_as_was_reckoned(
    tmp_path: Path, memory: float | None, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacities: list[Capacity] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(resident, "find_device", lambda name: Device(name, "cpu", 64 * GIB))
    monkeypatch.setattr(resident, "Scheduler", lambda *given: (capacities.append(given[-1]), given[2])[1])
    folders = AdapterFolders(FolderBlobs(tmp_path / "blobs"), tmp_path / "adapters")
    base = resident.load_resident(config(), "kivnun/tiny-phi", folders, memory)
    assert capacities[0].held_tokens == pytest.approx(tokens, rel=0.05)
    cache, row = KVCache(), new_row(0, [5] * 64, SamplingParams(1, frozenset()), 0, None)
    with torch.no_grad():
        prefill(base, cache, [row])
    (keys, values) = zip(*(cache.held(layer, 0) for layer in range(base.config.num_hidden_layers)), strict=True)
    held = sum(one.numel() * one.element_size() for one in (*keys, *values))
    known = serving_of_files(base_files("kivnun/tiny-phi"), "auto", Device("a CPU", "cpu", GIB))
    assert held == 64 * known.token_bytes


def test_a_base_with_a_configuration_of_its_own_kind_is_loaded_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "read_config", lambda _: {"model_type": "another", "n_layer": 2})
    folders = AdapterFolders(FolderBlobs(tmp_path / "blobs"), tmp_path / "adapters")
    scheduler = resident.load_resident(config(), "kivnun/tiny-phi", folders)
    scheduler.close()


def config(**given: object) -> ServiceConfig:
    bases = {"kivnun/tiny-phi": BaseEntry(resident=True), PHI: BaseEntry(), PHI_4: BaseEntry(), "gone": BaseEntry()}
    return ServiceConfig.model_validate({"bases": bases, **given})


@pytest.mark.parametrize(
    ("gib", "trains", "runs"), [(16, True, []), (16, False, [PHI]), (32, True, [PHI]), (192, True, [PHI, PHI_4])]
)
def test_a_small_machine_loads_no_base_that_it_cannot_hold(gib: int, trains: bool, runs: list[str]) -> None:
    made = Room(config(), trains, lambda: 0.0, lambda: Device("a CPU", "cpu", 0.8 * gib * GIB))
    made.look({})
    bases, refused = made.look({PHI: 1, PHI_4: 1})
    assert bases == runs
    assert set(refused) == {PHI, PHI_4} - set(runs)
    for why in refused.values():
        assert "GiB" in why
        assert "on_demand_gib" in why


def test_an_operator_says_how_much_bases_on_demand_take_and_one_of_unknown_size_runs_alone() -> None:
    now = [0.0]
    made = Room(config(on_demand_gib=12.0), True, lambda: now[0], lambda: Device("a CPU", "cpu", 999 * GIB))
    assert made.num_bytes == 12 * GIB
    made.look({})
    assert made.look({"gone": 1})[0] == ["gone"]
    bases, refused = made.look({"gone": 2, PHI: 1})
    assert bases == ["gone"]
    assert "try again" in refused[PHI]
    now[0] = SPARE_S
    assert made.look({"gone": 2, PHI: 2}) == ([PHI], {}), "the idle one gives way"
    assert "is not known" in made.look({"gone": 3, PHI: 3})[1]["gone"]


def test_residents_share_a_machine_and_leave_room_for_each_other() -> None:
    bases = {PHI: BaseEntry(resident=True), "microsoft/Phi-3.5-mini-instruct": BaseEntry(resident=True)}
    device = Device("a GPU", "cuda", 40 * GIB)
    made = Room(ServiceConfig(bases=bases), False, lambda: 0.0, lambda: device)
    given = made.allowances()
    assert sum(given.values()) == pytest.approx(device.memory_bytes)
    assert 0 < made.num_bytes < device.memory_bytes - sum(given.values()) * 0.5


def test_records_of_an_earlier_start_are_taken_back_and_those_of_another_machine_stay() -> None:
    made = Room(config(), True, lambda: 0.0)
    assert made.to_tell({PHI: "of yesterday"}, {}) == {PHI: None}
    assert made.to_tell({"gone": "another machine's"}, {}) == {}
    assert made.to_tell({}, {PHI: "no room"}) == {PHI: "no room"}
    assert made.to_tell({PHI: "no room"}, {PHI: "no room"}) == {}
    for _ in range(2):  # until it is done
        assert made.to_tell({PHI: "no room"}, {}) == {PHI: None}
    assert made.to_tell({}, {}) == {}


# --- with the API ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return place_with(tmp_path, "version: 1\nbases: {one: {trainer: toy}, two: {trainer: toy}}\non_demand_gib: 0.1\n")


@pytest.fixture
def db(place: Place) -> Iterator[Database]:
    made = place.database()
    yield made
    made.close()


def test_a_base_without_room_is_refused_at_once_in_both_dialects_and_loaded_when_there_is_room(
    place: Place, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kivnun.cli.serve.LOOK_S", 0.05)
    ahead = [0.0]
    made = Room(place.service_config(), True, lambda: ahead[0])
    parts = _wanted(place, db, made)
    with worker(place, "one"), api(service_at(place, place.service_config())) as url:
        kinds = (
            openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0),
            openai.AzureOpenAI(azure_endpoint=url, api_key=KEY, api_version="2024-10-21", max_retries=0),
        )
        kinds[0].chat.completions.create(model="one", messages=ASKED)  # type: ignore[arg-type]
        until(lambda: [part.name for part in parts()] == ["answer one"])
        for client in kinds:
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(model="two", messages=ASKED)  # type: ignore[arg-type]
            assert (caught.value.status_code, caught.value.code, caught.value.type) == (503, "engine_overloaded", "server_error")
            assert "two is not loaded: it takes 0.1 GiB, and 0.0 GiB of the 0.1 GiB" in caught.value.message
            assert "retry-after-ms" in caught.value.response.headers
        assert caught.value.response.json()["error"]["innererror"] == {"code": "engine_overloaded"}
        ahead[0] = SPARE_S
        db.write("asked", lambda tx: wanted.ask(tx, "two"))
        until(lambda: [part.name for part in parts()] == ["answer two"])
        assert db.read(wanted.refusals) == {}, "and whoever asks waits for it"
        for client in kinds:
            client.close()


def test_a_base_is_asked_for_again_and_again_while_it_writes_a_long_answer(
    place: Place, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kivnun.service.answering.WISH_S", 0.1)
    with (
        worker(place, "one", token_s=0.02),
        api(service_at(place, place.service_config())) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        began = time.monotonic()
        client.chat.completions.create(model="one", messages=ASKED, max_tokens=40)  # type: ignore[arg-type]
        took = time.monotonic() - began
    assert took > 0.3
    assert db.read(wanted.asks)["one"] >= 3, "it is no idle base that gives way to another"
