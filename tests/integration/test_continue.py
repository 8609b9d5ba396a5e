"""Going on with an adapter: it starts to the bit where the first run ended, and what does not fit it is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import numpy as np
import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from kivnun.artifacts import hash_folder, read_manifest
from kivnun.data.packing import pack
from kivnun.errors import IntegrityError, KivnunError, RunFolderError, SpecError
from kivnun.events import StepDone
from kivnun.export.merge import export_run
from kivnun.export.verify import verify_run
from kivnun.model.families import base_hash
from kivnun.opened import OpenedRun, open_run
from kivnun.parts import open_objective, open_weights
from kivnun.train.engine import TorchEngine
from runs import at_step, chats, killed, numbers_of, pairs, result_hashes, run_spec, state_hashes, write_spec
from tiny_task import make_base

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 3, "alpha": 5, "target_modules": ["qkv_proj", "down_proj"]},
    "dora": {"kind": "dora", "rank": 3, "rslora": True},
    "pissa": {"kind": "lora", "rank": 3, "init": "pissa"},
    "full": {"kind": "full"},
}


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the finished first run of a kind, made once."""
    place = tmp_path_factory.mktemp("first")

    def made(kind: str) -> Path:
        run = place / kind / "first"
        if not run.exists():
            run_spec(write_spec(place / kind, base, chats(), adapter=KINDS[kind]), run)
        return run

    return made


def second(folder: Path, base: Path, start: Path, kind: str = "lora", **more: Any) -> Path:
    """Write the spec of a run that goes on with `start`, on other rows."""
    adapter = {"kind": kind, "start_from": str(start), **more}
    return write_spec(folder, base, chats(30)[6:], adapter=adapter, seed=9)


