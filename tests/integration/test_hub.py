"""Bases by their hub ids, from a hub on this machine: what is fetched, what a cut costs, what is refused and how it is told."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from hub import COMMIT, Hub, git_hash, sha256
from kivnun.artifacts import read_manifest
from kivnun.cli.main import run
from kivnun.errors import BaseModelError, IntegrityError, KivnunError, StorageError
from kivnun.model import hub as fetching
from kivnun.model.families import base_hash, find_base
from kivnun.model.hub import commit_of
from runs import chats, run_spec, write_spec

NAME = "acme/tiny"
BESIDE = {
    "README.md": b"# a model", "LICENSE": b"MIT", "pytorch_model.bin": b"pickle" * 2000, "model.onnx": b"onnx" * 2000,
    "tiny.gguf": b"gguf" * 2000, "consolidated.safetensors": b"twice" * 2000, "onnx/config.json": b"{}",
    "original/params.json": b"{}",
}  # fmt: skip


@pytest.fixture(scope="module")
def sharded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny base with its weights in three files and an index."""
    folder = tmp_path_factory.mktemp("sharded")
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja"):
            (folder / file.name).write_bytes(file.read_bytes())
    tensors, index = load_file(base / "model.safetensors"), {}
    for number in range(3):
        part = dict(sorted(tensors.items())[number::3])
        name = f"model-{number + 1:05}-of-00003.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")
    return folder


