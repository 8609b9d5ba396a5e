"""Tasks of lm-evaluation-harness give the same figures through Kivnun as through the harness's own Hugging Face backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner

from kivnun.cli.main import cli
from kivnun.errors import SpecError
from kivnun.opened import OpenedBase, OpenedRun, open_base, open_run
from kivnun.train.engine import FixedModel
from runs import chats, run_spec, write_spec

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


def ours(opened: OpenedBase | OpenedRun, model: FixedModel, tasks: Path, longest: int, **how: Any) -> Any:
    from kivnun.evaluate.harness import HarnessModel, Tasks, score_tasks

    harness = HarnessModel(model, opened.tokenizer, longest, 256)
    return score_tasks(harness, Tasks(TASKS, tasks, **how)).results


def theirs(folder: Path, adapter: Path | None, tasks: Path, longest: int, **how: Any) -> Any:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    backend = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=1, device="cpu", max_length=longest)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(model=backend, tasks=list(TASKS), task_manager=manager, bootstrap_iters=1000, **how)["results"]


def assert_same(mine: Any, others: Any) -> None:
    for task in TASKS:
        assert mine[task].keys() == others[task].keys()
        for key, value in others[task].items():
            if isinstance(value, float):
                assert mine[task][key] == pytest.approx(value, rel=2e-5), (task, key)
            else:
                assert mine[task][key] == value, (task, key)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    run_spec(write_spec(folder, base, chats(), schedule={"epochs": 4}), folder / "run")
    return folder / "run"


@pytest.mark.parametrize("longest", [512, 48], ids=["whole", "cut"])
def test_a_base_scores_as_in_the_harness_own_backend(base: Path, tasks: Path, longest: int) -> None:
    opened = open_base(str(base))
    mine = ours(opened, opened.base_model, tasks, longest)
    assert_same(mine, theirs(base, None, tasks, longest))


def test_a_tuned_model_scores_as_its_adapter_in_peft(run: Path, base: Path, tasks: Path) -> None:
    opened = open_run(run)
    mine = ours(opened, opened.tuned, tasks, 512)
    assert_same(mine, theirs(base, run / "adapter", tasks, 512))
    assert mine["kivnun_text"] != ours(opened, opened.base_model, tasks, 512)["kivnun_text"]


def test_questions_asked_as_chats_score_as_in_the_harness_own_backend(base: Path, tasks: Path) -> None:
    opened = open_base(str(base))
    mine = ours(opened, opened.base_model, tasks, 512, chat=True, num_fewshot=1)
    assert_same(mine, theirs(base, None, tasks, 512, apply_chat_template=True, fewshot_as_multiturn=True, num_fewshot=1))


def test_the_command_scores_a_run_before_and_after_with_paired_differences(run: Path, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "harness.json"
    args = ["harness", str(run), "--tasks", ",".join(TASKS), "--include-path", str(tasks), "--output", str(out), "--json"]
    printed = CliRunner().invoke(cli, args, catch_exceptions=False).stdout.splitlines()[-1]
    record = json.loads(printed)
    assert record == json.loads(out.read_text(encoding="utf-8"))
    assert {"base", "tuned"} == record["results"].keys()
    own = record["differences"]["kivnun_choice"]["acc,none"]
    before, after = (record["results"][which]["kivnun_choice"]["acc,none"] for which in ("base", "tuned"))
    assert own["value"] == pytest.approx(after - before)
    assert own["interval"][0] <= own["value"] <= own["interval"][1]


def test_an_unknown_task_is_refused_with_the_nearest_ones() -> None:
    from kivnun.evaluate.harness import refuse_unknown

    with pytest.raises(SpecError, match="knows no task 'hellasweg'") as refused:
        refuse_unknown(["arc_easy", "hellasweg"], {"arc_easy", "hellaswag", "piqa"})
    assert "did you mean hellaswag?" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": ["e"], "num_beams": 4}, "num_beams=4, which is not offered"),
        ({"until": ["e"], "max_gen_toks": 600}, "generates up to 600 tokens, the base takes 512"),
    ],
)
def test_a_generation_that_would_not_be_the_tasks_is_refused(base: Path, options: dict[str, Any], message: str) -> None:
    from kivnun.evaluate.harness import HarnessModel

    opened = open_base(str(base))
    model = HarnessModel(opened.base_model, opened.tokenizer, 512, 256)
    request = lm_eval.api.instance.Instance("generate_until", {}, ("hello", options), 0)
    with pytest.raises(SpecError, match=message):
        model.generate_until([request])
