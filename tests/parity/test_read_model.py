"""Reading a model tensor by tensor: the same model as transformers' from_pretrained, in little more memory than it takes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from kivnun.errors import BaseModelError
from kivnun.model.families import count_parameters, weight_files
from kivnun.model.kernels.reference import TorchKernels
from kivnun.model.load import load_base
from kivnun.model.quantised import DecodeBuffer
from kivnun.model.read_model import read_model
from kivnun.model.stored import stored_tensors

DTYPES = [torch.float32, torch.bfloat16]
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56}


def read(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return read_model(folder, dtype, None, DecodeBuffer(dtype, TorchKernels())).model


def assert_same_model(ours: Any, theirs: Any) -> None:
    """Compare names, types and bits of all parameters and buffers, what is tied, and logits by the same forward."""
    for kind in ("named_parameters", "named_buffers"):
        mine, others = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert mine.keys() == others.keys()
        for name, tensor in others.items():
            assert mine[name].dtype == tensor.dtype, name
            assert torch.equal(mine[name], tensor), name
    ours.set_attn_implementation("eager")
    assert torch.equal(*(tiny.reference_logits(model, tiny.random_ids(30)) for model in (ours, theirs)))
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not ours.training


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_base_read_tensor_by_tensor_is_the_one_transformers_loads(
    name: str, dtype: torch.dtype, tiny_base: Callable[[str], Path]
) -> None:
    folder = tiny_base(name)
    assert_same_model(read(folder, dtype), tiny.reference(folder, dtype))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_base_in_several_files_of_another_dtype_is_the_same_too(stored: torch.dtype, tmp_path: Path) -> None:
    whole = tiny.write_base(tmp_path / "whole", tiny.CONFIGS["phi3_tied"]())
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=stored)
    model.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert len(weight_files(tmp_path / "parts")) > 2
    (tmp_path / "parts" / "consolidated.safetensors").write_bytes(b"another program's copy")
    for dtype in DTYPES:
        assert_same_model(read(tmp_path / "parts", dtype), tiny.reference(tmp_path / "parts", dtype))
    assert count_parameters(tmp_path / "parts") == sum(p.numel() for p in model.parameters())


def test_tensors_that_transformers_puts_together_are_put_together_by_it(tmp_path: Path) -> None:
    folder = tiny.write_base(tmp_path, transformers.Qwen2MoeConfig(**{**tiny.SIZES, **MIXTURE}))
    names = stored_tensors(folder).keys() - dict(read(folder).named_parameters()).keys()
    assert any(".experts.3." in name for name in names), "experts are stored one by one"
    assert_same_model(read(folder), tiny.reference(folder))


def test_buffers_of_old_files_are_passed_over(tmp_path: Path) -> None:
    folder = tiny.write_base(tmp_path, tiny.CONFIGS["llama"]())
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}))
    assert_same_model(read(folder), tiny.reference(folder))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
UNFIT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a tensor lacks": (lambda tensors: tensors.pop(DOWN), f"lacks tensors of LlamaForCausalLM: {DOWN}"),
    "a norm lacks": (lambda tensors: tensors.pop(NORM), f"lacks tensors of LlamaForCausalLM: {NORM}"),
    "a foreign tensor": (lambda tensors: tensors.update(other=torch.ones(2)), "that LlamaForCausalLM does not have: other"),
    "another shape": (lambda tensors: tensors.update({DOWN: torch.ones(48, 80)}), "other shapes"),
}


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("what", UNFIT)
def test_a_folder_that_does_not_hold_exactly_the_model_is_refused(
    what: str, precision: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, words = UNFIT[what]
    folder = tiny.write_base(tmp_path, tiny.CONFIGS["llama"]())
    rewrite(folder, change)
    capfd.readouterr()
    with pytest.raises(BaseModelError, match=words):
        load_base(folder, precision)
    assert capfd.readouterr() == ("", "")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    folder = tiny.write_base(tmp_path, tiny.CONFIGS["llama"]())
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    with pytest.raises(BaseModelError, match="ends within"):
        load_base(folder, "fp32")
    for damaged in (b"", whole[:4], whole[:40], b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(BaseModelError, match=r"model\.safetensors"):
            load_base(folder, "fp32")
    file.unlink()
    with pytest.raises(BaseModelError, match=r"no \.safetensors weights"):
        load_base(folder, "fp32")


PEAK = """
    import resource, sys, threading, time
    from pathlib import Path

    import psutil
    import torch

    from kivnun.model.load import load_base

    small, large, precision = sys.argv[1:]
    torch.set_num_threads(1)
    load_base(Path(small), precision)  # everything is imported and every code path has run
    process, highest, done = psutil.Process(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            highest[0] = max(highest[0], process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    base = load_base(Path(large), precision)
    done.set()
    watcher.join()
    held = sum(p.numel() * p.element_size() for p in {*base.model.parameters(), *base.model.buffers()})
    print(highest[0] - before, held)
"""


SLOW = pytest.mark.slow  # a start of Python each; the others load in the same way


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=SLOW), "bf16", "nf4", pytest.param("int8", marks=SLOW)])
def test_loading_takes_little_more_memory_than_what_is_loaded(precision: str, tmp_path: Path) -> None:
    """At most 1.1 of the loaded bytes and 20 MB: what a piece, the decode buffer, the probe and malloc take whatever the size."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 4096}
    config = transformers.LlamaConfig(**{**tiny.SIZES, **sizes, "num_key_value_heads": 2})
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "large")
    small = tiny.write_base(tmp_path / "small", tiny.CONFIGS["llama"]())
    command = [sys.executable, "-c", textwrap.dedent(PEAK), str(small), str(tmp_path / "large"), precision]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout
    peak, held = map(int, said.split())
    print(json.dumps({"precision": precision, "peak": peak, "held": held, "ratio": round(peak / held, 3)}))
    assert peak <= 1.1 * held + 20e6
