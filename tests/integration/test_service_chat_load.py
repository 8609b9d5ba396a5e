"""A load of chats with stubbed compute: all are answered, and what the service itself takes is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from answer_parts import place_with, worker_process
from benchmarks.service_chat import measure, quantile
from kivnun.jobs.config import Limits
from service_parts import KEY, api, service_at

pytestmark = pytest.mark.slow


def test_many_chats_at_once_are_all_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = place_with(tmp_path, "version: 1\nbases: {toy: {trainer: toy}}\n")
    wide = Limits(requests_per_minute=1_000_000, tokens_per_minute=1_000_000_000, answers_at_once=1000)
    service = service_at(place, place.service_config().model_copy(update={"limits": wide}))
    with worker_process(place, "toy", token_s=0.01), api(service) as url:
        measure(f"{url}/v1", KEY, "toy", 4, 8)
        times = measure(f"{url}/v1", KEY, "toy", 32, 400)
    with capsys.disabled():
        print("\nchats on a toy base of 10 ms a token, 32 tokens each, 32 at once:", *times.lines(), sep="\n  ")
    assert len(times.whole_s) == 400
    assert quantile(times.whole_s, 0.99) < 20
