"""What is advised follows from what was measured and what fits: by made-up tables, and by the one that comes along."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kivnun.cli.main import run as run_command
from kivnun.data.scenarios import SCENARIOS
from kivnun.errors import BaseModelError, DataError, SpecError
from kivnun.model.phi import PHI
from kivnun.plan.advise import Question, advise, spec_tree, words_of_bytes, words_of_seconds
from kivnun.plan.bases import KnownBase, known_base
from kivnun.plan.devices import CONTEXT_BYTES, GIB, Device, find_device
from kivnun.plan.measured import SHIPPED, MeasuredTable, Score, Task, read_table, slim
from kivnun.plan.rows import LETTERS_A_TOKEN, TrainingRows, training_rows
from kivnun.plan.sizes import Sizes
from kivnun.plan.techniques import TECHNIQUES
from kivnun.spec import parse_spec

ROOT = Path(__file__).parents[2]
PHI_4_MINI = "microsoft/Phi-4-mini-instruct"
ROWS = TrainingRows(1000, 400_000, 900, True)


def score(to_full: float, gain: float = 0.5, width: float = 0.05) -> Score:
    """Return a score that stands so far above full tuning's, with intervals of this width to both sides."""
    return Score(0.8 + to_full, gain, (gain - width, gain + width), to_full, (to_full - width, to_full + width), 0.004)


def question(methods: dict[str, Score], device: Device, base: str = PHI_4_MINI, **changes: Any) -> Question:
    task = Task("entities", 2, "Entities", "entity_f1", True, 0.1, {"full": score(0.0), **methods})
    table = MeasuredTable(
        "2026-01-01", "kivnun matrix", "kivnun/tiny-phi", "full", 3, "a machine", {"entities": task}, {"lora": 1.0}
    )
    known = KnownBase(base, Sizes.of(PHI[base].config, base), None)
    return replace(Question(task, table, known, device, ROWS, 2, 16), **changes)


def gpu(gib: float, flops: float | None = 100e12, count: int = 1) -> Device:
    return Device("a GPU", "cuda", gib * GIB, 0, flops, count)


def test_what_does_not_fit_is_not_chosen_whatever_it_scored() -> None:
    advice = advise(question({"lora": score(-0.3), "qlora": score(-0.4)}, gpu(24)))
    assert advice.chosen.technique == "lora"
    assert {it.technique: it.fits for it in advice.candidates} == {"full": False, "lora": True, "qlora": True}
    assert any("full tuning would take" in reason and "does not fit" in reason for reason in advice.reasons)
    assert [(why, it.technique) for why, it in advice.others][-1] == ("does not fit this device", "full")


def test_of_those_as_good_the_quickest_is_chosen() -> None:
    """DoRA's score lies within LoRA's interval, and its steps take longer."""
    assert advise(question({"lora": score(-0.01), "dora": score(0.01)}, gpu(70))).chosen.technique == "lora"
    assert advise(question({"lora": score(-0.2), "dora": score(0.01)}, gpu(70))).chosen.technique == "dora"


def test_what_helps_nothing_is_never_advised() -> None:
    """Its gain's interval reaches zero: the fewest numbers and the least memory do not count then."""
    advice = advise(question({"lora": score(0.0), "prompt": score(-0.5, gain=0.01)}, gpu(200)))
    assert "prompt" not in [advice.chosen.technique, *(it.technique for _, it in advice.others)]


def test_a_table_in_which_nothing_helps_gives_no_advice() -> None:
    asked = question({"lora": score(0.0, gain=0.0)}, gpu(200))
    nothing = replace(asked, task=replace(asked.task, methods={"full": score(0.0, gain=0.01), "lora": score(0.0, gain=0.0)}))
    with pytest.raises(SpecError, match="no technique of the table of 2026-01-01 beat the base on entities"):
        advise(nothing)


def test_three_others_each_once_and_each_with_what_speaks_for_it() -> None:
    methods = {name: score(-0.02 * place) for place, name in enumerate(TECHNIQUES) if name != "full"}
    advice = advise(question(methods, gpu(70)))
    named = [advice.chosen.technique, *(it.technique for _, it in advice.others)]
    assert len(named) == len(set(named)) == 4
    assert all(why for why, _ in advice.others)
    assert len(advice.candidates) == len(TECHNIQUES)


