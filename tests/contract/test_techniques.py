"""The same contract for every technique that a spec may name: train, resume, verify, merge, hand over, answer.

One run of each is made and asked everything. What a technique cannot do must be refused in words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from by_hand import nll_by_hand
from kivnun.cli.main import cli
from kivnun.errors import RunFolderError
from kivnun.export.merge import MAX_KL, export_run
from kivnun.export.verify import verify_run
from kivnun.model.generate import SamplingParams
from kivnun.opened import OpenedRun, open_run
from runs import Tree, at_step, chats, killed, numbers_of, result_hashes, run_spec, state_hashes, write_spec


@dataclass(frozen=True)
class Technique:
    """An adapter on a base in a precision; `rate` is one it learns at, `merges` whether it may be folded into weights."""

    adapter: Tree
    precision: str = "fp32"
    rate: float = 0.01
    merges: bool = True


LOW_RANK = {"kind": "lora", "rank": 4}
DORA = {"kind": "dora", "rank": 4}
TECHNIQUES = {
    "full": Technique({"kind": "full"}, rate=0.001),
    "full_bf16": Technique({"kind": "full"}, "bf16", rate=0.001),
    **{f"lora_{precision}": Technique(LOW_RANK, precision) for precision in ("fp32", "bf16", "int8", "nf4")},
    **{f"dora_{precision}": Technique(DORA, precision) for precision in ("fp32", "bf16", "int8", "nf4")},
    "rslora": Technique({**LOW_RANK, "rslora": True}),
    "lora_plus": Technique({**LOW_RANK, "loraplus_lr_ratio": 4.0}, rate=0.004),
    "pissa": Technique({**LOW_RANK, "init": "pissa"}),
    "olora": Technique({**LOW_RANK, "init": "olora"}, rate=0.003),
    "eva": Technique({**LOW_RANK, "init": "eva"}),
    "pissa_nf4": Technique({**LOW_RANK, "init": "pissa"}, "nf4"),
    "eva_nf4": Technique({**LOW_RANK, "init": "eva"}, "nf4"),
    "dora_pissa": Technique({**DORA, "init": "pissa"}),
    "dora_eva_bf16": Technique({**DORA, "init": "eva"}, "bf16"),
    "ia3": Technique({"kind": "ia3"}, rate=0.03),
    "loha": Technique({"kind": "loha", "rank": 4}, rate=0.03),
    "lokr": Technique({"kind": "lokr", "rank": 4}, rate=0.03),
    "vera": Technique({"kind": "vera", "rank": 32}, rate=0.03),
    "adalora": Technique({"kind": "adalora", "rank": 6, "target_rank": 4}, rate=0.03),
    "ln_tuning": Technique({"kind": "ln_tuning"}, rate=0.03),
    "prompt": Technique({"kind": "prompt", "num_virtual_tokens": 5}, rate=0.03, merges=False),
    "prefix": Technique({"kind": "prefix", "num_virtual_tokens": 5}, rate=0.03, merges=False),
    **{
        f"{kind}_nf4": Technique({"kind": kind, **options}, "nf4", rate=0.03, merges=kind not in ("prompt", "prefix"))
        for kind, options in (
            ("ia3", {}),
            ("loha", {"rank": 4}),
            ("lokr", {"rank": 4}),
            ("vera", {"rank": 32}),
            ("adalora", {"rank": 6, "target_rank": 4}),
            ("ln_tuning", {}),
            ("prompt", {"num_virtual_tokens": 5}),
            ("prefix", {"num_virtual_tokens": 5}),
        )
    },
}
NEAR = {"fp32": 1e-4, "bf16": 5e-2, "int8": 5e-2, "nf4": 5e-2}  # nats, to other programs
SAME_SUMS = {"fp32": 1e-5, "bf16": 2e-2, "int8": 2e-2, "nf4": 2e-2}  # loss and norm of a step, relative, whatever the packs


@dataclass(frozen=True)
class Made:
    spec: Path
    run: Path
    result: Mapping[str, Any]

    @property
    def opened(self) -> OpenedRun:
        return open_run(self.run)


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Return the finished run of a technique, made once; it evaluates after every second step and saves after every third."""
    runs: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in runs:
            folder, technique = tmp_path_factory.mktemp(name), TECHNIQUES[name]
            spec = write_spec(
                folder,
                base,
                chats(),
                base={"model": str(base), "precision": technique.precision},
                adapter=technique.adapter,
                schedule={"learning_rate": technique.rate},
                evaluation={"every_steps": 2},
                checkpoints={"every_steps": 3, "every_epoch": False, "every_seconds": None},
            )
            runs[name] = Made(spec, folder / "run", run_spec(spec, folder / "run"))
        return runs[name]

    return make


