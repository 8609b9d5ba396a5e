"""Every option that is accepted changes the resolved spec, and those that should change the numbers do.

The table names each option once, with a value other than the one it would have anyway; an option added to the spec without a
row here fails the first test.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from kivnun.artifacts import hash_file
from kivnun.errors import KivnunError
from kivnun.run_folder import RunFolder
from kivnun.spec import options
from runs import Tree, chats, pairs, run_spec, write_rows, write_spec

NUMBERS, SAME, ANY = "other numbers", "the same numbers", "either"
REFUSED = "refused"

LORA: Tree = {"adapter": {"kind": "lora", "rank": 4}, "schedule": {"epochs": None, "steps": 4}}
SETUPS: dict[str, Tree] = {
    "lora": LORA,
    "lora_alpha": {**LORA, "adapter": {"kind": "lora", "rank": 4, "alpha": 4}},
    "muon": {
        "adapter": {"kind": "full"},
        "schedule": {"epochs": None, "steps": 4, "learning_rate": 0.001, "optimizer": {"kind": "muon"}},
    },
    "dpo": {**LORA, "objective": {"kind": "dpo"}},
    "linear": {**LORA, "schedule": {**LORA["schedule"], "decay": "cosine"}},
    **{
        kind: {**LORA, "adapter": {"kind": kind, **options}, "schedule": {"epochs": None, "steps": 8}}
        for kind, options in {
            "lokr": {"rank": 1, "decompose_factor": 8},
            "vera": {"rank": 16},
            "adalora": {"rank": 4, "target_rank": 2},
            "prompt": {"num_virtual_tokens": 4},
        }.items()
    },
    "epochs": {"adapter": LORA["adapter"], "schedule": {"epochs": 1}},
}


@dataclass(frozen=True)
class Case:
    option: str
    value: str
    effect: str
    setup: str = "lora"


CASES = (
    Case("base.model", "BASE", NUMBERS),
    Case("base.precision", "bf16", NUMBERS),
    Case("base.rope_factors", "short", REFUSED),  # this base has no LongRoPE; the parity tests hold one that has
    Case("data.train", "[train.jsonl, more.jsonl]", NUMBERS),
    Case("data.train.0.path", "[{path: more.jsonl}]", NUMBERS),
    Case("data.train.0.share", "[{path: train.jsonl, share: 1}, {path: more.jsonl, share: 3}]", NUMBERS),
    Case("data.validation", "0.4", NUMBERS),
    Case("data.format", "text", REFUSED),
    Case("data.template", "other.jinja", NUMBERS),
    Case("data.max_seq_len", "200", SAME),
    Case("data.bad_rows", "skip", SAME),
    Case("data.over_long", "truncate", SAME),
    Case("adapter.kind", "dora", NUMBERS),
    Case("adapter.rank", "3", NUMBERS),
    Case("adapter.alpha", "3", NUMBERS),
    Case("adapter.dropout", "0.3", NUMBERS),
    Case("adapter.target_modules", "[o_proj]", NUMBERS),
    Case("adapter.rslora", "true", NUMBERS, "lora_alpha"),
    Case("adapter.init", "gaussian", NUMBERS),
    Case("adapter.init", "pissa", NUMBERS),
    Case("adapter.init", "olora", NUMBERS),
    Case("adapter.init", "eva", NUMBERS),
    Case("adapter.loraplus_lr_ratio", "4", NUMBERS),
    Case("adapter.decompose_factor", "4", NUMBERS, "lokr"),
    Case("adapter.decompose_both", "true", NUMBERS, "lokr"),
    Case("adapter.d_initial", "0.5", NUMBERS, "vera"),
    Case("adapter.target_rank", "1", NUMBERS, "adalora"),
    Case("adapter.initial_share", "0.5", NUMBERS, "adalora"),
    Case("adapter.final_share", "0.6", NUMBERS, "adalora"),
    Case("adapter.allocate_every_steps", "2", NUMBERS, "adalora"),
    Case("adapter.orth_reg_weight", "5", NUMBERS, "adalora"),
    Case("adapter.num_virtual_tokens", "3", NUMBERS, "prompt"),
    Case("objective.kind", "pretraining", REFUSED),
    Case("objective.beta", "0.7", NUMBERS, "dpo"),
    Case("schedule.epochs", "2", NUMBERS, "epochs"),
    Case("schedule.steps", "5", NUMBERS),
    Case("schedule.batch_rows", "5", NUMBERS),
    Case("schedule.batch_tokens", "64", NUMBERS),
    Case("schedule.learning_rate", "0.02", NUMBERS),
    Case("schedule.warmup_share", "0.7", NUMBERS),
    Case("schedule.decay", "constant", NUMBERS),
    Case("schedule.decay_start_share", "0.5", NUMBERS),
    Case("schedule.final_share", "0.5", NUMBERS),
    Case("schedule.max_grad_norm", "0.001", NUMBERS),
    Case("schedule.optimizer.kind", "muon", NUMBERS),
    Case("schedule.optimizer.beta1", "0.5", NUMBERS),
    Case("schedule.optimizer.beta2", "0.5", NUMBERS),
    Case("schedule.optimizer.eps", "0.01", NUMBERS),
    Case("schedule.optimizer.weight_decay", "0.5", NUMBERS),
    Case("schedule.optimizer.momentum", "0.5", NUMBERS, "muon"),
    Case("schedule.optimizer.adamw_share", "0.2", NUMBERS, "muon"),
    Case("schedule.optimizer.beta1", "0.5", NUMBERS, "muon"),
    Case("schedule.optimizer.beta2", "0.5", NUMBERS, "muon"),
    Case("schedule.optimizer.eps", "0.01", NUMBERS, "muon"),
    Case("schedule.optimizer.weight_decay", "0.5", NUMBERS, "muon"),
    Case("evaluation.every_steps", "1", SAME),
    Case("evaluation.metrics", "[chrf]", SAME),
    Case("evaluation.generate_rows", "3", SAME),
    Case("evaluation.max_new_tokens", "4", SAME),
    Case("evaluation.samples", "1", SAME),
    Case("evaluation.bootstrap", "101", SAME),
    Case("evaluation.forgetting", "builtin", SAME),
    Case("checkpoints.every_steps", "1", SAME),
    Case("checkpoints.every_epoch", "false", SAME),
    Case("checkpoints.every_seconds", "1", SAME),
    Case("checkpoints.keep", "1", SAME),
    Case("seed", "8", NUMBERS),
    Case("compute.device", "cuda", REFUSED),
    Case("compute.micro_batch_tokens", "256", ANY),
    Case("compute.activation_checkpointing", "true", SAME),
    Case("compute.share_prefixes", "true", ANY),
    Case("compute.packed_weights", "false", SAME),
    Case("compute.kernels", "torch", ANY),
)
SIZES = ("bucket_elements", "live_elements", "persistent_elements", "sub_group_elements")
NOT_HERE = {
    "version": "one value is allowed",
    "compute.kind": "several processes are started by torchrun: test_multi_process.py",
    **{
        f"compute.{name}": "asked of several processes: test_multi_process.py"
        for name in ("processes", "zero_stage", "offload", "deepspeed", *SIZES)
    },
    "compute.threads": "two threads need a process of their own: test_resume_process.py",
    "base.content_hash": "refuses another base, and changes nothing of the right one: test_hub.py",
    "adapter.start_from": "needs an adapter that was trained before: test_continue.py",
    "data.columns": "names columns of tables: test_data_kinds.py",
    "data.instruction": "is asked of rows with labels: test_data_kinds.py",
    "base.revision": "names a version on the hub; nothing is downloaded here",
}


def test_every_option_has_its_row() -> None:
    assert {case.option for case in CASES} | NOT_HERE.keys() == {option.path for option in options()}


@pytest.fixture(scope="module")
def places(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows, another base and another template."""
    folder = tmp_path_factory.mktemp("options")
    write_rows(folder / "more.jsonl", chats(60)[40:])
    other = shutil.copytree(base, folder / "base")
    tensors = {name: value * 1.25 for name, value in load_file(base / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    template = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    (folder / "other.jinja").write_text(template + prompt, encoding="utf-8")
    for setup, sections in SETUPS.items():
        write_spec(folder, base, pairs() if setup == "dpo" else chats(), **sections).rename(folder / f"{setup}.yaml")
        if setup == "dpo":
            shutil.copyfile(folder / "train.jsonl", folder / "pairs.jsonl")
    write_rows(folder / "train.jsonl", chats())
    (folder / "dpo.yaml").write_text(
        (folder / "dpo.yaml").read_text(encoding="utf-8").replace("train.jsonl", "pairs.jsonl"), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def plain(places: Path) -> Callable[[str], Path]:
    """Return the run of a set-up as it stands; each is made once."""

    def run(setup: str) -> Path:
        folder = places / f"run_{setup}"
        if not folder.exists():
            run_spec(places / f"{setup}.yaml", folder)
        return folder

    return run


def weights_of(run: Path) -> str:
    adapter, model = run / "adapter" / "adapter_model.safetensors", run / "model" / "model.safetensors"
    return hash_file(adapter if adapter.exists() else model)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.option}-{case.setup}")
def test_an_option_does_what_it_is_there_for(places: Path, plain: Callable[[str], Path], tmp_path: Path, case: Case) -> None:
    spec, run, before = places / f"{case.setup}.yaml", tmp_path / "run", plain(case.setup)
    name = "data.train" if case.option.startswith("data.train.") else case.option
    override = f"{name}={json.dumps(str(places / 'base')) if case.value == 'BASE' else case.value}"
    others = ["schedule.batch_rows=null"] if name == "schedule.batch_tokens" else []
    if case.effect == REFUSED:
        with pytest.raises(KivnunError):
            run_spec(spec, run, override, *others)
        return
    run_spec(spec, run, override, *others)
    assert RunFolder(run).read_spec().content_hash() != RunFolder(before).read_spec().content_hash()
    if case.effect != ANY:
        assert (weights_of(run) == weights_of(before)) == (case.effect == SAME)
