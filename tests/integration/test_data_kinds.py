"""Runs on data that is no JSONL: the same rows are the same run whatever file they are in, and every command takes the files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from kivnun.cli.main import run
from kivnun.data.loader import load_dataset
from kivnun.data.template import load_tokenizer
from kivnun.opened import open_run
from kivnun.spec import DataSpec, load_spec
from runs import SHORT
from tiny_task import HEBREW, WORDS

ROWS = [{"id": number, "word": WORDS[number % 8], "name": HEBREW[number % 2]} for number in range(24)]


def write_all(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Write the rows as every kind of file; return the names."""
    import datasets

    datasets.disable_progress_bars()
    plain = [{key: row[key] for key in ("word", "name")} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain), encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps({"data": plain}), encoding="utf-8")
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "rows"))
    return ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows"]


def test_the_same_rows_are_the_same_data_set_whatever_file_they_are_in(base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base)
    hashes: set[str] = set()
    for name in write_all(tmp_path, ROWS):
        spec = DataSpec.model_validate(
            {
                "train": str(tmp_path / name),
                "columns": {"text": "word", "label": "name"},
                "instruction": "Name:",
                "validation": 0.25,
            }
        )
        dataset = load_dataset(spec, tokenizer, 0, 128)
        assert dataset.format == "classification"
        hashes.add(dataset.content_hash)
    assert len(hashes) == 1


@pytest.fixture(scope="module")
def spec(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_all(folder, ROWS)
    data = {
        "train": ["rows.csv", "rows.parquet"],
        "validation": "rows",
        "columns": {"text": "word", "label": "name"},
        "instruction": "Which name?",
    }
    metrics = {"metrics": ["macro_f1"], "samples": 0, "bootstrap": 100}
    path = folder / "words.yaml"
    path.write_text(yaml.safe_dump({**SHORT, "base": str(base), "data": data, "evaluation": metrics}), encoding="utf-8")
    return path


def test_a_run_on_tables_is_tuned_scored_and_reads_its_own_spec(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = spec.parent / "run"
    assert run(["tune", str(spec), "--output", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["status"] == "succeeded"
    assert 0 <= result["tuned"]["macro_f1"] <= 1
    resolved = load_spec(folder / "resolved.yaml")
    assert (resolved.data.format, resolved.data.columns) == ("classification", {"text": "word", "label": "name"})
    assert open_run(folder).spec == resolved
    assert run(["tune", str(spec), "--output", str(folder), "--resume", "--json"]) == 0
    asked = ["chat", str(folder), "--once", "Which name? one", "--system", "Be short.", "--max-new-tokens", "2", "--json"]
    assert run(asked) == 0, "what was tuned on labels is asked in the template, as a chat"
    assert open_run(folder).trained_on_chats, "and served so"


@pytest.mark.parametrize("name", ["rows.csv", "rows"])
def test_a_technique_is_advised_for_rows_in_any_file(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_all(tmp_path, [{"id": row["id"], "text": row["word"], "label": row["name"], "word": "", "name": ""} for row in ROWS])
    given = ["advise", "--scenario", "classification", "--base", "kivnun/tiny-phi", "--train", str(tmp_path / name), "--json"]
    assert run(given) == 0
    assert json.loads(capsys.readouterr().out)["spec"]["data"]["train"] == str(tmp_path / name)