@pytest.fixture
def hub(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Return a hub that holds the sharded base among files of other kinds, and is the one that this process asks."""
    with Hub() as hub:
        hub.put(NAME, sharded, BESIDE)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(fetching, "WAITS_S", (0.0, 0.0, 0.0))
        yield hub


@pytest.fixture
def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what sets HF_HUB_OFFLINE."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def refused(kind: type[KivnunError], *words: str, model: str = NAME, revision: str | None = None) -> KivnunError:
    with pytest.raises(kind) as caught:
        find_base(model, revision)
    for word in words:
        assert word in str(caught.value)
    return caught.value


# --- what is fetched ---------------------------------------------------------------------------------------------------------


def test_only_what_a_base_is_made_of_is_fetched(hub: Hub, sharded: Path) -> None:
    folder = find_base(NAME)
    assert {file.name for file in folder.iterdir()} == {file.name for file in sharded.iterdir()} | {"LICENSE"}
    assert hub.fetched() == {file.name for file in sharded.iterdir()} | {"LICENSE"}
    for file in sharded.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_a_branch_is_resolved_to_a_commit_and_a_commit_asks_nobody_again(hub: Hub) -> None:
    hub.repositories[NAME].branches = ("main", "v2")
    folder = find_base(NAME, "v2")
    assert commit_of(folder) == COMMIT
    hub.requests.clear()
    assert find_base(NAME, COMMIT) == folder
    assert hub.requests == []
    assert find_base(NAME, "main") == folder
    assert hub.fetched() == set(), "a branch is asked for, and nothing is fetched twice"


def test_progress_counts_the_bytes_of_the_weights(hub: Hub, sharded: Path) -> None:
    told: list[tuple[str, int, int]] = []
    find_base(NAME, on_bytes=lambda *given: told.append(given))
    total = sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    assert told[-1] == (NAME, total, total)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_run_from_a_hub_id_records_the_commit_and_the_hash(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, NAME, chats(12), data={"validation": None}, schedule={"epochs": 1})
    run_spec(spec, tmp_path / "run")
    said = read_manifest(tmp_path / "run")["base"]
    assert said == {"model": NAME, "revision": "main", "commit": COMMIT, "content_hash": base_hash(sharded)}


# --- cut, killed, damaged ----------------------------------------------------------------------------------------------------

WEIGHTS = "model-00001-of-00003.safetensors"


def test_a_download_that_is_cut_goes_on_from_where_it_was(hub: Hub, sharded: Path) -> None:
    hub.cuts[WEIGHTS] = [5000, 3000]
    folder = find_base(NAME)
    assert hub.got(WEIGHTS) == [None, "bytes=5000-", "bytes=8000-"]
    assert (folder / WEIGHTS).read_bytes() == (sharded / WEIGHTS).read_bytes()


def test_a_download_that_keeps_being_cut_is_gone_on_with_by_the_next_command(hub: Hub, sharded: Path) -> None:
    hub.cuts[WEIGHTS] = [5000, 0, 0, 0, 0]
    refused(BaseModelError, f"5,000 of {(sharded / WEIGHTS).stat().st_size:,} bytes of {WEIGHTS} came", "goes on from there")
    hub.cuts.clear()
    hub.requests.clear()
    folder = find_base(NAME)
    assert hub.got(WEIGHTS) == ["bytes=5000-"]
    assert (folder / WEIGHTS).read_bytes() == (sharded / WEIGHTS).read_bytes()
    assert not list(folder.parent.parent.glob("blobs/*.part"))


def test_a_killed_download_is_gone_on_with_by_another_process(hub: Hub, sharded: Path) -> None:
    hub.stall_at[WEIGHTS] = 5000
    program = f"from kivnun.model.families import find_base; find_base({NAME!r})"
    paths = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, **paths})
    assert hub.stalled.wait(60)
    part = Path(constants.HF_HUB_CACHE) / "models--acme--tiny" / "blobs" / f"{sha256((sharded / WEIGHTS).read_bytes())}.part"
    while part.stat().st_size == 0:
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    have = part.stat().st_size
    assert 0 < have <= 5000
    hub.requests.clear()
    folder = find_base(NAME)
    assert hub.got(WEIGHTS) == [f"bytes={have}-"]
    assert (folder / WEIGHTS).read_bytes() == (sharded / WEIGHTS).read_bytes()


def test_weights_of_other_bytes_than_the_hub_says_are_refused_and_fetched_anew(hub: Hub) -> None:
    whole = hub.repositories[NAME].files[WEIGHTS]
    hub.sends[WEIGHTS] = other = bytes([whole[0] ^ 1]) + whole[1:]
    refused(IntegrityError, f"{WEIGHTS} is not what the hub holds", sha256(whole), sha256(other), "fetched anew")
    hub.sends.clear()
    assert (find_base(NAME) / WEIGHTS).read_bytes() == whole


def test_a_small_file_of_other_bytes_is_refused_with_both_hashes(hub: Hub) -> None:
    whole = hub.repositories[NAME].files["config.json"]
    hub.sends["config.json"] = other = whole.replace(b'"', b"'", 1)
    refused(IntegrityError, "config.json is not what the hub holds", git_hash(whole), git_hash(other))


def test_weights_longer_or_shorter_than_said_are_refused(hub: Hub) -> None:
    whole = hub.repositories[NAME].files[WEIGHTS]
    hub.sends[WEIGHTS] = whole[:-9]
    refused(BaseModelError, f"{len(whole) - 9:,} of {len(whole):,} bytes")
    hub.sends[WEIGHTS] = whole + b"more"
    assert (find_base(NAME) / WEIGHTS).read_bytes() == whole, "what is beyond the file's length is left out"


def test_a_file_that_changed_in_the_cache_is_refused_when_the_base_is_loaded(hub: Hub, tmp_path: Path) -> None:
    folder = find_base(NAME)
    blob = (folder / WEIGHTS).resolve()
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    spec = write_spec(tmp_path, NAME, chats(12), data={"validation": None}, schedule={"epochs": 1})
    with pytest.raises(IntegrityError, match=f"{WEIGHTS} is not what the hub holds") as caught:
        run_spec(spec, tmp_path / "run")
    assert f"remove {blob}" in str(caught.value)


def test_a_disk_that_is_too_small_is_told_before_weights_are_fetched(
    hub: Hub, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, weights - 1))
    refused(StorageError, "GB on the disk of", "HF_HOME")
    assert not {name for name in hub.fetched() if name.endswith(".safetensors")}


# --- pinned ------------------------------------------------------------------------------------------------------------------


def test_a_pinned_hash_is_kept_and_another_base_is_refused_with_both(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    right = base_hash(sharded)
    pinned = {"model": NAME, "revision": COMMIT, "content_hash": right}
    spec = write_spec(tmp_path, NAME, chats(12), base=pinned, data={"validation": None}, schedule={"epochs": 1})
    assert run_spec(spec, tmp_path / "run")["status"] == "succeeded"
    with pytest.raises(IntegrityError, match=r"not the one that base\.content_hash names") as caught:
        run_spec(spec, tmp_path / "other", f"base.content_hash={'a' * 64}")
    assert right in str(caught.value)
    assert "a" * 64 in str(caught.value)


def test_what_another_program_lays_beside_a_base_changes_no_hash(hub: Hub, sharded: Path) -> None:
    folder = find_base(NAME)
    before = base_hash(folder)
    (folder / "README.md").write_text("read by somebody", encoding="utf-8")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"onnx")
    assert base_hash(folder) == before == base_hash(sharded)


def test_a_branch_that_moved_gives_another_base_and_a_resumed_run_is_refused(hub: Hub, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, NAME, chats(12), data={"validation": None}, schedule={"epochs": 1})
    stop = {"count": 0}

    class Stop(Exception):
        pass

    def listener(event: object) -> None:
        if type(event).__name__ == "StepDone":
            stop["count"] += 1
            raise Stop

    with pytest.raises(Stop):
        run_spec(spec, tmp_path / "run", listener=listener)
    moved = hub.repositories[NAME]
    moved.commit = "d" * 40
    config = json.loads(moved.files["config.json"])
    moved.files["config.json"] = json.dumps({**config, "rms_norm_eps": 1e-4}).encode()
    with pytest.raises(KivnunError, match="base's weights or configuration changed"):
        run_spec(spec, tmp_path / "run", resume=True)


# --- offline and unreachable -------------------------------------------------------------------------------------------------


def test_offline_the_cache_serves_and_nobody_is_asked(hub: Hub, offline: Callable[[], None]) -> None:
    folder = find_base(NAME)
    offline()
    hub.requests.clear()
    assert find_base(NAME) == find_base(NAME, "main") == find_base(NAME, COMMIT) == folder
    assert hub.requests == []


def test_offline_what_is_not_here_is_told_so(hub: Hub, offline: Callable[[], None]) -> None:
    offline()
    refused(BaseModelError, "is not on this machine, and HF_HUB_OFFLINE is set", "fetch it once")


def test_offline_a_base_that_is_here_in_part_is_refused_with_what_lacks(hub: Hub, offline: Callable[[], None]) -> None:
    hub.cuts[WEIGHTS] = [5000, 0, 0, 0, 0]
    refused(BaseModelError, "goes on from there")
    offline()
    refused(BaseModelError, "is here in part", WEIGHTS)


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_cannot_answer_now_leaves_the_cache_and_a_warning(
    hub: Hub, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    hub.status = status
    refused(BaseModelError, f"it answered {status}", "is not on this machine")
    hub.status = None
    folder = find_base(NAME)
    hub.status = status
    with caplog.at_level(logging.WARNING):
        assert find_base(NAME) == folder
    (said,) = [record.getMessage() for record in caplog.records if record.name == "kivnun.hub"]
    assert f"it answered {status}" in said
    assert COMMIT in said


def test_nobody_at_the_hubs_address_is_told_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(BaseModelError, "the hub cannot be reached (ConnectError)", "give a folder")


# --- refused -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403])
def test_a_model_behind_a_licence_says_what_to_do(hub: Hub, status: int) -> None:
    hub.repositories[NAME].refusal = (status, "GatedRepo")
    refused(BaseModelError, "behind a licence", f"accept it at https://huggingface.co/{NAME}", "hf auth login", "HF_TOKEN")


def test_a_token_that_may_not_is_told_so(hub: Hub) -> None:
    hub.repositories[NAME].refusal = (403, "")
    refused(BaseModelError, f"the hub refuses {NAME}: it answered 403", "HF_TOKEN")


def test_an_unknown_id_names_the_nearest_known_one(hub: Hub) -> None:
    refused(
        BaseModelError, "there is no model", "did you mean microsoft/Phi-4-mini-instruct?", model="microsoft/Phi-4-mini-instuct"
    )
    assert "did you mean" not in str(refused(BaseModelError, "there is no model", model="acme/unheard-of"))


def test_an_unknown_revision_is_told_so(hub: Hub) -> None:
    refused(BaseModelError, f"{NAME} has no revision 'v9'", revision="v9")


def test_weights_in_other_formats_alone_are_refused_with_the_way_out(hub: Hub, sharded: Path) -> None:
    files = hub.repositories[NAME].files
    for name in [name for name in files if "safetensors" in name]:
        del files[name]
    refused(BaseModelError, "holds no .safetensors weights, only .bin, .gguf, .onnx", "save_pretrained")
    assert not {name for name in hub.fetched() if name.endswith((".bin", ".gguf", ".onnx"))}


def test_an_index_that_names_what_is_not_there_is_refused(hub: Hub) -> None:
    del hub.repositories[NAME].files[WEIGHTS]
    refused(BaseModelError, "names weights that it does not hold", WEIGHTS)


@pytest.mark.parametrize("model", ["microsoft/Phi-3-small-8k-instruct", "MICROSOFT/phi-3-small-128k-instruct"])
def test_phi_3_small_is_refused_by_its_id_without_asking(hub: Hub, model: str) -> None:
    refused(BaseModelError, "block-sparse", "use Phi-3-mini", model=model)
    assert hub.requests == []


def test_a_copy_of_phi_3_small_is_refused_before_its_weights_are_fetched(hub: Hub) -> None:
    hub.repositories[NAME].files["config.json"] = b'{"model_type": "phi3small", "auto_map": {}}'
    refused(BaseModelError, "block-sparse")
    assert not {name for name in hub.fetched() if name.endswith(".safetensors")}


def test_a_model_is_told_of_by_its_configuration_alone(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bases", NAME, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model_class"], facts["fast"], facts["content_hash"]) == ("Phi3ForCausalLM", True, None)
    assert hub.fetched() == {"config.json"}
    assert run(["bases", "acme/nothing"]) == 4
    assert "there is no model 'acme/nothing'" in capsys.readouterr().err


def test_a_commit_whose_weights_alone_are_here_is_fetched_whole(hub: Hub) -> None:
    folder = find_base(NAME, COMMIT)
    (folder / "tokenizer.json").unlink()
    assert (find_base(NAME, COMMIT) / "tokenizer.json").is_file()


TERMINAL = """
    import os, pty, sys
    program = "from kivnun.cli.fetch import fetch_base; fetch_base(sys.argv[1], None)"
    status = pty.spawn([sys.executable, "-c", f"import sys; {program}", *sys.argv[1:]])
    sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_download_is_shown_on_a_terminal(hub: Hub, tmp_path: Path) -> None:
    env = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm", "COLUMNS": "120",
    }  # fmt: skip
    command = [sys.executable, "-c", textwrap.dedent(TERMINAL), NAME]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=True)
    assert f"fetching {NAME}" in done.stdout
    assert "100%" in done.stdout
    assert "Fetching" not in done.stdout, "the hub's library draws no bars of its own"


def test_a_log_is_told_once_what_a_run_fetches(hub: Hub, sharded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = write_spec(tmp_path, NAME, chats(12), data={"validation": None}, schedule={"epochs": 1})
    assert run(["tune", str(spec), "--output", str(tmp_path / "run")]) == 0
    total = sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    said = capfd.readouterr()
    assert said.err.splitlines()[0] == f"fetching {NAME}: {total / 1e6:,.1f} MB of weights"
    assert (said.out + said.err).lower().count("fetching") == 1