# What PEFT 0.21 says of adapters that it reads without fault: of norms that are none of torch's, of AdaLoRA's ranks as of LoRA's.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]
every_technique = pytest.mark.parametrize("name", TECHNIQUES)


@every_technique
def test_it_learns(made: Callable[[str], Made], name: str) -> None:
    result, losses = made(name).result, [step[2] for step in numbers_of(made(name).run)]
    assert result["status"] == "succeeded"
    # Virtual tokens change what the base says before anything is learned: they are held to where they started.
    before = losses[0] if not TECHNIQUES[name].merges else result["base"]["nll"]
    assert result["tuned"]["nll"] < before - 0.01


@every_technique
def test_killed_and_resumed_is_never_stopped_to_the_bit(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    whole = made(name)
    killed(whole.spec, tmp_path / "run", at_step(8))
    run_spec(whole.spec, tmp_path / "run", resume=True)
    assert numbers_of(tmp_path / "run") == numbers_of(whole.run)
    assert state_hashes(tmp_path / "run") == state_hashes(whole.run)
    assert result_hashes(tmp_path / "run") == result_hashes(whole.run)


@every_technique
def test_an_evaluation_in_mid_training_changes_no_step(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    whole = made(name)
    run_spec(whole.spec, tmp_path / "run", "evaluation.every_steps=1000")
    assert numbers_of(tmp_path / "run") == numbers_of(whole.run)


@every_technique
def test_a_step_is_the_same_however_its_rows_are_packed(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    whole, near = made(name), SAME_SUMS[TECHNIQUES[name].precision]
    run_spec(whole.spec, tmp_path / "run", f"compute.micro_batch_tokens={_longest(whole)}")
    for ours, theirs in zip(numbers_of(tmp_path / "run")[:2], numbers_of(whole.run)[:2], strict=True):
        assert ours[2:4] == pytest.approx(theirs[2:4], rel=near)


def _longest(whole: Made) -> int:
    return max(row.length for row in whole.opened.dataset.train.rows)


@every_technique
def test_what_it_left_verifies_to_the_bit(made: Callable[[str], Made], name: str) -> None:
    checks = verify_run(made(name).run)
    assert [f"{check.name}: {check.detail}" for check in checks if not check.ok] == []


@every_technique
def test_other_programs_score_it_as_the_run_says(made: Callable[[str], Made], name: str) -> None:
    whole, technique = made(name), TECHNIQUES[name]
    assert nll_by_hand(_plain_model(whole.opened), whole.opened) == pytest.approx(
        whole.result["tuned"]["nll"], abs=NEAR[technique.precision]
    )


def _plain_model(opened: OpenedRun) -> torch.nn.Module:
    """Return transformers' model, under PEFT's adapter, in float32; of a quantised base with its decoded weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from kivnun.model.load import read_decoded

    if opened.is_full:
        return AutoModelForCausalLM.from_pretrained(opened.folder.model, dtype=torch.float32).eval()
    if opened.spec.base.precision in ("int8", "nf4"):
        model: Any = read_decoded(opened.base_folder, opened.spec.base.precision).float()
        model.set_attn_implementation("eager")
    else:
        model = AutoModelForCausalLM.from_pretrained(opened.base_folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, opened.folder.adapter).eval()


@every_technique
def test_it_merges_or_says_why_not(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    whole, technique = made(name), TECHNIQUES[name]
    if not technique.merges:
        with pytest.raises(RunFolderError, match="cannot be merged: virtual tokens are no part of any weight"):
            export_run(whole.run, "merged", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return
    said = export_run(whole.run, "merged", tmp_path / "merged")
    if technique.adapter["kind"] != "full":
        assert said["gate"]["kl"] <= MAX_KL[said["stored"]]


@every_technique
def test_it_answers_as_the_plain_model_would(made: Callable[[str], Made], name: str) -> None:
    whole = made(name)
    opened = whole.opened
    asked = CliRunner().invoke(cli, ["chat", str(whole.run), "--once", "three 2", "--max-new-tokens", "6", "--json"])
    assert asked.exit_code == 0, asked.output
    prompt = opened.tokenizer.prompt_ids([{"role": "user", "content": "three 2"}])
    ids = opened.tuned.sample([prompt], SamplingParams(6, opened.tokenizer.stop_ids))[0]
    assert json.loads(asked.stdout)["reply"] == opened.tokenizer.decode(ids, skip_special=True)
    if TECHNIQUES[name].precision == "fp32":
        assert ids == _greedy(_plain_model(opened), prompt, 6, opened.tokenizer.stop_ids)


@torch.no_grad()
def _greedy(model: torch.nn.Module, prompt: list[int], count: int, stop_ids: tuple[int, ...]) -> list[int]:
    """Return the likeliest continuation, every token from the whole row anew."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]
