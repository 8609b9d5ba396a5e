"""Who may write a run folder, and what a run is compared with when it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from kivnun.errors import RunFolderError
from kivnun.events import Event, RunFailed, RunStarted, Warned
from kivnun.run_folder import RunFolder, check_finished, check_start, claim, seconds_worked, write_specs
from kivnun.spec import TuneSpec, parse_spec

NOW = {"data_hash": "a", "base_hash": "b", "environment": {"threads": 1}}


def spec_of(folder: Path, more: str = "") -> TuneSpec:
    return parse_spec(f"version: 1\nbase: x/y\ndata: {{train: train.jsonl}}\n{more}", folder=folder)


def begun(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    claim(folder, resume=False)
    folder.events.touch()
    check_start(folder, spec_of(tmp_path), NOW)
    return folder


def test_a_run_that_has_begun_is_claimed_by_resume_alone(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    with pytest.raises(RunFolderError, match="exists already"):
        claim(folder, resume=False)
    claim(folder, resume=True)


def test_a_run_that_was_refused_is_not_in_the_way(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    claim(folder, resume=False)
    folder.events.touch()
    write_specs(folder, "one", spec_of(tmp_path), {})
    claim(folder, resume=False)
    write_specs(folder, "two", spec_of(tmp_path, "seed: 1"), {})
    assert folder.read_spec().seed == 1


def test_a_file_or_another_folder_of_that_name_is_never_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("x", encoding="utf-8")
    for name in ("file", "folder"):
        for resume in (False, True):
            with pytest.raises(RunFolderError):
                claim(RunFolder(tmp_path / name), resume=resume)
    assert (tmp_path / "folder" / "letter.txt").read_text(encoding="utf-8") == "x"


def test_another_spec_is_refused_with_every_difference(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    write_specs(folder, "text", spec_of(tmp_path), {})
    other = spec_of(tmp_path, "seed: 3\nadapter: {kind: dora, rank: 2}")
    with pytest.raises(
        RunFolderError, match=r"adapter\.kind was 'lora', is 'dora'; adapter\.rank was 16, is 2; .*seed was 0, is 3"
    ):
        write_specs(folder, "text", other, {})
    with pytest.raises(RunFolderError, match=r"finished with another spec: .*seed was 0, is 3"):
        check_finished(folder, other)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data_hash": "z"}, "the training or validation data changed"),
        ({"base_hash": "z"}, "the base's weights or configuration changed"),
        ({"environment": {"threads": 2}}, "threads was 1, is 2"),
        ({"environment": {"threads": 1, "variable.MKL_CBWR": "AVX2"}}, r"variable\.MKL_CBWR was not set, is AVX2"),
    ],
)
def test_what_a_run_was_begun_with_is_compared(tmp_path: Path, changed: dict[str, object], said: str) -> None:
    folder = begun(tmp_path)
    check_start(folder, spec_of(tmp_path), NOW)
    with pytest.raises(RunFolderError, match=said):
        check_start(folder, spec_of(tmp_path), {**NOW, **changed})


def test_a_start_that_cannot_be_read_is_never_taken_for_a_new_one(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.start.write_text("{", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"start\.json cannot be read"):
        check_start(folder, spec_of(tmp_path), NOW)


def test_pauses_between_processes_are_not_work() -> None:
    def at(second: int) -> str:
        return f"2026-01-01T00:00:{second:02d}.000Z"

    events: list[Event] = [
        RunStarted("r", "h", at(0)),
        Warned("x", at(4)),
        RunStarted("r", "h", at(30)),
        RunFailed("c", "m", at(33)),
    ]
    assert seconds_worked(events) == 7
    assert seconds_worked([]) == 0
