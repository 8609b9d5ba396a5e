"""Bases of 4 and 8 bits as a whole: equal to dense bases of the decoded weights, and to what bitsandbytes has saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from bitsandbytes_reference import decoded_nf4
from kivnun.data.packing import pack
from kivnun.errors import BaseModelError
from kivnun.model.families import count_parameters, stored_precision
from kivnun.model.generate import SamplingParams, generate
from kivnun.model.load import Base, load_base, read_decoded
from kivnun.model.quantised import FrozenMatrix, Nf4Matrix
from kivnun.train.engine import TorchEngine
from kivnun.train.weights import AdapterWeights

FORMS = ["nf4", "int8"]
FAMILIES = ["phi3", "phi3_tied", "phi4_mini", "phi", "llama", "qwen2", "gemma2"]


@pytest.fixture
def decoded_twin(tmp_path: Path) -> Callable[[Path, str], Base]:
    """Return a dense base in bfloat16 that holds the weights a quantised one computes with."""

    def twin(folder: Path, form: str) -> Base:
        read_decoded(folder, form).save_pretrained(tmp_path / "decoded")  # type: ignore[operator]
        return load_base(tmp_path / "decoded", "bf16")

    return twin


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_decoded_weights(
    name: str, form: str, tiny_base: Callable[[str], Path], decoded_twin: Callable[[Path, str], Base]
) -> None:
    base, twin = load_base(tiny_base(name), form), decoded_twin(tiny_base(name), form)
    assert base.dtype == torch.bfloat16
    assert base.num_parameters == twin.num_parameters
    rows = [tiny.random_ids(length) for length in (1, 12, 25, 40)]
    for ours, dense in zip(tiny.packed_logits(base, rows), tiny.packed_logits(twin, rows), strict=True):
        assert torch.equal(ours, dense)


@pytest.mark.parametrize("form", FORMS)
def test_all_linear_layers_but_the_head_are_held_in_codes(form: str, tiny_base: Callable[[str], Path]) -> None:
    base, dense = load_base(tiny_base("phi3"), form), load_base(tiny_base("phi3"), "bf16")
    held = {name for name, linear in base.linears.items() if isinstance(linear.matrix, FrozenMatrix)}
    assert held == base.linears.keys() - {base.head_name}
    assert torch.equal(base.linears[base.head_name].dense(), dense.linears[base.head_name].dense())


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_on_the_decoded_weights_after_evaluation_and_generation_too(
    form: str, kind: Any, tiny_base: Callable[[str], Path], decoded_twin: Callable[[Path, str], Base]
) -> None:
    folder = tiny_base("phi3")
    bases = load_base(folder, form), decoded_twin(folder, form)
    first, second = (pack(tiny.random_rows(trained)) for trained in ([5, 9, 17], [20, 3, 8]))
    gradients = []
    for base in bases:
        trainee = tiny.new_trainee(base, tiny.new_weights(base, kind))
        trainee.forward_backward(first, 31.0)
        trainee.optim_step(1e-3)
        trainee.forward(second)
        with base.using(trainee.weights.sites()):
            generate(base, [tiny.random_ids(7)], SamplingParams(5, ()))
        trainee.forward_backward(second, 31.0)
        gradients.append(tiny.gradients(trainee))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


def test_doras_lengths_start_as_those_of_the_decoded_rows(
    tiny_base: Callable[[str], Path], decoded_twin: Callable[[Path, str], Base]
) -> None:
    folder = tiny_base("phi3")
    starts = [
        tiny.new_weights(base, "dora", stirred=False).parameters()
        for base in (load_base(folder, "nf4"), decoded_twin(folder, "nf4"))
    ]
    for name, start in starts[0].items():
        assert torch.equal(start, starts[1][name]), name


def test_two_adapters_in_turn_leave_a_quantised_base_as_it_was(tiny_base: Callable[[str], Path]) -> None:
    base, batch = load_base(tiny_base("phi3"), "nf4"), pack(tiny.random_rows([5, 9, 17]))
    before = TorchEngine(base).base_model().forward(batch)
    for kind in ("lora", "dora"):
        trainee = tiny.new_trainee(base, tiny.new_weights(base, kind))
        trainee.forward_backward(batch, 31.0)
        trainee.optim_step(1e-2)
    assert (TorchEngine(base).base_model().forward(batch) == before).all()


# --- what transformers and bitsandbytes have saved ---------------------------------------------------------------------------


def saved_by_bitsandbytes(folder: Path, place: Path, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Any:
    """Save a model as transformers and bitsandbytes quantise it, and return it."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: nothing to compare with")
    settings = transformers.BitsAndBytesConfig(**config)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=dtype)
    model.save_pretrained(place)
    return model


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SAVED: dict[str, dict[str, Any]] = {
    "nf4": {**NF4, "bnb_4bit_use_double_quant": True},
    "nf4 with plain scales": NF4,
    "nf4 stored as bf16": {**NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "nf4 but for some": {**NF4, "llm_int8_skip_modules": ["lm_head", "o_proj"]},
    "nf4 with the head": {**NF4, "llm_int8_skip_modules": []},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("name", ["phi3", "qwen2"])
@pytest.mark.parametrize("how", SAVED)
def test_what_bitsandbytes_saved_is_read_to_the_bit(how: str, name: str, tiny_base: Callable[[str], Path], tmp_path: Path) -> None:
    theirs = saved_by_bitsandbytes(tiny_base(name), tmp_path, **SAVED[how])
    import bitsandbytes as bnb

    form = how.split(" ")[0]
    base = load_base(tmp_path, form)
    assert stored_precision(tmp_path) == form
    found = dict(base.model.named_parameters())
    for module_name, module in theirs.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            expected = decoded_nf4(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            expected = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).bfloat16()
        elif isinstance(module, torch.nn.Linear):
            expected = module.weight
        else:
            continue
        assert torch.equal(base.linears[module_name].dense(), expected), module_name
        quantised = isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) and module_name != base.head_name
        assert isinstance(base.linears[module_name].matrix, FrozenMatrix) == quantised, module_name
    for parameter_name, parameter in theirs.named_parameters():
        if parameter_name.endswith("norm.weight") or "embed" in parameter_name or parameter_name.endswith("bias"):
            assert torch.equal(found[parameter_name], parameter), parameter_name
    plain = load_base(tiny_base(name), "bf16")
    assert base.num_parameters == plain.num_parameters == count_parameters(tmp_path)


def test_quantising_here_is_quantising_by_transformers_and_bitsandbytes(tiny_base: Callable[[str], Path], tmp_path: Path) -> None:
    whole = tmp_path / "bf16"
    transformers.AutoModelForCausalLM.from_pretrained(tiny_base("llama"), dtype=torch.bfloat16).save_pretrained(whole)
    saved_by_bitsandbytes(whole, tmp_path / "theirs", **SAVED["nf4"])
    ours, theirs = load_base(whole, "nf4"), load_base(tmp_path / "theirs", "nf4")
    for name, parameter in theirs.model.named_parameters():
        assert torch.equal(ours.model.get_parameter(name).view(-1).view(torch.uint8), parameter.view(-1).view(torch.uint8)), name


def test_codes_of_another_kind_or_precision_are_refused(tiny_base: Callable[[str], Path], tmp_path: Path) -> None:
    saved_by_bitsandbytes(tiny_base("llama"), tmp_path / "fp4", load_in_4bit=True, bnb_4bit_quant_type="fp4")
    with pytest.raises(BaseModelError, match="quantised as fp4"):
        load_base(tmp_path / "fp4", "nf4")
    saved_by_bitsandbytes(tiny_base("llama"), tmp_path / "nf4", **NF4)
    for precision in ("fp32", "bf16", "int8"):
        with pytest.raises(BaseModelError, match=f"stored in nf4, so it cannot be loaded as {precision}"):
            load_base(tmp_path / "nf4", precision)
    config = json.loads((tmp_path / "nf4" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BaseModelError, match="quantised as gptq"):
        load_base(tmp_path / "nf4", "nf4")


DOWN = "model.layers.1.mlp.down_proj.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no scales": (lambda tensors: tensors.pop(f"{DOWN}.absmax"), "lacks"),
    "another table": (lambda tensors: tensors[f"{DOWN}.quant_map"].mul_(2), "another table than NF4's"),
    "too few codes": (lambda tensors: tensors.update({DOWN: tensors[DOWN][:-4].clone()}), "bytes of codes"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_codes_are_refused(what: str, tiny_base: Callable[[str], Path], tmp_path: Path) -> None:
    change, words = DAMAGE[what]
    saved_by_bitsandbytes(tiny_base("llama"), tmp_path, **SAVED["nf4"])
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=words):
        load_base(tmp_path, "nf4")


def test_linear_layers_of_a_larger_base_take_less_than_0_3_of_bfloat16(tmp_path: Path) -> None:
    sizes = {**tiny.SIZES, "hidden_size": 192, "intermediate_size": 512, "num_key_value_heads": 6}
    base = load_base(tiny.write_base(tmp_path, transformers.LlamaConfig(**sizes)), "nf4")
    matrices = [m for m in base.model.modules() if isinstance(m, Nf4Matrix)]
    held = sum(p.numel() * p.element_size() for m in matrices for p in m.parameters())
    assert held <= 0.30 * sum(2 * m.shape.numel() for m in matrices)


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_base_that_is_merged_answers_as_it_did(form: str, tiny_base: Callable[[str], Path]) -> None:
    from kivnun.export.merge import fold_in
    from kivnun.model.load import load_decoded

    folder, ids = tiny_base("phi3"), tiny.random_ids(30)
    base, merged = load_base(folder, form), load_decoded(folder, form)
    weights = tiny.new_weights(base)
    assert isinstance(weights, AdapterWeights)
    with base.using(weights.sites()):
        adapted = tiny.packed_logits(base, [ids])[0]
    fold_in(merged, weights.sites())
    assert tiny.relative_difference(tiny.packed_logits(merged, [ids])[0], adapted.float()) < 0.03