def test_passes_are_shortened_before_layers_are_computed_again() -> None:
    """LoRA on Phi-4-mini over passes of 4,096, 900 and 900 tokens with layers computed again takes 15, 9.1 and 7.6 GiB."""
    rows = replace(ROWS, tokens=800_000)
    only = {"full": score(0.0), "lora": score(0.0)}
    shapes = [advise(question(only, gpu(gib), rows=rows)).chosen.shape for gib in (30, 11, 8)]
    assert [(shape.pass_tokens, shape.recompute) for shape in shapes] == [(4096, False), (900, False), (900, True)]


def test_state_is_divided_where_one_device_is_too_small() -> None:
    alone = advise(question({"lora": score(0.0)}, gpu(6, count=8)))
    assert (alone.chosen.shape.zero_stage, alone.chosen.shape.processes) == (3, 8)
    tree = spec_tree(question({}, gpu(6, count=8)), alone.chosen, {"train": "a"}, {})
    assert tree["compute"]["kind"] == "multi_process"
    assert (tree["compute"]["processes"], tree["compute"]["zero_stage"]) == (8, 3)
    large = advise(question({"lora": score(0.0)}, gpu(24, count=8)))
    assert large.chosen.shape.zero_stage == 0


def test_nothing_fits_says_what_would() -> None:
    with pytest.raises(SpecError, match=r"no technique fits a GPU with 512 MiB: LoRA takes the least, \d") as caught:
        advise(question({"lora": score(0.0)}, gpu(0.5)))
    assert "a smaller base" in caught.value.hint


def test_a_gpu_whose_speed_is_not_known_has_no_time_and_the_best_score_decides() -> None:
    advice = advise(question({"lora": score(-0.01), "dora": score(0.01)}, gpu(70, flops=None)))
    assert advice.chosen.technique == "dora"
    assert any("an unknown time" in reason for reason in advice.reasons)
    assert "the least time" not in [why for why, _ in advice.others]


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("device", [gpu(2000), Device("a CPU", "cpu", 2000 * GIB, 8)], ids=["gpu", "cpu"])
def test_every_technique_has_a_spec_that_can_be_read(technique: str, device: Device) -> None:
    asked = question({name: score(0.0) for name in TECHNIQUES}, device)
    (candidate,) = (it for it in advise(asked).candidates if it.technique == technique)
    tree = spec_tree(asked, candidate, {"train": "rows.jsonl"}, {"metrics": ["entity_f1"], "generate_rows": 4})
    spec = parse_spec(json.dumps(tree), folder=Path())
    assert spec.adapter.kind == TECHNIQUES[technique].kind
    assert (spec.base.precision == "nf4") == TECHNIQUES[technique].coded
    assert spec.schedule.learning_rate is None  # the sweep's rate is for bases like the built-in one


def test_the_sweeps_rate_is_for_tiny_bases_alone() -> None:
    tiny = KnownBase("kivnun/tiny-phi", known_base("kivnun/tiny-phi").sizes, None)
    asked = question({"lora": score(0.2)}, gpu(70), **{"base": PHI_4_MINI})
    assert spec_tree(replace(asked, base=tiny), advise(asked).chosen, {}, {})["schedule"]["learning_rate"] == 0.004


def test_the_table_that_comes_along_is_the_committed_one() -> None:
    """Every scenario and every technique, and the figures of the newest committed full table."""
    newest = sorted(ROOT.glob("benchmarks/results/matrix_20*/matrix.json"))[-1]
    assert json.loads(SHIPPED.read_text(encoding="utf-8")) == slim(json.loads(newest.read_text(encoding="utf-8")))
    table = read_table()
    assert list(table.tasks) == [scenario.name for scenario in SCENARIOS]
    assert all(set(task.methods) == set(TECHNIQUES) for task in table.tasks.values())
    assert set(table.slower) == set(TECHNIQUES) - {"full"}
    assert table.seeds >= 3


@pytest.mark.parametrize(("text", "said"), [("{}", "is no matrix.json"), ("[", "is no matrix.json"), (None, "cannot be read")])
def test_a_file_that_is_no_table_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "matrix.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SpecError, match=said):
        read_table(file)


def test_devices_by_name_with_their_memory() -> None:
    named = find_device("a100-40gb")
    assert (named.kind, named.memory_bytes, named.flops) == ("cuda", 40 * GIB - CONTEXT_BYTES, 312e12)
    assert find_device("l4", 12.0, 2) == Device("L4", "cuda", 12 * GIB - CONTEXT_BYTES, 0, 121e12, 2)
    assert find_device("cpu", 3.0).memory_bytes == 3 * GIB
    with pytest.raises(SpecError, match="--device 'a100' is not known") as caught:
        find_device("a100")
    assert "a100-80gb" in caught.value.hint


