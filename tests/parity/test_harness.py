"""Tasks of lm-evaluation-harness give the same figures through Kivnun as through the harness's own Hugging Face backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kivnun.model.decoder import Decoder
from kivnun.model.families import BUILT_IN, longest_row
from kivnun.opened import open_base

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports

COLOURS = ["red", "blue", "green", "white", "black", "שחור"]
TASKS = ("kivnun_choice", "kivnun_text", "kivnun_reply", "kivnun_last_word")


def write_tasks(folder: Path) -> Path:
    """Write four tasks, one for each kind of request and metric, on rows of their own."""
    rows = [
        {"question": f"What follows {number}?", "choices": [str(number + step) for step in (1, 2, 7)], "answer": 0,
         "text": f"The {COLOURS[number % 6]} box holds {number} cups.\nNobody has counted them. " * (1 + number % 4)}
        for number in range(14)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    head = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "test_split": "test",
        "fewshot_split": "test",
    }  # fmt: skip
    tasks: dict[str, dict[str, Any]] = {
        "kivnun_choice": {
            "output_type": "multiple_choice", "doc_to_text": "Q: {{question}}\nA:", "doc_to_choice": "choices",
            "doc_to_target": "answer", "num_fewshot": 2,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "exact_match"}],
        },
        "kivnun_text": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "kivnun_reply": {
            "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        "kivnun_last_word": {
            "output_type": "loglikelihood", "doc_to_text": "{{text.split(' box')[0]}}", "doc_to_target": " box",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
    }  # fmt: skip
    for name, own in tasks.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **head, **own}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def ours(folder: Path, tasks: Path, **how: Any) -> Any:
    from kivnun.evaluate.harness import HarnessModel, Tasks, score_tasks

    opened = open_base(str(folder))
    past_end = isinstance(opened.base.model, Decoder)
    model = HarnessModel(opened.base_model, opened.tokenizer, longest_row(folder), 512, reads_past_end=past_end)
    return score_tasks(model, Tasks(TASKS, tasks, **how)).results


def theirs(folder: Path, tasks: Path, model: Any = None, **how: Any) -> Any:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = model or transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    found = lm_eval.simple_evaluate(
        model=backend, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=1000, **how
    )
    return found["results"]


def assert_same(mine: Any, others: Any) -> None:
    for task in TASKS:
        assert mine[task].keys() == others[task].keys()
        for key, value in others[task].items():
            if isinstance(value, float):
                assert mine[task][key] == pytest.approx(value, rel=2e-5), (task, key)
            else:
                assert mine[task][key] == value, (task, key)


def test_every_kind_of_task_scores_as_the_harness_own_backend(tasks: Path) -> None:
    folder = BUILT_IN["kivnun/tiny-phi"]
    mine = ours(folder, tasks)
    assert_same(mine, theirs(folder, tasks))
    assert 0 < mine["kivnun_choice"]["acc,none"] < 1
