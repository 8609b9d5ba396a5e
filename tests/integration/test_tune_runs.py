"""A whole run in every shape the spec offers: what is in its folder, its result, its record and its adapter."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from kivnun.artifacts import check_manifest, read_manifest, write_manifest
from kivnun.errors import RunFolderError
from kivnun.events import DataLoaded, Evaluated, Warned, read_events
from kivnun.opened import open_run
from kivnun.parts import row_order
from runs import chats, numbers_of, pairs, prompted, result_hashes, run_spec, steps_of, write_rows, write_spec
from tiny_task import HEBREW, WORDS


def test_the_shortest_spec_of_the_guide_works_as_it_stands(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})  # one thread, however many cores are busy with other work
    write_rows(tmp_path / "train.jsonl", chats())
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        f"""version: 1
base: {base}
data: {{train: train.jsonl, validation: 0.2}}
adapter: {{kind: lora, rank: 8}}
schedule: {{epochs: 2, batch_rows: 8, learning_rate: 1e-3}}
seed: 7
""",
        encoding="utf-8",
    )
    run = tmp_path / "run"
    result = run_spec(spec, run)
    assert set(result) == {"run", "status", "steps", "trained_tokens", "base", "tuned", "plan", "actual"}
    assert (result["run"], result["status"], result["steps"]) == (str(run), "succeeded", 8)
    assert result["trained_tokens"] == sum(step.trained_tokens for step in steps_of(run)) > 0
    assert all(math.isfinite(result[which]["nll"]) and result[which]["rows"] == 8 for which in ("base", "tuned"))
    assert result["actual"]["peak_bytes"] > 2**20
    assert result["actual"]["seconds"] > 0
    assert json.loads((run / "result.json").read_text(encoding="utf-8")) == result
    assert (run / "spec.yaml").read_bytes() == spec.read_bytes()


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    run_spec(write_spec(folder, base, chats()), folder / "run")
    return folder / "run"


def test_the_folder_holds_what_its_page_says_and_nothing_else(done: Path) -> None:
    names = {path.name for path in done.iterdir()}
    assert names == {
        "spec.yaml", "resolved.yaml", "start.json", "manifest.json", "events.jsonl", "checkpoints", "adapter", "evaluation",
        "report.html", "report.json", "result.json",
    }  # fmt: skip
    assert sorted(path.name for path in (done / "checkpoints").iterdir()) == ["step-000008", "step-000016"]


def test_the_manifest_lists_every_file_that_no_longer_changes_with_hashes_that_hold(done: Path) -> None:
    manifest = check_manifest(done)
    listed = {name.split("/")[0] for name in manifest["files"]}
    assert listed >= {"spec.yaml", "resolved.yaml", "adapter", "evaluation", "report.html", "report.json", "result.json"}
    assert {"spec_hash", "data_hash", "base", "code_hash", "environment"} <= set(manifest)
    assert manifest["environment"]["threads"] == 1
    assert manifest["spec_hash"] == open_run(done).spec.content_hash()


def test_every_value_that_was_not_given_has_its_reason_beside_it(done: Path) -> None:
    text = (done / "resolved.yaml").read_text(encoding="utf-8")
    given = yaml.safe_load((done / "spec.yaml").read_text(encoding="utf-8"))
    assert {"rank", "epochs", "batch_rows", "learning_rate", "seed"} <= {*given["adapter"], *given["schedule"], *given}
    for line in text.splitlines():
        name, _, rest = line.strip().partition(":")
        if name in ("rank", "batch_rows", "learning_rate", "seed", "threads"):
            assert "#" not in rest, line
        elif name in ("alpha", "rslora", "warmup_share", "max_grad_norm", "beta1", "max_seq_len", "micro_batch_tokens", "keep"):
            assert len(rest.partition("#")[2].strip()) > 10, line


def test_the_same_spec_twice_gives_the_same_bytes_and_another_seed_others(base: Path, done: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, base, chats())
    run_spec(spec, tmp_path / "again")
    run_spec(spec, tmp_path / "other", "seed=8")
    assert result_hashes(tmp_path / "again") == result_hashes(done)
    assert numbers_of(tmp_path / "again") == numbers_of(done)
    assert numbers_of(tmp_path / "other") != numbers_of(done)


def test_evaluation_takes_nothing_from_training(base: Path, done: Path, tmp_path: Path) -> None:
    settings = {"every_steps": 1, "metrics": ["exact_match", "chrf"], "samples": 3, "max_new_tokens": 4}
    run_spec(write_spec(tmp_path, base, chats(), evaluation=settings), tmp_path / "run")
    scores = [e.step for e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, Evaluated) and e.which == "tuned"]
    assert scores == list(range(1, 17))
    assert result_hashes(tmp_path / "run") == result_hashes(done)
    assert numbers_of(tmp_path / "run") == numbers_of(done)


def test_micro_batches_and_checkpoints_change_no_loss(base: Path, done: Path, tmp_path: Path) -> None:
    """Another split sums in another order (1e-6); a checkpoint at every step changes nothing at all."""
    spec = write_spec(tmp_path, base, chats(), checkpoints={"every_steps": 1, "keep": 1})
    run_spec(spec, tmp_path / "kept")
    assert result_hashes(tmp_path / "kept") == result_hashes(done)
    run_spec(spec, tmp_path / "split", "compute.micro_batch_tokens=64")
    ours, theirs = ([step.loss for step in steps_of(run)] for run in (tmp_path / "split", done))
    np.testing.assert_allclose(ours[:4], theirs[:4], rtol=1e-5)


# --- rows ---


def test_a_run_tells_of_prompts_that_could_be_shared_and_sharing_changes_no_loss(base: Path, tmp_path: Path) -> None:
    losses, told = {}, {}
    for name, share, dropout in (("apart", False, 0.0), ("shared", True, 0.0), ("dropped", False, 0.1)):
        compute, adapter = {"share_prefixes": share}, {"kind": "lora", "rank": 4, "dropout": dropout}
        spec = write_spec(tmp_path / name, base, prompted(chats()), compute=compute, adapter=adapter)
        run_spec(spec, tmp_path / name / "run")
        events = read_events(tmp_path / name / "run" / "events.jsonl")
        told[name] = [event.message for event in events if isinstance(event, Warned) and "share_prefixes" in event.message]
        losses[name] = [step.loss for step in steps_of(tmp_path / name / "run")[:4]]
    assert len(told["apart"]) == 1
    assert told["shared"] == told["dropped"] == []
    assert losses["shared"] == pytest.approx(losses["apart"], rel=1e-5)
    assert all(step.computed_tokens < step.tokens for step in steps_of(tmp_path / "shared" / "run"))


def test_text_is_pretraining_of_every_token_and_one_eos(base: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{WORDS[number % 8]} {number} " * (1 + number % 4)} for number in range(20)]
    result = run_spec(write_spec(tmp_path, base, rows), tmp_path / "run")
    opened = open_run(tmp_path / "run")
    assert opened.spec.objective is not None
    assert opened.spec.objective.kind == "pretraining"
    for row in opened.dataset.train.rows:
        assert row.ids[-1] == opened.tokenizer.eos_id  # type: ignore[union-attr]
        assert row.weights[1:].all()  # type: ignore[union-attr]
    assert result["tuned"]["nll"] < result["base"]["nll"]


def test_prompts_and_completions_train(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{WORDS[number % 8]}:", "completion": f" {HEBREW[number % 8]}"} for number in range(24)]
    result = run_spec(write_spec(tmp_path, base, rows), tmp_path / "run")
    assert result["tuned"]["nll"] < result["base"]["nll"]


def test_preferences_begin_at_ln_2_and_the_reference_is_the_start(base: Path, tmp_path: Path) -> None:
    for kind in ("lora", "full"):
        adapter = {"kind": "lora", "rank": 4} if kind == "lora" else {"kind": "full"}
        spec = write_spec(tmp_path / kind, base, pairs(), adapter=adapter, schedule={"epochs": 6, "learning_rate": 0.001})
        result = run_spec(spec, tmp_path / kind / "run")
        losses = [step.loss for step in steps_of(tmp_path / kind / "run")]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6), kind
        assert np.mean(losses[-4:]) < math.log(2) - 0.01, kind
        assert result["status"] == "succeeded"


def test_no_held_out_rows_give_a_result_without_scores(base: Path, tmp_path: Path) -> None:
    result = run_spec(write_spec(tmp_path, base, chats(12), data={"validation": None}), tmp_path / "run")
    assert (result["base"], result["tuned"]) == (None, None)
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert not any(isinstance(event, Evaluated) for event in events)
    assert [event.train_rows for event in events if isinstance(event, DataLoaded)] == [12]
    assert (tmp_path / "run" / "report.html").is_file()
    check_manifest(tmp_path / "run")


def test_held_out_rows_of_their_own_file(base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "held.jsonl", chats(7))
    result = run_spec(write_spec(tmp_path, base, chats(12), data={"validation": "held.jsonl"}), tmp_path / "run")
    assert result["tuned"]["rows"] == 7
    assert [e.train_rows for e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, DataLoaded)] == [12]


def test_files_with_shares_are_drawn_in_their_proportion(base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", chats(8))
    train = [{"path": "train.jsonl", "share": 3}, {"path": "b.jsonl", "share": 1}]
    spec = write_spec(tmp_path, base, chats(32), data={"train": train, "validation": None}, schedule={"epochs": 1})
    run_spec(spec, tmp_path / "run")
    opened = open_run(tmp_path / "run")
    order = row_order(opened.spec, opened.dataset)
    drawn = np.concatenate([order.rows_of(step) for step in range(1, order.steps + 1)])
    assert (len(drawn), int((drawn >= 32).sum())) == (40, 10)
    assert sum(step.rows for step in steps_of(tmp_path / "run")) == 40


def test_batches_by_tokens_never_exceed_them_and_lose_no_row(base: Path, tmp_path: Path) -> None:
    schedule = {"batch_rows": None, "batch_tokens": 120, "epochs": 2}
    run_spec(write_spec(tmp_path, base, chats(), schedule=schedule), tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    assert all(step.tokens <= 120 or step.rows == 1 for step in steps)
    assert sum(step.rows for step in steps) == 2 * 32


def test_a_number_of_steps_ends_in_the_middle_of_an_epoch(base: Path, tmp_path: Path) -> None:
    run_spec(write_spec(tmp_path, base, chats(), schedule={"epochs": None, "steps": 11}), tmp_path / "run")
    assert [(step.step, step.epoch) for step in steps_of(tmp_path / "run")] == [(n, (n - 1) // 8) for n in range(1, 12)]


# --- what is trained ---


def test_every_row_trains_something_its_end_is_trained_and_weight_0_replies_are_not(base: Path, tmp_path: Path) -> None:
    """The base's pad is its end token: what masks pads must not mask the end."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "אחת", "weight": 0},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "שתיים", "weight": 1},
    ]
    run = tmp_path / "run"
    run_spec(write_spec(tmp_path, base, [{"messages": turns}] * 3 + chats(21)), run)
    opened = open_run(run)
    rows = [row for row in opened.dataset.train.rows if len(row.ids)]  # type: ignore[union-attr]
    assert rows
    for row in rows:
        trained = row.ids[row.weights > 0].tolist()  # type: ignore[union-attr]
        text = opened.tokenizer.decode(trained)
        assert text.endswith("<|end|>")
        assert text.count("<|end|>") == 1
        assert "אחת<|end|>שתיים" not in text
    assert sum(step.trained_tokens for step in steps_of(run)) == 2 * sum(int((row.weights > 0).sum()) for row in rows)  # type: ignore[union-attr]
    assert config["eos_token_id"] is not None


