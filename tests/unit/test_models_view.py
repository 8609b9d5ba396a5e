"""The view over run folders: every run with its version, scores and parent; what is damaged or foreign is told, never fatal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest

from kivnun.artifacts import hash_folder
from kivnun.cli.main import run as command
from kivnun.errors import RunFolderError
from kivnun.export.merge import export_run
from kivnun.run_view import RunView, view_run, view_runs
from runs import at_step, chats, killed, pairs, run_spec, write_rows, write_spec


@pytest.fixture(scope="module")
def place(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of runs: a first one, three that came from it or from another's model, one killed, one failed."""
    place = tmp_path_factory.mktemp("models")
    runs = place / "runs"
    scored = {"metrics": ["exact_match"], "max_new_tokens": 4}
    first = write_spec(place, base, chats(60), evaluation=scored)
    run_spec(first, runs / "zulu")
    run_spec(write_spec(place / "a", base, chats(30), adapter={"kind": "lora", "start_from": str(runs / "zulu")}), runs / "alpha")
    export_run(runs / "zulu", "merged", place / "merged")
    run_spec(write_spec(place / "m", place / "merged", pairs(), adapter={"kind": "dora", "rank": 2}), runs / "merged-on")
    run_spec(write_spec(place / "f", base, chats(20), adapter={"kind": "full"}), runs / "full")
    export_run(runs / "full", "merged", place / "copy")  # its hash is the model's, wherever it lies
    run_spec(write_spec(place / "g", place / "copy", chats(20), adapter={"kind": "ia3"}), runs / "on-copy")
    killed(first, runs / "killed", at_step(3))
    (place / "b").mkdir()
    bad = write_spec(place / "b", base, chats(20))
    write_rows(place / "b" / "train.jsonl", [{"question": 1}])
    assert command(["tune", str(bad), "--output", str(runs / "refused")]) == 3
    (runs / "notes").mkdir()
    (runs / "loose.txt").write_text("a file is no folder", encoding="utf-8")
    return place


def views(place: Path) -> dict[str, RunView]:
    return {view.name: view for view in view_runs([place / "runs"])}


def test_every_folder_is_listed_by_time(place: Path) -> None:
    found = view_runs([place / "runs"])
    assert [view.name for view in found] == ["notes", "zulu", "alpha", "merged-on", "full", "on-copy", "killed", "refused"]
    assert [view.when or "" for view in found] == sorted(view.when or "" for view in found)


def test_a_run_is_told_with_its_version_scores_and_size(place: Path) -> None:
    view = views(place)["zulu"]
    result = json.loads((place / "runs" / "zulu" / "result.json").read_text(encoding="utf-8"))
    assert view.version == hash_folder(place / "runs" / "zulu" / "adapter")
    assert (view.status, view.problem, view.technique) == ("succeeded", None, "lora 4")
    assert view.metrics is not None
    assert view.metrics["nll"] == {"base": result["base"]["nll"], "tuned": result["tuned"]["nll"], "verdict": "better"}
    assert "exact_match" in view.metrics
    assert view.size_bytes == sum(file.stat().st_size for file in (place / "runs" / "zulu").rglob("*") if file.is_file())
    assert view.lineage is None


def test_lineage_leads_to_the_run_it_came_from(place: Path) -> None:
    found = views(place)
    zulu, full = found["zulu"].version, found["full"].version
    assert found["alpha"].lineage == {"how": "adapter", "run": "zulu", "content_hash": zulu}
    assert found["merged-on"].lineage == {"how": "merged", "run": "zulu", "content_hash": zulu}
    assert found["on-copy"].lineage == {"how": "model", "run": "full", "content_hash": full}
    assert [found[name].technique for name in ("merged-on", "full", "on-copy")] == ["dora 2 dpo", "full", "ia3"]


def test_what_is_not_finished_and_what_is_no_run_are_told(place: Path) -> None:
    found = views(place)
    assert found["killed"].status == "not finished"
    assert found["refused"].status == "failed"
    assert "rows cannot be used" in str(found["refused"].problem)
    assert (found["notes"].status, found["notes"].version) == ("no run", None)


def test_damage_is_told_and_hides_no_other_run(place: Path, tmp_path: Path) -> None:
    whole = place / "runs" / "zulu"
    for name in ("manifest", "spec", "events", "result", "weights", "gone"):
        copytree(whole, tmp_path / name)
    manifest = tmp_path / "manifest" / "manifest.json"
    manifest.write_text(
        manifest.read_text(encoding="utf-8").replace('"succeeded"', '"x"').replace('"run"', '"nur"'), encoding="utf-8"
    )
    (tmp_path / "spec" / "resolved.yaml").write_text("version: [", encoding="utf-8")
    (tmp_path / "events" / "events.jsonl").write_bytes(b"\xff\n")
    (tmp_path / "result" / "result.json").write_text("{", encoding="utf-8")
    (tmp_path / "weights" / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "gone" / "adapter" / "README.md").unlink()
    found = {view.name: view for view in view_runs([tmp_path])}
    damaged = {name for name, view in found.items() if view.status == "damaged"}
    assert damaged == {"manifest", "spec", "result", "weights", "gone"}
    assert all(found[name].problem for name in damaged)
    assert found["events"].status == "succeeded"  # the result stands; of the record only the time is not known
    (tmp_path / "weights" / "manifest.json").write_text("[]", encoding="utf-8")
    assert view_run(tmp_path / "weights").status == "damaged"


def test_a_run_folder_may_be_given_itself_and_a_missing_one_is_refused(place: Path, tmp_path: Path) -> None:
    assert [view.name for view in view_runs([place / "runs" / "full", place / "runs" / "full"])] == ["full"]
    with pytest.raises(RunFolderError, match="not a folder"):
        view_runs([tmp_path / "missing"])


def test_the_command_shows_a_table_or_json_and_loads_no_torch(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(place)
    assert command(["models"]) == 0
    out, err = capsys.readouterr()
    row = next(line for line in out.splitlines() if line.startswith("alpha"))
    assert "zulu" in row
    assert "→" in row
    assert "runs/notes: no run" in err
    program = (
        "import sys; from kivnun.cli.main import run; status = run(['models', '--json']); "
        "sys.exit(status or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert [view["name"] for view in json.loads(done.stdout)["models"]][1:3] == ["zulu", "alpha"]
    monkeypatch.chdir(tmp_path)
    assert command(["models"]) == 0
    assert "no runs here" in capsys.readouterr().err
