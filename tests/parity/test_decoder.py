"""Our own decoder: gradients against transformers', what it reads and writes, and a last layer for the tokens asked for alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from kivnun.data.packing import pack
from kivnun.errors import BaseModelError
from kivnun.model.attention import Rows
from kivnun.model.decoder import Decoder
from kivnun.model.load import Base, base_from_model, load_base
from kivnun.train.engine import Trainee
from kivnun.train.weights import FullWeights

TinyBase = Callable[[str], Path]
# Prompt and answer together on both sides of the window (12) and of LongRoPE's original length (24).
TRAINED = (1, 8, 12, 19, 30)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_own_families_are_computed_by_our_decoder_and_others_say_that_they_are_not(name: str, tiny_base: TinyBase):
    base = load_base(tiny_base(name), "fp32")
    assert isinstance(base.model, Decoder) == (name in tiny.OWN) == (base.slow == [])
    assert base.name == type(tiny.reference(tiny_base(name))).__name__


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_gradients_of_all_weights_are_transformers(name: str, recompute: bool, tiny_base: TinyBase):
    folder, rows = tiny_base(name), tiny.random_rows(TRAINED)
    total = sum(row.total_weight for row in rows)
    trainee = tiny.new_trainee(base := load_base(folder, "fp32", recompute=recompute), FullWeights(base))
    loss = trainee.forward_backward(pack(rows), total)
    model: Any = tiny.reference(folder)
    # Row by row: in a batch, transformers chooses LongRoPE's factors by the longest row.
    theirs = torch.stack([tiny.reference_loss(model, [row]) * (row.total_weight / total) for row in rows]).sum()
    theirs.backward()
    assert loss == pytest.approx(float(theirs.detach()), rel=1e-5)
    gradients = tiny.gradients(trainee)
    expected = dict(model.named_parameters())
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        if not key.endswith("k_proj.bias"):  # its true gradient is zero but for rotation, so what is compared would be rounding
            assert tiny.relative_difference(gradient, expected[key].grad) < 2e-5, key


@pytest.mark.parametrize("name", ["phi3", "qwen3"])
def test_checkpointing_holds_on_to_nothing_that_a_layer_would_be_made_again_from(name: str, tiny_base: TinyBase):
    """What a projection's way to its input holds is memory that autograd does not know of, and could not let go."""
    ways = []
    for recompute in (False, True):
        base = load_base(tiny_base(name), "fp32", recompute=recompute)
        with base.using(tiny.new_weights(base).sites()):
            waiting, seen = [base.hidden(torch.arange(20), torch.arange(20), Rows([20])).grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [before for before, _ in node.next_functions]
        ways.append(sum(getattr(node, "again", None) is not None for node in seen))
    assert ways[0] > 0
    assert ways[1] == 0


# --- the last layer, trimmed -------------------------------------------------------------------------------------------------


def untrimmed(base: Base) -> Base:
    """Make a base compute all tokens to the end and select afterwards."""
    trunk = base.trunk

    def whole(ids_T: Tensor, positions_T: Tensor, rows: Rows, select_S: Tensor | None) -> Tensor:
        h_TD = trunk(ids_T, positions_T, rows, None)
        return h_TD if select_S is None else h_TD.index_select(0, select_S)

    base.trunk = whole
    return base


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("name", [*tiny.OWN, "gemma2"])
def test_selected_tokens_have_the_states_they_have_among_all_to_the_bit(name: str, precision: str, tiny_base: TinyBase):
    base, lengths = load_base(tiny_base(name), precision), [1, 40, 13, 90]
    ids_T = torch.tensor([token for length in lengths for token in tiny.random_ids(length)])
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        whole_TD = base.hidden(ids_T, positions_T, Rows(lengths))
        for chosen in ([], [0], [143], [5, 6, 40, 41, 99], list(range(3, 140, 2)), list(range(144))):
            select_S = torch.tensor(chosen, dtype=torch.long)
            assert torch.equal(base.hidden(ids_T, positions_T, Rows(lengths), select_S), whole_TD[select_S]), chosen


def _step(trainee: Trainee) -> tuple[float, dict[str, Tensor]]:
    rows = tiny.random_rows((1, 7, 50, 2), prompt=20)
    loss = sum(trainee.forward_backward(pack(part), 60.0) for part in (rows[:1], rows[1:]))
    return loss, tiny.gradients(trainee)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("name", ["phi3", "phi4_mini", "qwen2_window", "qwen3", "gemma2"])
def test_loss_and_gradients_are_those_of_all_tokens(name: str, kind: Any, recompute: bool, tiny_base: TinyBase):
    """With dropout: the mask of a token does not depend on which others were selected with it."""
    steps = []
    for change in (copy.copy, untrimmed):
        base = change(load_base(tiny_base(name), "fp32", recompute=recompute))
        weights = FullWeights(base) if kind == "full" else tiny.new_weights(base, kind, dropout=0.3)
        steps.append(_step(tiny.new_trainee(base, weights)))
    (loss, gradients), (whole_loss, whole) = steps
    assert loss == whole_loss
    assert gradients.keys() == whole.keys()
    for key, gradient in gradients.items():
        if not key.endswith("k_proj.bias"):
            assert tiny.relative_difference(gradient, whole[key]) < 2e-6, key


# --- files -------------------------------------------------------------------------------------------------------------------

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def _stored(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _both(tensors: dict[str, Tensor], factor: float) -> None:
    tensors[HEAD] = tensors[TABLE] * factor


TIED: dict[str, tuple[Callable[[dict[str, Tensor]], object], bool]] = {
    "the table alone": (lambda tensors: None, True),
    "the head alone": (lambda tensors: tensors.update({HEAD: tensors.pop(TABLE)}), True),
    "both, equal": (lambda tensors: _both(tensors, 1.0), True),
    "both, another": (lambda tensors: _both(tensors, 1.5), False),
}


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("what", TIED)
def test_a_head_is_the_table_where_the_files_say_so(what: str, precision: str, tmp_path: Path):
    change, tied = TIED[what]
    folder = _stored(tiny.write_base(tmp_path / "base", tiny.CONFIGS["llama_biased"]()), change)
    base, model, ids = load_base(folder, precision), tiny.reference(folder), tiny.random_ids(20)
    assert isinstance(base.model, Decoder)
    assert base.tied == tied
    if precision == "nf4":
        return
    torch.testing.assert_close(tiny.packed_logits(base, [ids])[0], tiny.reference_logits(model, ids), rtol=0, atol=2e-5)
    base.save(tmp_path / "saved")
    again = tiny.reference(tmp_path / "saved")
    assert torch.equal(tiny.reference_logits(again, ids), tiny.reference_logits(model, ids))


def test_names_that_transformers_mends_are_mended_by_it(tmp_path: Path):
    """A model saved without its head lacks the prefix that a model with one gives to names."""
    folder = tiny.write_base(tmp_path, tiny.CONFIGS["llama_biased"]())

    def shortened(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    _stored(folder, shortened)
    base, ids = load_base(folder, "fp32"), tiny.random_ids(20)
    assert isinstance(base.model, Decoder)
    expected = tiny.reference_logits(tiny.reference(folder), ids)
    torch.testing.assert_close(tiny.packed_logits(base, [ids])[0], expected, rtol=0, atol=2e-5)


def test_a_head_that_is_its_own_must_be_there(tmp_path: Path):
    folder = _stored(tiny.write_base(tmp_path, tiny.CONFIGS["llama"]()), lambda tensors: tensors.pop(HEAD))
    with pytest.raises(BaseModelError, match=f"lacks tensors of LlamaForCausalLM: {HEAD}"):
        load_base(folder, "fp32")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["phi3", "phi3_tied", "phi4_mini", "llama_yarn", "mistral", "qwen2_window", "qwen3", "gemma2"])
def test_a_base_is_saved_as_transformers_saves_it(name: str, dtype: str, tiny_base: TinyBase, tmp_path: Path):
    folder = tmp_path / "base"
    model: Any = tiny.reference(tiny_base(name))
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(folder)
    load_base(folder, dtype).save(tmp_path / "ours")
    theirs: Any = tiny.reference(folder, torch.float32 if dtype == "fp32" else torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    files = {file.name: file.read_bytes() for file in (tmp_path / "theirs").iterdir()}
    assert files.keys() == {"config.json", "generation_config.json", "model.safetensors"}
    for file, content in files.items():
        assert (tmp_path / "ours" / file).read_bytes() == content, file


def test_a_large_base_is_saved_in_several_files(tiny_base: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save = transformers.PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        transformers.PreTrainedModel, "save_pretrained", lambda model, place: save(model, place, max_shard_size="40KB")
    )
    load_base(tiny_base("phi3"), "fp32").save(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = tiny.random_ids(20)
    again, first = (tiny.reference_logits(tiny.reference(folder), ids) for folder in (tmp_path, tiny_base("phi3")))
    assert torch.equal(again, first)


def test_a_model_in_memory_gives_its_tensors(tiny_base: TinyBase):
    model: Any = tiny.reference(tiny_base("llama_biased"))
    base = base_from_model(model, "fp32")
    assert isinstance(base.model, Decoder)
    assert base.tied
    for name, parameter in base.model.named_parameters():
        assert parameter.data_ptr() == model.get_parameter(name).data_ptr(), name
