"""`kivnun plan` tells what a spec will take, for people and for programs, and loads no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_cli_light import loaded_by

from kivnun.cli.main import run
from runs import chats, stranger, write_rows

Told = tuple[int, str, str]
PHI = "base=microsoft/Phi-4-mini-instruct"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    """Return a function that runs `kivnun plan` on a spec and returns its status, stdout and stderr."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("kivnun.plan.time.machine_speed", lambda precision: 1.0)  # a process of its own, which takes seconds
    write_rows(tmp_path / "train.jsonl", chats(120))
    spec = tmp_path / "spec.yaml"
    spec.write_text("version: 1\nbase: kivnun/tiny-phi\ndata: {train: train.jsonl}\n", encoding="utf-8")

    def plan(*arguments: str) -> Told:
        status = run(["plan", str(spec), *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return plan


def parsed(text: str) -> dict[str, Any]:
    return json.loads(text.splitlines()[-1])


def sets(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def test_a_run_that_fits_is_told_with_its_parts(told: Callable[..., Told]) -> None:
    status, out, _ = told("--device", "cpu")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith("It fits: spec.yaml on this machine's CPU, ")
    heads = [line.split()[0] for line in lines[1:9]]
    assert heads == ["process", "weights", "adapter", "gradients", "moments", "activations", "workspace", "together"]
    assert "108 to train on, 12 held out" in out
    assert "21, in passes of" in out
    assert "compute.micro_batch_tokens: 4096 (the larger of 4096" in out


def test_programs_get_one_object(told: Callable[..., Told]) -> None:
    status, out, err = told("--device", "cpu", "--json")
    assert (status, err) == (0, "")
    found = parsed(out)
    assert (found["status"], found["verdict"]) == ("fits", "fits")
    assert sum(found["plan"]["parts"].values()) == found["plan"]["peak_bytes"] < found["limit_bytes"]
    assert found["plan"]["steps"] == found["steps"]["count"] == 21
    assert found["plan"]["seconds"] == pytest.approx(sum(found["seconds_by_stage"].values()), abs=0.01)
    assert found["rows"]["train"] == 108
    assert found["spec"]["compute"]["activation_checkpointing"] is False
    assert "error" not in found


def test_a_run_that_does_not_fit_ends_with_its_own_status_and_names_what_would(told: Callable[..., Told]) -> None:
    large = ("--set", PHI, "--set", "adapter.kind=full", "--device", "l4")
    status, out, _ = told(*large)
    assert status == 10
    assert out.startswith("It does not fit: spec.yaml on L4, 23.0 GiB for each process")
    assert "--set 'adapter={kind: lora}'" in out
    status, out, _ = told(*large, "--json")
    found = parsed(out)
    assert (status, found["status"], found["exit_status"], found["error"]["code"]) == (10, "failed", 10, "does_not_fit")
    assert "--set 'adapter={kind: lora}'" in found["error"]["hint"]
    for change in found["changes"]:
        assert told(*large, *sets(change["set"]), "--json")[0] == 0, change


def test_devices_and_memory_may_be_named(told: Callable[..., Told]) -> None:
    many = ("--set", "compute.kind=multi_process", "--set", "compute.processes=8")
    found = parsed(told("--set", PHI, *many, "--device", "h100", "--json")[1])
    assert (found["device"]["count"], found["device"]["name"]) == (8, "H100")
    assert found["limit_bytes"] == 79 * 2**30
    assert parsed(told("--device", "cpu", "--memory", "3", "--json")[1])["limit_bytes"] == 3 * 2**30
    status, _, err = told("--device", "h300")
    assert status == 2
    assert "did you mean h200? there are cpu, cuda" in err


def test_a_run_is_priced(told: Callable[..., Told], tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("currency: EUR\nhours: {cpu: 3600}\nmillion_trained_tokens: 1000000\n", encoding="utf-8")
    found = parsed(told("--device", "cpu", "--prices", str(prices), "--json")[1])
    assert found["cost"]["currency"] == "EUR"
    assert found["cost"]["by_hours"] == pytest.approx(found["plan"]["seconds"], rel=1e-3)
    assert found["cost"]["by_tokens"] == pytest.approx(found["steps"]["trained_tokens"])
    assert "EUR by hours" in told("--device", "cpu", "--prices", str(prices))[1]
    prices.write_text("currency: EUR\nhour: 3\n", encoding="utf-8")
    status, _, err = told("--prices", str(prices))
    assert status == 2
    assert "hour is no key of a list of prices" in err


def test_a_base_of_unknown_layers_is_told_and_not_refused(told: Callable[..., Told], tmp_path: Path) -> None:
    folder = stranger(tmp_path / "stranger")
    status, out, _ = told("--set", f"base={folder}", "--device", "cpu", "--memory", "0.001")
    assert status == 0
    assert out.startswith("Nobody knows whether it fits")
    assert "model_type 'stranger'" in out
    found = parsed(told("--set", f"base={folder}", "--device", "cpu", "--json")[1])
    assert (found["status"], found["plan"]) == ("unknown", None)
    assert "'stranger'" in found["unknown"]


def test_planning_loads_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_rows(tmp_path / "train.jsonl", chats(40))
    (tmp_path / "spec.yaml").write_text("version: 1\nbase: kivnun/tiny-phi\ndata: {train: train.jsonl}\n", encoding="utf-8")
    watched = ("torch", "transformers", "peft", "deepspeed")
    for more in (["--device", "cpu"], ["--device", "l4", "--memory", "0.01"]):
        status, loaded, out = loaded_by(["plan", str(tmp_path / "spec.yaml"), *more, "--json"], watched)
        assert loaded == []
        assert status == (0 if "cpu" in more else 10)
        assert parsed(out)["plan"]["steps"] > 0