def test_dora_moves_its_magnitudes_and_keeps_them_in_float32(base: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, base, chats(), base={"model": str(base), "precision": "bf16"}, adapter={"kind": "dora", "rank": 2})
    run_spec(spec, tmp_path / "run", "schedule.steps=1", "schedule.epochs=null", "schedule.learning_rate=1e-12")
    run_spec(spec, tmp_path / "moved")
    start, end = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "moved"))
    magnitudes = [name for name in end if name.endswith("magnitude_vector")]
    assert len(magnitudes) == len(end) // 3
    for name in magnitudes:
        assert end[name].dtype == np.float32
        assert np.abs(end[name] - start[name]).max() > 1e-4


# --- the folder of a run that is there ---


def test_a_run_that_is_there_is_refused_and_with_resume_a_finished_one_gives_its_result(base: Path, done: Path) -> None:
    spec = done.parent / "spec.yaml"
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    with pytest.raises(RunFolderError, match="exists already"):
        run_spec(spec, done)
    assert run_spec(spec, done, resume=True) == json.loads((done / "result.json").read_text(encoding="utf-8"))
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before


def test_a_run_without_its_last_manifest_is_not_finished_and_resuming_writes_it(base: Path, tmp_path: Path) -> None:
    """As after a kill while the manifest that lists report and result was being written."""
    spec = write_spec(tmp_path, base, chats())
    run_spec(spec, tmp_path / "run")
    fields = read_manifest(tmp_path / "run")
    whole = set(fields.pop("files"))
    kept = {name.partition("/")[0] for name in whole} - {"report.html", "report.json", "result.json"}
    write_manifest(tmp_path / "run", fields, sorted(kept))
    (tmp_path / "run" / ".tmp-manifest.json-0123abcd").write_text("{", encoding="utf-8")
    run_spec(spec, tmp_path / "run", resume=True)
    assert set(check_manifest(tmp_path / "run")["files"]) == whole
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_a_finished_run_is_not_given_as_the_result_of_another_spec(done: Path) -> None:
    with pytest.raises(RunFolderError, match=r"schedule\.epochs was 2, is 3"):
        run_spec(done.parent / "spec.yaml", done, "schedule.epochs=3", resume=True)