def test_this_machines_gpu_is_asked_of_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    said = subprocess.CompletedProcess([], 0, "NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 81559\n")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *given, **more: said)
    assert find_device("cuda") == Device("NVIDIA H100 80GB HBM3", "cuda", 81559 * 2**20 - CONTEXT_BYTES, 0, 989e12, 1)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SpecError, match="no NVIDIA GPU was found"):
        find_device("cuda")


def test_bases_by_name_folder_and_configuration_alone(tmp_path: Path) -> None:
    assert known_base("Microsoft/PHI-4").name == "microsoft/phi-4"
    (tmp_path / "config.json").write_text(json.dumps(PHI[PHI_4_MINI].config))
    found = known_base(str(tmp_path))
    assert (found.sizes.numbers, found.folder) == (3_836_021_760, None)
    assert known_base("kivnun/tiny-phi").folder is not None
    (tmp_path / "config.json").write_text(json.dumps({**PHI[PHI_4_MINI].config, "model_type": "phi3small"}))
    with pytest.raises(BaseModelError, match="block-sparse"):
        known_base(str(tmp_path))
    with pytest.raises(BaseModelError, match="block-sparse"):
        known_base("microsoft/Phi-3-small-8k-instruct")
    with pytest.raises(BaseModelError, match="neither a folder nor a model id"):
        known_base("kivnun/tiny-fi")


def test_rows_are_counted_with_a_tokenizer_and_estimated_without_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "p" * 35, "completion": "c" * 35 * n}) + "\n" for n in (1, 2)))
    built_in = known_base("kivnun/tiny-phi")
    counted, estimated = training_rows(file, built_in), training_rows(file, replace(built_in, folder=None))
    assert (counted.count, counted.counted, estimated.counted) == (2, True, False)
    assert estimated == TrainingRows(2, round(70 / LETTERS_A_TOKEN) + round(105 / LETTERS_A_TOKEN), 30, False)
    file.write_text("{}\n")
    with pytest.raises(DataError):
        training_rows(file, replace(built_in, folder=None))


@pytest.mark.parametrize(("count", "said"), [(500, "0 KiB"), (3 * 2**20, "3 MiB"), (2**30, "1.0 GiB"), (23.04 * 2**30, "23.0 GiB")])
def test_bytes_in_words(count: float, said: str) -> None:
    assert words_of_bytes(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "a second"), (89, "89 seconds"), (600, "10 minutes"), (7200, "2.0 hours"), (float("nan"), "an unknown time")],
)
def test_seconds_in_words(seconds: float, said: str) -> None:
    assert words_of_seconds(seconds) == said


def test_the_command_writes_a_spec_that_tunes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On the built-in base, with rows of one's own; the run is made and its peak is of the size that was said."""
    rows = tmp_path / "mine.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}!"}]}) + "\n"
            for n in range(40)
        )
    )
    given = ["--scenario", "translation", "--base", "kivnun/tiny-phi", "--train", str(rows), "--epochs", "1"]
    assert run_command(["advise", *given, "--output", str(tmp_path / "made"), "--json"]) == 0
    said = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert len(said["others"]) == 3
    assert said["chosen"]["fits"]
    spec = tmp_path / "made" / "spec.yaml"
    assert spec.read_text(encoding="utf-8").startswith("# English values into Hebrew: ")
    assert not (tmp_path / "made" / "train.jsonl").exists()
    assert run_command(["tune", str(spec), "--output", str(tmp_path / "run"), "--set", "evaluation.generate_rows=5", "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["status"] == "succeeded"


def test_the_command_prints_the_spec_and_writes_nothing_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["advise", "--scenario", "chat", "--base", "microsoft/phi-4", "--device", "h100"]
    assert run_command(given) == 0
    out, err = capfd.readouterr()
    spec = parse_spec(out, folder=tmp_path)
    assert spec.base.model == "microsoft/phi-4"
    assert "because" in err
    assert "estimated from letters" in err
    (tmp_path / "spec.yaml").write_text("mine")
    assert run_command([*given, "--output", str(tmp_path)]) == 5
    assert (tmp_path / "spec.yaml").read_text() == "mine"


def test_help_names_what_it_asks_for() -> None:
    from kivnun.cli.main import cli

    text = CliRunner().invoke(cli, ["advise", "--help"]).output
    for option in ("--scenario", "--base", "--device", "--devices", "--memory", "--train", "--matrix", "--output", "--json"):
        assert option in text
