"""`kivnun serve` as real processes, killed with -9 and started again: OpenAI's and Azure's clients come to the same bits.

Here jobs are toys, which take no time; `test_serve_slow.py` does the same with a model, a hundred kills and fifty tenants.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kivnun.cli.main import run
from service_process import ADMIN_KEY, CANARY, TOY, Running, adapter_of, create, ended, examples, running, wait_until
from toy_jobs import below, is_alive

EPOCHS = 15  # of twelve steps each


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, service: Running, job_id: str) -> None:
    """Do by `kivnun jobs` and `kivnun keys` what they can, on a job that has succeeded."""
    monkeypatch.setenv("KIVNUN_URL", service.url)
    monkeypatch.setenv("KIVNUN_API_KEY", ADMIN_KEY)

    def said(*words: str, status: int = 0) -> Any:
        assert run([*words, "--json"]) == status, capsys.readouterr().err
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert [job["id"] for job in said("jobs", "list", "--limit", "1")["jobs"]] == [job_id]
    assert said("jobs", "show", job_id)["status"] == said("jobs", "watch", job_id)["status"] == "succeeded"
    events = said("jobs", "events", job_id)["events"]
    assert events[0]["message"] == f"Created fine-tuning job: {job_id}"
    assert len(events) > 12 * EPOCHS
    for kind in ("pause", "resume", "cancel"):
        assert "the service answered 400" in said("jobs", kind, job_id, status=15)["error"]["message"]
    assert "404" in said("jobs", "show", "ftjob-another", status=15)["error"]["message"]

    made = said("keys", "create", "laptop", "--scope", "read", "--days", "1")
    turned = said("keys", "rotate", made["id"])
    listed = {key["id"]: key for key in said("keys", "list")["keys"]}
    assert {made["id"], turned["id"]} < set(listed)
    assert all("key" not in key for key in listed.values())
    monkeypatch.setenv("KIVNUN_API_KEY", turned["key"])
    assert said("jobs", "list")["jobs"]
    assert "403" in said("keys", "create", "more", status=15)["error"]["message"]
    monkeypatch.setenv("KIVNUN_API_KEY", ADMIN_KEY)
    assert said("keys", "revoke", turned["id"])["revoked_at"] is not None
    for words in (["jobs", "list"], ["jobs", "show", job_id], ["jobs", "events", job_id, "--limit", "3"], ["keys", "list"]):
        assert run(words) == 0
        out = capsys.readouterr().out
        assert job_id in out or words[-1] == "3" or turned["id"] in out
    monkeypatch.setenv("KIVNUN_API_KEY", turned["key"])
    assert "401" in said("jobs", "list", status=15)["error"]["message"]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path, TOY) as found:
        yield found


def test_a_service_that_is_killed_twice_comes_to_the_bits_of_one_that_was_left_alone(
    service: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = service.openai()
    file_id = client.files.create(file=examples(tmp_path), purpose="fine-tune").id
    undisturbed = ended(client, create(client, file_id, EPOCHS))
    assert undisturbed.status == "succeeded", undisturbed.error
    expected = adapter_of(client, undisturbed.fine_tuned_model)

    job_id = create(client, file_id, EPOCHS)
    service.kill()  # as soon as the create is answered
    service.start()
    client = service.openai()
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status in ("running", "succeeded"), "it does not go on")
    service.kill()  # within its steps, or just after
    service.start()
    azure = service.azure()
    job = ended(azure, job_id)
    assert job.status == "succeeded", job.error
    assert adapter_of(azure, job.fine_tuned_model) == expected
    assert job.trained_tokens == undisturbed.trained_tokens

    events = [event.message for event in azure.fine_tuning.jobs.list_events(job_id, limit=100)]
    assert len([text for text in events if text.startswith("New fine-tuned model created")]) == 1
    steps = [text.split(":")[0] for text in events if text.startswith("Step ")]
    assert steps == [f"Step {number}/{12 * EPOCHS}" for number in range(12 * EPOCHS, 0, -1)], "no step is told twice or left out"

    assert adapter_of(azure, "cold") is None, "a base that no worker had loaded is loaded when it is asked for"
    service.part("answer", "--base", "cold")
    command(capsys, monkeypatch, service, job_id)
    assert "torch" not in Path(f"/proc/{service.part('api')}/maps").read_text(), "the API loads no model"
    words = Path(f"/proc/{service.part('api')}/cmdline").read_text().split("\0")
    assert float(words[words.index("--drain-s") + 1]) == 28 - 5, "who answers for it ends after it, and within the whole"
    parts = below(service.process.pid)
    assert service.stop() == 0
    assert not any(map(is_alive, parts))
    assert [path for path in (service.data, *service.data.rglob("*")) if path.stat().st_mode & 0o077] == []
    written = [service.log, *service.data.rglob("*.log")]
    for path in written:
        text = path.read_text(encoding="utf-8", errors="replace")
        assert CANARY not in text, path
        assert ADMIN_KEY not in text, path
    assert '"action": "request"' in service.log.read_text(encoding="utf-8")
