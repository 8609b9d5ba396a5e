"""What a finished run hands to others answers as the run does, and a run is found to be what it says, or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from by_hand import nll_by_hand
from kivnun.artifacts import hash_folder
from kivnun.errors import IntegrityError, KivnunError, RunFolderError
from kivnun.export.merge import export_run
from kivnun.export.verify import verify_run
from kivnun.opened import open_run
from runs import chats, pairs, run_spec, write_spec

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4},
    "rslora": {"kind": "lora", "rank": 4, "rslora": True},
    "dora": {"kind": "dora", "rank": 4},
    "full": {"kind": "full"},
    "dpo": {"kind": "lora", "rank": 4},
}
CHECKS = ["files", "environment", "base", "data", "held-out score", "PEFT", "first steps"]


@pytest.fixture(scope="module")
def run_of(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the finished run of a kind, made once."""
    place = tmp_path_factory.mktemp("runs")

    def made(kind: str) -> Path:
        run = place / kind / "run"
        if not run.exists():
            rows = pairs() if kind == "dpo" else chats()
            run_spec(write_spec(place / kind, base, rows, adapter=KINDS[kind]), run)
        return run

    return made


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_verifies_to_the_bit(kind: str, run_of: Callable[[str], Path]) -> None:
    checks = verify_run(run_of(kind))
    assert [check.name for check in checks] == [name if kind != "full" or name != "PEFT" else "transformers" for name in CHECKS]
    assert [check for check in checks if not check.ok] == []
    told = {check.name: check.detail for check in checks}
    assert "equal to the bit" in told["held-out score"]
    assert "5 trained again" in told["first steps"]
    assert "equal to the bit" in told["first steps"]


def test_a_changed_adapter_fails_and_nothing_more_is_asked_of_it(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = copytree(run_of("lora"), tmp_path / "run")
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    (check,) = verify_run(run)
    assert (check.name, check.ok) == ("files", False)
    assert "adapter_model.safetensors was changed" in check.detail


def test_a_record_of_other_losses_fails_the_first_steps_alone(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = copytree(run_of("lora"), tmp_path / "run")
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    third = next(line for line in lines if line["name"] == "step_done" and line["step"] == 3)
    third["loss"] += 1e-6
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (run / "events.jsonl").write_text(text, encoding="utf-8")
    (failed,) = [check for check in verify_run(run) if not check.ok]
    assert failed.name == "first steps"
    assert "loss of step 3" in failed.detail


def test_changed_data_fails_by_name(base: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, base, chats(), adapter=KINDS["lora"])
    run_spec(spec, tmp_path / "run")
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text(encoding="utf-8").replace("one", "uno", 1), encoding="utf-8")
    failed = [check.name for check in verify_run(tmp_path / "run") if not check.ok]
    assert "data" in failed


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError):
        verify_run(tmp_path)


def test_the_exported_adapter_is_the_runs(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_of("dora")
    export_run(run, "peft", tmp_path / "out")
    for file in (run / "adapter").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "full"])
def test_the_merged_model_scores_in_plain_transformers_as_the_run_says(
    kind: str, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run = run_of(kind)
    export_run(run, "merged", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    opened = open_run(run)
    said = json.loads((run / "result.json").read_text(encoding="utf-8"))["tuned"]["nll"]
    assert nll_by_hand(model, opened) == pytest.approx(said, abs=1e-4)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_a_merge_of_a_bfloat16_base_is_bfloat16_and_passes_its_gate(base: Path, tmp_path: Path) -> None:
    copytree(base, tmp_path / "base16")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "base16")
    spec = write_spec(tmp_path, tmp_path / "base16", chats(), adapter=KINDS["dora"])
    run_spec(spec, tmp_path / "run")
    export_run(tmp_path / "run", "merged", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_folder_that_holds_something_is_never_replaced(form: str, run_of: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(RunFolderError, match="exists already"):
        export_run(run_of("lora"), form, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_full_tuning_has_no_adapter_to_export(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(KivnunError, match="whole model"):
        export_run(run_of("full"), "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_merged_into_another_base(base: Path, tmp_path: Path) -> None:
    own = copytree(base, tmp_path / "base")
    run_spec(write_spec(tmp_path, own, chats(), adapter=KINDS["lora"]), tmp_path / "run")
    export_run(tmp_path / "run", "merged", tmp_path / "out")
    before = hash_folder(own)
    (own / "model.safetensors").write_bytes((tmp_path / "out" / "model.safetensors").read_bytes())
    assert hash_folder(own) != before
    with pytest.raises(IntegrityError, match="not the base"):
        export_run(tmp_path / "run", "merged", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