def log_probs(model: Any, run: OpenedRun) -> np.ndarray:
    return model.forward(pack(run.dataset.validation))


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
def test_the_first_pass_is_the_finished_runs_to_the_bit(
    kind: str, first: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    before = open_run(first(kind))
    spec = second(tmp_path, base, before.folder.path, "dora" if kind == "dora" else "lora")
    losses: list[StepDone] = []
    run_spec(spec, tmp_path / "run", listener=lambda event: losses.append(event) if isinstance(event, StepDone) else None)
    after = open_run(tmp_path / "run")
    weights = open_weights(after.spec, after.base, after.dataset)
    trainee = TorchEngine(after.base).open(
        weights, open_objective(after.spec, TorchEngine(after.base), after.dataset, tmp_path), _adamw()
    )
    rows = before.dataset.validation
    assert np.array_equal(trainee.forward(pack(rows)), before.tuned.forward(pack(rows)))
    assert trainee.moments == {}
    assert not np.array_equal(log_probs(after.tuned, before), log_probs(before.tuned, before))
    # The base is far worse on these rows than the model that the run goes on with.
    assert losses[0].loss < json.loads(before.folder.result.read_text(encoding="utf-8"))["base"]["nll"]


def _adamw() -> Any:
    from tiny import ADAMW

    return ADAMW


def test_what_is_left_out_is_taken_over_and_the_result_is_one_adapter(
    first: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    run_spec(second(tmp_path, base, first("lora")), tmp_path / "run")
    adapter = yaml.safe_load((tmp_path / "run" / "resolved.yaml").read_text(encoding="utf-8"))["adapter"]
    assert (adapter["rank"], adapter["alpha"], adapter["target_modules"]) == (3, 5.0, ["down_proj", "qkv_proj"])
    text = (tmp_path / "run" / "resolved.yaml").read_text(encoding="utf-8")
    assert text.count("as the adapter in start_from has it") == 4
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 3
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    peft.PeftModel.from_pretrained(model, str(tmp_path / "run" / "adapter"))
    assert [check for check in verify_run(tmp_path / "run") if not check.ok] == []


def test_a_dora_and_its_rslora_are_taken_over(first: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    run_spec(second(tmp_path, base, first("dora"), "dora"), tmp_path / "run")
    adapter = open_run(tmp_path / "run").spec.to_tree()["adapter"]
    assert (adapter["rank"], adapter["rslora"], adapter["alpha"]) == (3, True, 8.0)  # type: ignore[index]


@pytest.mark.parametrize("place", ["run", "adapter", "exported", "peft"])
def test_a_run_its_adapter_folder_and_any_peft_folder_are_the_same_start(
    place: str, first: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    run = first("lora")
    start = {"run": run, "adapter": run / "adapter", "exported": tmp_path / "exported", "peft": tmp_path / "peft"}[place]
    if place == "exported":
        export_run(run, "peft", start)
    if place == "peft":  # as PEFT itself writes it
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run / "adapter"))
        model.save_pretrained(start)
    run_spec(second(tmp_path, base, start), tmp_path / "run")
    lineage = read_manifest(tmp_path / "run")["lineage"]
    assert lineage["how"] == "adapter"
    assert lineage["run"] == ("first" if place in ("run", "adapter") else None)
    assert (lineage["content_hash"] == hash_folder(run / "adapter")) == (place != "peft")
    again = tmp_path / "again"
    run_spec(second(tmp_path / "two", base, run), again)
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / "adapter" / name).read_bytes() == (again / "adapter" / name).read_bytes()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": 4}, r"adapter.rank is 4, but the adapter in .*first has 3"),
        ({"alpha": 6.0}, r"adapter.alpha is 6.0, but the adapter in .*first has 5.0"),
        ({"rslora": True}, r"adapter.rslora is true, but"),
        ({"kind": "dora"}, r"adapter.kind is dora, but the adapter in .*first is lora"),
        ({"init": "gaussian"}, r"adapter.init is gaussian, but adapter.start_from brings A and B"),
        ({"target_modules": ["qkv_proj"]}, r"which covers model.layers.0.mlp.down_proj, covers model.layers.1.mlp.down_proj"),
        ({"target_modules": "all-linear"}, r"lacks model.layers.0.mlp.gate_up_proj"),
    ],
)
def test_what_differs_from_the_adapter_is_refused_with_the_difference(
    given: dict[str, Any], said: str, first: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    spec = second(tmp_path, base, first("lora"), **given) if "kind" not in given else second(tmp_path, base, first("lora"), "dora")
    with pytest.raises(SpecError, match=said):
        run_spec(spec, tmp_path / "run")


def test_what_equals_the_adapter_may_be_given(first: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    spec = second(tmp_path, base, first("lora"), rank=3, alpha=5, target_modules=["down_proj", "qkv_proj"], dropout=0.1)
    run_spec(spec, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_dropout"] == 0.1  # how to train on is the new run's to say


@pytest.mark.parametrize("form", ["run", "exported"])
def test_another_base_is_refused_with_both_hashes(form: str, first: Callable[[str], Path], tmp_path: Path) -> None:
    other = make_base(tmp_path / "base")
    weights = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        weights.model.norm.weight.add_(0.1)
    weights.save_pretrained(other)
    start = first("lora")
    if form == "exported":
        start = tmp_path / "exported"
        export_run(first("lora"), "peft", start)
    with pytest.raises(IntegrityError, match="trained on another base") as caught:
        run_spec(second(tmp_path, other, start), tmp_path / "run")
    assert hash_folder(other) in caught.value.message
    assert read_manifest(first("lora"))["base"]["content_hash"] in caught.value.message


def test_what_is_no_adapter_to_start_from_is_told(first: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    cases: list[tuple[Path, type[KivnunError], str]] = [
        (tmp_path / "nothing", RunFolderError, "holds no adapter to start from"),
        (first("full"), RunFolderError, "trained the whole model"),
    ]
    for number, (start, kind, said) in enumerate(cases):
        with pytest.raises(kind, match=said):
            run_spec(second(tmp_path / str(number), base, start), tmp_path / str(number) / "run")


def test_a_continued_run_that_is_killed_goes_on_to_the_same_bits_and_another_start_is_refused(
    first: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    export_run(first("lora"), "peft", tmp_path / "start")
    spec = second(tmp_path, base, tmp_path / "start")
    run_spec(spec, tmp_path / "whole")
    killed(spec, tmp_path / "run", at_step(5), "checkpoints.every_steps=2")
    weights = tmp_path / "start" / "adapter_config.json"
    kept = weights.read_text(encoding="utf-8")
    weights.write_text(kept + "\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match="adapter that the run starts from changed"):
        run_spec(spec, tmp_path / "run", "checkpoints.every_steps=2", resume=True)
    weights.write_text(kept, encoding="utf-8")
    run_spec(spec, tmp_path / "run", "checkpoints.every_steps=2", resume=True)
    assert numbers_of(tmp_path / "run") == numbers_of(tmp_path / "whole")
    name = "adapter_model.safetensors"
    assert result_hashes(tmp_path / "run")[name] == result_hashes(tmp_path / "whole")[name]
    assert state_hashes(tmp_path / "run")["state.safetensors"] == state_hashes(tmp_path / "whole")["state.safetensors"]


def test_a_parent_that_is_gone_is_still_told_by_manifest_and_card(first: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    export_run(first("lora"), "peft", tmp_path / "start")
    run_spec(second(tmp_path, base, tmp_path / "start"), tmp_path / "run")
    rmtree(tmp_path / "start")
    export_run(tmp_path / "run", "merged", tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert f"Training went on with the adapter, content hash `{hash_folder(first('lora') / 'adapter')}`" in card


def test_an_unfinished_run_is_no_start_by_its_adapter_folder_either(
    first: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    copytree(first("lora"), tmp_path / "half")
    (tmp_path / "half" / "result.json").unlink()
    for start in (tmp_path / "half", tmp_path / "half" / "adapter"):
        with pytest.raises(RunFolderError, match="is not finished"):
            run_spec(second(tmp_path, base, start), tmp_path / "run")
    copytree(first("lora"), tmp_path / "changed")
    weights = tmp_path / "changed" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="was changed"):
        run_spec(second(tmp_path, base, tmp_path / "changed"), tmp_path / "other")


def test_preferences_are_held_to_the_adapter_that_the_run_starts_from(
    first: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    adapter = {"kind": "lora", "start_from": str(first("lora"))}
    losses: list[float] = []
    spec = write_spec(tmp_path, base, pairs(), adapter=adapter)
    run_spec(spec, tmp_path / "run", listener=lambda event: losses.append(event.loss) if isinstance(event, StepDone) else None)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)  # a policy that has not moved from its reference


def test_full_tuning_goes_on_with_the_model_of_a_run(first: Callable[[str], Path], tmp_path: Path) -> None:
    model = first("full") / "model"
    run_spec(write_spec(tmp_path, model, chats(20), adapter={"kind": "full"}), tmp_path / "run")
    assert read_manifest(tmp_path / "run")["lineage"] == {"how": "model", "run": "first", "content_hash": base_hash(model)}


def test_a_run_on_a_merged_export_tells_whose_it_is(first: Callable[[str], Path], tmp_path: Path) -> None:
    export_run(first("lora"), "merged", tmp_path / "merged")
    run_spec(write_spec(tmp_path, tmp_path / "merged", chats(20), adapter=KINDS["lora"]), tmp_path / "run")
    lineage = read_manifest(tmp_path / "run")["lineage"]
    assert lineage == {"how": "merged", "run": None, "content_hash": hash_folder(first("lora") / "adapter")}
