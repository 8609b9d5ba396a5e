"""A run goes on only with what it was begun with; the difference is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from kivnun.errors import RunFolderError
from kivnun.events import AdapterOpened, Event
from runs import at_step, chats, killed, result_hashes, run_spec, write_rows, write_spec

EARLY = {"every_steps": 2, "every_epoch": False, "every_seconds": None}


def opened(event: Event) -> bool:
    return isinstance(event, AdapterOpened)


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "base")


@pytest.mark.parametrize("when", [opened, at_step(5)], ids=["before_the_first_checkpoint", "after_a_checkpoint"])
@pytest.mark.parametrize("what", ["data", "base", "spec", "threads", "version"])
def test_what_changed_is_refused_by_name(
    own_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: Callable[[Event], bool], what: str
) -> None:
    spec, run, overrides, said = write_spec(tmp_path, own_base, chats(), checkpoints=EARLY), tmp_path / "run", [], ""
    killed(spec, run, when)
    if what == "data":
        write_rows(tmp_path / "train.jsonl", chats()[1:])
        said = "the training or validation data changed"
    elif what == "base":
        tensors = load_file(own_base / "model.safetensors")
        name = sorted(tensors)[0]
        save_file({**tensors, name: tensors[name] * 1.5}, own_base / "model.safetensors", metadata={"format": "pt"})
        said = "the base's weights or configuration changed"
    elif what == "spec":
        overrides, said = ["adapter.rank=2"], "adapter.rank was 4, is 2"
    elif what == "threads":
        overrides, said = ["compute.threads=2"], "compute.threads was 1, is 2"
    else:
        import kivnun.pipeline as pipeline

        now = pipeline.numeric_environment

        def other(*args: Any) -> dict[str, Any]:
            return {**now(*args), "version.torch": "0.0"}

        monkeypatch.setattr(pipeline, "numeric_environment", other)
        said = r"version\.torch was .*, is 0\.0"
    with pytest.raises(RunFolderError, match=said):
        run_spec(spec, run, *overrides, resume=True)


def test_a_refusal_changes_nothing(base: Path, tmp_path: Path) -> None:
    """With the old rows back, the run goes on to the bytes it would have had."""
    spec, run = write_spec(tmp_path, base, chats(), checkpoints=EARLY), tmp_path / "run"
    killed(spec, run, at_step(5))
    write_rows(tmp_path / "train.jsonl", chats()[1:])
    with pytest.raises(RunFolderError):
        run_spec(spec, run, resume=True)
    write_rows(tmp_path / "train.jsonl", chats())
    run_spec(spec, run, resume=True)
    run_spec(spec, tmp_path / "whole")
    assert result_hashes(run) == result_hashes(tmp_path / "whole")


def test_a_folder_that_is_no_run_is_never_written_to(base: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, base, chats())
    for resume in (False, True):
        with pytest.raises(RunFolderError):
            run_spec(spec, tmp_path, resume=resume)
    run_spec(spec, tmp_path / "new" / "run", resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "spec.yaml", "train.jsonl"]
