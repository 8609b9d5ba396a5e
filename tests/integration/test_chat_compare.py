"""Base and tuned asked alike: each answers as it does alone, from one base in memory; the conversation's commands do as told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from kivnun.cli.main import run as command
from kivnun.opened import OpenedRun
from runs import chats, run_spec, write_spec


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compare")
    run_spec(write_spec(place, base, chats()), place / "run")
    return place / "run"


def typed(monkeypatch: pytest.MonkeyPatch, lines: Sequence[str]) -> None:
    left = iter([*lines, ""])
    monkeypatch.setattr("builtins.input", lambda _prompt="": next(left))


def once(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert command(["chat", str(folder), "--once", "three 2", "--max-new-tokens", "6", *options]) == 0
    return capsys.readouterr().out


def talk(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, str]:
    assert command(["chat", str(folder), "--max-new-tokens", "6", *options]) == 0
    out, err = capsys.readouterr()
    return out, err


def test_both_answer_as_each_does_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = once(folder, capsys, "--base", "--json"), once(folder, capsys, "--json")
    both = json.loads(once(folder, capsys, "--compare", "--json"))
    assert both == {"base": json.loads(base), "tuned": json.loads(tuned)}
    assert both["base"]["reply"] != both["tuned"]["reply"]
    assert once(folder, capsys, "--compare") == f"base: {both['base']['reply']}\ntuned: {both['tuned']['reply']}\n"


def test_one_base_is_in_memory_for_both_but_two_after_full_tuning(
    folder: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    load = OpenedRun._load  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(OpenedRun, "_load", lambda self, place, *given: loaded.append(place) or load(self, place, *given))
    once(folder, capsys, "--compare")
    assert len(loaded) == 1
    run_spec(write_spec(tmp_path, base, chats(20), adapter={"kind": "full"}), tmp_path / "run")
    loaded.clear()
    assert command(["chat", str(tmp_path / "run"), "--once", "one", "--compare", "--max-new-tokens", "2"]) == 0
    assert "two models are in memory" in capsys.readouterr().err
    assert len(loaded) == 2


def test_who_answers_is_chosen_in_the_conversation(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = json.loads(once(folder, capsys, "--compare", "--json"))
    base, tuned = both["base"]["reply"], both["tuned"]["reply"]
    typed(monkeypatch, ["three 2", "/new", "/base", "three 2", "/new", "/both", "three 2", "/new", "/tuned", "three 2"])
    out, _ = talk(folder, capsys)
    assert out == f"{tuned}\n{base}\nbase: {base}\ntuned: {tuned}\n{tuned}\n"


def test_each_goes_on_from_its_own_replies_and_new_forgets_them(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: dict[str, str] = {}
    for which, given in (("base", ["--base"]), ("tuned", [])):
        typed(monkeypatch, ["one 1", "three 2"])
        alone[which] = talk(folder, capsys, *given)[0]
    typed(monkeypatch, ["one 1", "three 2"])
    together, _ = talk(folder, capsys, "--compare")
    (base_1, base_2), (tuned_1, tuned_2) = (_two_replies(folder, capsys, which, alone[which]) for which in ("base", "tuned"))
    assert together == f"base: {base_1}\ntuned: {tuned_1}\nbase: {base_2}\ntuned: {tuned_2}\n"
    typed(monkeypatch, ["one 1", "/new", "three 2"])
    assert talk(folder, capsys)[0].endswith(once(folder, capsys))


def _two_replies(folder: Path, capsys: pytest.CaptureFixture[str], which: str, said: str) -> tuple[str, str]:
    """Return the replies of a conversation that began with `one 1`: the first is asked for again."""
    given = ["--base"] if which == "base" else []
    assert command(["chat", str(folder), "--once", "one 1", "--max-new-tokens", "6", "--json", *given]) == 0
    first = json.loads(capsys.readouterr().out)["reply"]
    assert said.startswith(f"{first}\n")
    return first, said[len(first) + 1 : -1]


def test_a_system_message_begins_anew(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told = once(folder, capsys, "--system", "seven seven seven")
    typed(monkeypatch, ["one 1", "/system seven seven seven", "three 2", "/system", "three 2"])
    out, _ = talk(folder, capsys)
    assert out.endswith(told + once(folder, capsys))


def test_an_unknown_command_is_told_and_a_slash_may_be_sent(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, ["/nwe", "/help"])
    out, err = talk(folder, capsys)
    assert out == ""
    assert "there is no command /nwe; there are /base, /tuned, /both, /new, /system TEXT, /help" in err
    assert "forget the conversation" in err
    assert command(["chat", str(folder), "--once", "/etc", "--max-new-tokens", "6"]) == 0
    direct = capsys.readouterr().out
    typed(monkeypatch, ["//etc"])
    assert talk(folder, capsys)[0] == direct


def test_options_that_contradict_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["chat", str(folder), "--base", "--compare"]) == 2
    assert "leave --base out" in capsys.readouterr().err
