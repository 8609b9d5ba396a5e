"""A worker killed at each point of its durable effects: nothing lost, nothing twice, the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from crash_points import Scenario, assert_survived, killed_at, new_place
from kivnun.worker.trainer import Trainers
from toy_jobs import adapter_of_quiet_run

MOST = 400


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, trainers: Trainers) -> dict[str, str]:
    return adapter_of_quiet_run(*new_place(tmp_path_factory.mktemp("undisturbed")), trainers)


def survive(folder: Path, numbers: range, scenario: Scenario, trainers: Trainers, undisturbed: dict[str, str]) -> int:
    """Kill at each of these points; return how many there were."""
    for done, number in enumerate(numbers):
        place, job_id = new_place(folder / str(number))
        if not killed_at(number, place, job_id, scenario):
            return done
        assert_survived(place, job_id, scenario, trainers, undisturbed)
    raise AssertionError("the numbers end before the points do")


def test_a_worker_killed_at_any_point_leaves_a_job_that_ends_the_same(
    tmp_path: Path, trainers: Trainers, undisturbed: dict[str, str]
) -> None:
    assert survive(tmp_path, range(2, MOST, 13), "straight", trainers, undisturbed) >= 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scenario", ["straight", "pause", "cancel"])
def test_a_worker_killed_at_every_point_leaves_a_job_that_ends_the_same(
    tmp_path: Path, trainers: Trainers, undisturbed: dict[str, str], scenario: Scenario
) -> None:
    assert survive(tmp_path, range(1, MOST), scenario, trainers, undisturbed) >= 6
