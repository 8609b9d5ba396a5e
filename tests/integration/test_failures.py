"""What goes wrong on a user's machine: bad rows, numbers that explode, full and read-only disks. A clear error, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from disks import read_only, small_disk
from kivnun.artifacts import check_manifest
from kivnun.cli.main import run as command
from kivnun.errors import BaseModelError, NonFiniteLossError, StorageError
from kivnun.events import Event, RunFailed, StepDone, read_events
from runs import chats, hashes, newest_checkpoint, numbers_of, pairs, result_hashes, run_spec, state_hashes, write_spec

EVERY_STEP = {"every_steps": 1, "every_epoch": False, "every_seconds": None, "keep": 2}

# --- a user's own file ---


def forty_rows() -> list[str]:
    """Return the lines of a file as people have them: weights, several turns, a system message, other scripts."""
    lines = [json.dumps(row, ensure_ascii=False) for row in chats(38)]
    several = [
        {"role": "system", "content": "כן"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "אחת", "weight": 0},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "שתיים", "weight": 1},
    ]
    return [*lines, json.dumps({"messages": several}), json.dumps({"messages": several[1:3] + several[3:]}, ensure_ascii=False)]


def test_a_malformed_line_is_named_and_once_mended_the_file_trains(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, file, run = write_spec(tmp_path, base), tmp_path / "train.jsonl", str(tmp_path / "run")
    lines = forty_rows()
    broken = [*lines[:16], lines[16][:-1], *lines[17:]]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(broken).encode() + b"\r\n")
    assert command(["tune", str(spec), "--output", run, "--json"]) == 3
    out, err = capsys.readouterr()
    assert [problem["line"] for problem in json.loads(out.splitlines()[-1])["error"]["problems"]] == [17]
    assert f"{file}:17: " in err
    assert "Traceback" not in err
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    assert command(["tune", str(spec), "--output", run, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tuned"]["rows"] == 8
    assert result["tuned"]["nll"] < result["base"]["nll"]


def test_a_base_that_is_refused_leaves_nothing_in_the_way(base: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, base, chats(), adapter={"kind": "lora", "rank": 4, "target_modules": ["no_such"]})
    with pytest.raises(BaseModelError, match="no_such"):
        run_spec(spec, tmp_path / "run")
    assert not (tmp_path / "run" / "evaluation").exists(), "the base was scored for nothing"
    assert run_spec(write_spec(tmp_path, base, chats(), adapter={"kind": "lora", "rank": 4}), tmp_path / "run")["steps"] == 16


# --- numbers ---


def test_a_rate_that_explodes_stops_before_the_update_and_names_the_rows(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(tmp_path, base, chats(), checkpoints=EVERY_STEP, schedule={"learning_rate": 1e30, "warmup_share": 0})
    run = tmp_path / "run"
    assert command(["tune", str(spec), "--output", str(run), "--json"]) == 7
    err = capsys.readouterr().err
    assert f"{tmp_path / 'train.jsonl'}:" in err
    assert "nothing was updated" in err
    steps = numbers_of(run)
    assert newest_checkpoint(run).name == f"step-{steps[-1][0]:06d}"
    check_manifest(newest_checkpoint(run))
    assert isinstance(read_events(run / "events.jsonl")[-1], RunFailed)
    assert not (run / "adapter").exists()
    before = hashes(newest_checkpoint(run))
    with pytest.raises(NonFiniteLossError):  # it is no better the second time, and harms nothing
        run_spec(spec, run, resume=True)
    assert hashes(newest_checkpoint(run)) == before


@pytest.mark.parametrize("kind", ["messages", "preference"])
def test_a_base_that_computes_nan_is_stopped_at_the_rows_that_met_it(base: Path, tmp_path: Path, kind: str) -> None:
    """One token's embedding is NaN: only rows that hold the token are named."""
    own = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(own / "model.safetensors")
    rows = chats(12) if kind == "messages" else pairs(12)
    text = json.dumps(rows[5], ensure_ascii=False)
    rows[5] = json.loads(text.replace(" 5", " Z"))
    embedding = tensors["model.embed_tokens.weight"].copy()
    from kivnun.data.template import load_tokenizer

    embedding[load_tokenizer(own).encode("Z")[-1]] = np.nan
    save_file({**tensors, "model.embed_tokens.weight": embedding}, own / "model.safetensors", metadata={"format": "pt"})
    spec = write_spec(tmp_path, own, rows, data={"validation": None}, schedule={"batch_rows": 3}, checkpoints=EVERY_STEP)
    with pytest.raises(NonFiniteLossError, match=r"train\.jsonl:6") as caught:
        run_spec(spec, tmp_path / "run")
    if kind == "messages":
        assert caught.value.message.count("train.jsonl:") == 1
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        assert all(np.isfinite(value).all() for value in load_file(checkpoint / "state.safetensors").values())


# --- disks ---


class Filler:
    """Takes the room of a disk once a step is reached, all but `left` bytes; `free` gives it back."""

    def __init__(self, disk: Path, step: int, left: int) -> None:
        self._file, self._step, self._left = disk / "filler", step, left

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == self._step:
            size = shutil.disk_usage(self._file.parent).free - self._left
            self._file.write_bytes(b"\0" * max(size, 0))

    def free(self) -> None:
        self._file.unlink()


@pytest.mark.parametrize("left", [0, 4096, 20_000], ids=["for_no_event", "for_events_only", "for_half_a_checkpoint"])
def test_a_full_disk_loses_no_checkpoint_and_with_room_again_the_run_goes_on_to_the_bit(
    base: Path, tmp_path: Path, left: int
) -> None:
    spec = write_spec(tmp_path, base, chats(), checkpoints=EVERY_STEP)
    run_spec(spec, tmp_path / "whole")
    with small_disk(tmp_path / "disk", 3 * 2**20) as disk:
        run, full = disk / "run", Filler(disk, 6, left)
        with pytest.raises(StorageError, match="the disk is full") as caught:
            run_spec(spec, run, listener=full)
        assert caught.value.exit_status == 6
        assert "what was saved before is intact" in str(caught.value)
        kept = sorted((run / "checkpoints").glob("step-*"))
        assert len(kept) == 2
        for checkpoint in kept:
            check_manifest(checkpoint)
        full.free()
        run_spec(spec, run, resume=True)
        assert numbers_of(run) == numbers_of(tmp_path / "whole")
        assert state_hashes(run) == state_hashes(tmp_path / "whole")
        assert result_hashes(run) == result_hashes(tmp_path / "whole")


def test_a_disk_that_becomes_read_only_is_told_with_its_status(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(tmp_path, base, chats())
    with small_disk(tmp_path / "disk", 3 * 2**20) as disk, read_only(disk):
        assert command(["tune", str(spec), "--output", str(disk / "run")]) == 6
    err = capsys.readouterr().err
    assert "read-only" in err
    assert "Traceback" not in err
