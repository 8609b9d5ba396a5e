"""The model card: made from the run alone, none of the data's content, safe in Markdown, and listed in the manifest."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import yaml

from kivnun.artifacts import check_manifest, hash_folder, write_manifest
from kivnun.evaluate.card import card_text, markdown
from kivnun.export.merge import export_run
from runs import chats, run_spec, write_spec
from tiny_task import HEBREW, make_base

ODD = "my_base [x](http:evil) | <b> `tick`"


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    evaluation = {"metrics": ["exact_match"], "max_new_tokens": 4, "samples": 2}
    run_spec(write_spec(folder, copytree(base, folder / ODD), chats(60), evaluation=evaluation), folder / "run")
    return folder / "run"


def header(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_header_is_what_a_hub_reads(run: Path) -> None:
    text = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    said = header(text)
    assert text.startswith("---\n")
    assert (said["library_name"], said["pipeline_tag"], said["tags"]) == ("peft", "text-generation", ["kivnun", "lora", "sft"])
    assert "base_model" not in said  # a folder is no id
    assert "license" not in said  # of a folder's licence nothing is known
    assert "language" not in said
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))["tuned"]
    metrics = {entry["type"]: entry for entry in said["model-index"][0]["results"][0]["metrics"]}
    assert metrics["nll"]["value"] == round(result["nll"], 6)
    low, high = result["intervals"]["nll"]
    assert metrics["nll"]["name"] == f"nll (95 % interval {low:.4g} to {high:.4g})"
    assert "exact_match" in metrics


def test_the_card_tells_scores_with_intervals_and_the_verdict(run: Path) -> None:
    text = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    low, high = result["tuned"]["intervals"]["nll_difference"]
    row = next(line for line in text.splitlines() if line.startswith("| nll |"))
    assert row.endswith(f"| [{low:.4g}, {high:.4g}] | {result['tuned']['verdicts']['nll']} |")
    assert f"{result['base']['nll']:.4g} [" in row
    assert (run / "report.html").read_text(encoding="utf-8").count("Better") >= text.count("**Better") > 0


def test_the_card_holds_no_content_of_the_data_and_no_folder_of_the_machine(run: Path) -> None:
    text = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert not any(word in text for word in HEBREW)
    assert str(run.parent) not in text
    assert "train.jsonl" in text
    assert "| training rows | 48 |" in text


def test_names_are_escaped(run: Path) -> None:
    text = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    title = next(line for line in text.splitlines() if line.startswith("# "))
    assert title == r"# LoRA adapter for my\_base \[x\](http:evil) \| \<b\> \`tick\`"
    assert header(text)["model-index"][0]["name"] == f"LoRA adapter for {ODD}"
    assert markdown("a\n# b") == r"a \# b"
    assert "````" not in text  # a fence longer than needed would be odd
    assert text.count("```") % 2 == 0


def test_the_manifest_lists_the_card_and_equal_runs_have_equal_cards(run: Path, tmp_path: Path) -> None:
    assert "adapter/README.md" in check_manifest(run)["files"]
    again = tmp_path / "another-name"
    run_spec(run.parent / "spec.yaml", again, "checkpoints.every_steps=3")
    assert hash_folder(again / "adapter") == hash_folder(run / "adapter")


def test_every_export_has_a_card(run: Path, base: Path, tmp_path: Path) -> None:
    export_run(run, "peft", tmp_path / "peft")
    assert (tmp_path / "peft" / "README.md").read_bytes() == (run / "adapter" / "README.md").read_bytes()
    export_run(run, "merged", tmp_path / "merged")
    merged = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert header(merged)["library_name"] == "transformers"
    assert header(merged)["tags"] == ["kivnun", "lora", "sft", "merged"]
    run_spec(write_spec(tmp_path, base, chats(20), adapter={"kind": "full"}), tmp_path / "full")
    export_run(tmp_path / "full", "merged", tmp_path / "model")
    full = (tmp_path / "model" / "README.md").read_bytes()
    assert full == (tmp_path / "full" / "model" / "README.md").read_bytes()
    assert header(full.decode())["library_name"] == "transformers"


def test_a_run_without_a_card_gets_one_on_export(run: Path, tmp_path: Path) -> None:
    old = copytree(run, tmp_path / "run")
    (old / "adapter" / "README.md").unlink()
    manifest = json.loads((old / "manifest.json").read_text(encoding="utf-8"))
    kept = [name for name in manifest["files"] if name != "adapter/README.md"]
    write_manifest(old, {name: value for name, value in manifest.items() if name not in ("files", "digest")}, kept)
    export_run(old, "peft", tmp_path / "peft")
    assert header((tmp_path / "peft" / "README.md").read_text(encoding="utf-8"))["library_name"] == "peft"


def test_the_licence_is_told_of_a_base_that_is_known_by_name(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    run_spec(write_spec(tmp_path, base, chats(20)), tmp_path / "run")
    resolved = tmp_path / "run" / "resolved.yaml"
    resolved.write_text(resolved.read_text(encoding="utf-8").replace(str(base), "kivnun/tiny-phi"), encoding="utf-8")
    said = header(card_text(tmp_path / "run", "adapter"))
    assert (said["base_model"], said["license"]) == ("kivnun/tiny-phi", "apache-2.0")
