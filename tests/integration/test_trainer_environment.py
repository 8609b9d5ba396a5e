"""What a trainer's process knows of its worker's environment: what computes, and no secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from kivnun.artifacts import _SWITCHES  # pyright: ignore[reportPrivateUsage]
from kivnun.jobs.toy import ToySpec
from kivnun.worker.trainer import environment_of_trainers
from toy_jobs import parent_of, queue_job, toy_place, trainer_of, until, worker_thread

SECRET = "canary-3f9a"
SECRETS = {
    "KIVNUN_DB": f"postgresql://kivnun:{SECRET}@db.internal/kivnun",
    "KIVNUN_STORE": f"s3://bucket/prefix?endpoint=https://{SECRET}",
    "KIVNUN_ADMIN_KEY": SECRET,
    "KIVNUN_API_KEY": SECRET,
    "AWS_ACCESS_KEY_ID": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": SECRET,
    "PGPASSWORD": SECRET,
    "NVIDIA_API_KEY": SECRET,
    "WANDB_API_KEY": SECRET,
    "A_NAME_THAT_NOBODY_FORESAW": SECRET,
}
NEEDED = {"HF_TOKEN": "hub", "HF_HOME": "cache", "https_proxy": "proxy", "NO_PROXY": "none", "OMP_NUM_THREADS": "1", "LC_ALL": "C"}


def test_a_trainer_at_work_and_the_process_it_comes_from_hold_no_secret_of_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (SECRETS | NEEDED).items():
        monkeypatch.setenv(name, value)
    place = toy_place(tmp_path / "place")
    job_id = queue_job(place, spec=ToySpec(seed=1, epochs=1, batch_rows=4, step_ms=400.0))
    with worker_thread(place):
        trainer = until(lambda: trainer_of(job_id))
        environs = [Path(f"/proc/{pid}/environ").read_bytes().decode() for pid in (trainer, parent_of(trainer))]
    for environ in environs:
        found = dict(pair.split("=", 1) for pair in environ.split("\0") if pair)
        assert SECRET not in environ
        assert found.items() >= NEEDED.items()


def test_whatever_decides_the_last_bit_reaches_a_trainer() -> None:
    """Else a run would be compared with another environment than that which its owner set."""
    worker = dict.fromkeys(_SWITCHES, "1")
    assert environment_of_trainers(worker | SECRETS) == worker
