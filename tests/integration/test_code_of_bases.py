"""A base that brings code along, in Python or in pickled weights: it is refused on every way in, and the code is never run."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from answer_parts import place_with
from kivnun.errors import BaseModelError
from kivnun.jobs.config import ServiceConfig
from kivnun.model.families import find_texts
from kivnun.model.load import load_base
from kivnun.plan.bases import base_files
from kivnun.serve.adapters import AdapterFolders
from kivnun.serve.resident import load_resident
from kivnun.service.validating import ValidateJobs
from kivnun.worker.trainer import Trainers
from service_jobs import conversations, openai_client, refusal, uploaded
from service_parts import KEY, api, service_at

OWN_CODE = {
    "AutoConfig": "modeling_x.XConfig",
    "AutoModelForCausalLM": "modeling_x.XModel",
    "AutoTokenizer": "modeling_x.XTokenizer",
}
SPEC = {
    "version": 1, "data": {"train": "training.jsonl", "format": "messages"}, "adapter": {"kind": "lora", "rank": 4},
    "schedule": {"epochs": 1, "batch_rows": 4}, "compute": {"kind": "local", "device": "cpu", "threads": 1},
}  # fmt: skip


class _Runs:
    """What writes a marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> object:
        return exec, (f"open({str(self._marker)!r}, 'w').close()",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Return the file that tells that code of a base was run."""
    return tmp_path / "code-was-run"


def with_code(base: Path, folder: Path, marker: Path, kind: str) -> Path:
    """Return a copy of a base whose configuration names code of its own, which lies beside it."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": OWN_CODE}))
    (folder / "modeling_x.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass XConfig: ...\nclass XModel: ...\n")
    return folder


def pickled(base: Path, folder: Path, marker: Path) -> Path:
    """Return a copy of a base whose weights are a pickle alone."""
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs(marker)))
    return folder


@pytest.fixture(params=["unknown kind", "kind without a language model", "pickle"])
def hostile(request: pytest.FixtureRequest, base: Path, tmp_path: Path, marker: Path) -> tuple[Path, str]:
    """Return a base's folder, and what is said of it."""
    folder = tmp_path / "hostile"
    if request.param == "pickle":
        return pickled(base, folder, marker), "holds no .safetensors weights, only .bin"
    if request.param == "unknown kind":
        return with_code(base, folder, marker, "acme_new"), "needs code of its own (model_type 'acme_new')"
    return with_code(base, folder, marker, "vit"), "contains custom code which must be executed"


def test_the_markers_would_tell(base: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(with_code(base, tmp_path / "code", marker, "acme_new")))
    __import__("modeling_x")
    assert marker.is_file()
    marker.unlink()
    sys.modules.pop("modeling_x")
    pickle.loads((pickled(base, tmp_path / "pickled", marker) / "pytorch_model.bin").read_bytes())
    assert marker.is_file()


def test_code_of_a_base_is_not_run_by_who_trains_or_answers_whatever_somebody_types(
    hostile: tuple[Path, str], marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks at a terminal whether it may run such code; nobody is asked here."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, said = hostile
    config = ServiceConfig.model_validate({"bases": {"acme": {"model": str(folder)}}})
    store = place_with(tmp_path / "place", yaml.safe_dump({"version": 1})).blobs()
    for load in (
        lambda: load_base(folder, "fp32"),
        lambda: load_resident(config, "acme", AdapterFolders(store, tmp_path / "adapters")),
    ):
        with pytest.raises(BaseModelError) as refused:
            load()
        assert said in refused.value.message
        assert not marker.exists()


def test_a_trainer_ends_with_the_refusal_and_runs_no_code_of_the_base(
    hostile: tuple[Path, str], marker: Path, tmp_path: Path
) -> None:
    folder, said = hostile
    work = tmp_path / "work"
    work.mkdir()
    (work / "training.jsonl").write_bytes(conversations(12))
    (work / "spec.yaml").write_text(yaml.safe_dump({**SPEC, "base": str(folder)}))
    trainers = Trainers(loads_torch=False)
    try:
        trainer = trainers.start("pipeline", work)
        assert trainer.ended.wait(60)
    finally:
        trainers.close()
    assert said in trainer.outcome().message
    assert not marker.exists()


@pytest.mark.parametrize("hostile", ["unknown kind", "pickle"], indirect=True)  # the third is told of when a model is made
def test_a_service_refuses_jobs_on_such_a_base_and_questions_where_it_needs_code_and_does_not_say_where_it_lies(
    hostile: tuple[Path, str], marker: Path, tmp_path: Path
) -> None:
    folder, said = hostile
    made = place_with(tmp_path / "place", yaml.safe_dump({"version": 1, "bases": {"acme": {"model": str(folder)}}}))
    service = service_at(made, made.service_config())
    with api(service) as address:
        client = openai_client(address)
        job_id = client.fine_tuning.jobs.create(model="acme", training_file=uploaded(client, conversations(12))).id
        while ValidateJobs(service).turn():
            pass
        job = client.fine_tuning.jobs.retrieve(job_id)
        if "code" in said:  # whether there are weights is for the worker to see
            asked = refusal(client.chat.completions.create, model="acme", messages=[{"role": "user", "content": "Hello"}])
            assert (asked.status_code, asked.code) == (400, "model_not_available")
        catalogue = httpx.get(f"{address}/v1/x_catalogue", headers={"api-key": KEY}).json()
    assert (job.status, job.error and job.error.code) == ("failed", "model_not_available")
    assert said in str(job.error)
    assert str(folder) not in str(job.error)
    assert [base["tunable"] for base in catalogue["data"]] == [False]
    assert not marker.exists()
    service.db.close()


def test_a_base_of_a_known_kind_is_computed_by_the_code_that_is_here_though_it_brings_its_own(
    base: Path, tmp_path: Path, marker: Path
) -> None:
    folder = with_code(base, tmp_path / "known", marker, "phi3")
    assert base_files(str(folder)).config["model_type"] == "phi3"
    assert load_base(folder, "fp32").name == load_base(base, "fp32").name
    assert find_texts(str(folder)) == folder
    assert not marker.exists()
