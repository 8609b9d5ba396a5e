"""Where our decoder's weights come from, and where they go: a folder's files, or a model of transformers'.

Files that hold exactly the decoder's tensors are read one at a time, quantised as they are read where that is asked for. Whatever
else a folder holds goes through transformers, which renames and puts together tensors, or refuses (`read_model.py`); its tensors
are taken over then. Next: `decoder.py`, `stored.py` (how a tensor is read), `load.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kivnun.model.decoder import EMBEDDING, HEAD, BlankLinear, Decoder, Design, design_of
from kivnun.model.linear import TunableLinear
from kivnun.model.quantised import BLOCK, FORMS, DecodeBuffer, QuantisedMatrix
from kivnun.model.read_model import ReadModel, generation_config, read_model
from kivnun.model.stored import StoredCodes, StoredTensor, split_codes, stored_tensors

# Old files hold frequencies for each layer, which follow from the configuration.
PASSED_OVER = ".rotary_emb.inv_freq"


def read_decoder(
    folder: Path, config: Any, design: Design, rope_factors: str, dtype: torch.dtype, form: str | None, buffer: DecodeBuffer
) -> ReadModel:
    """Return the folder's decoder in `dtype`, its linear layers but the head as `form` ("nf4", "int8", None: dense).

    Codes that bitsandbytes has stored are taken as they are, and then nothing else is quantised. Raises BaseModelError as
    `read_model` does.
    """
    decoder = Decoder(config, design, rope_factors, dtype)
    plain, codes = split_codes(stored_tensors(folder))
    plain = {name: stored for name, stored in plain.items() if not name.endswith(PASSED_OVER)}
    if not _fit(decoder, plain, codes):
        return taken_over(read_model(folder, dtype, form, buffer), rope_factors)
    decoder.generation_config = generation_config(folder)
    config.name_or_path = str(folder)
    return ReadModel(decoder, _filled(decoder, plain, codes, None if codes else form, buffer))


def taken_over(read: ReadModel, rope_factors: str) -> ReadModel:
    """Return our decoder with the tensors of a model of transformers', or what was given where it is of another family."""
    model: Any = read.model
    design = design_of(model.config)
    if design is None or design.name != type(model).__name__:
        return read
    decoder = Decoder(model.config, design, rope_factors, model.dtype)
    decoder.generation_config = model.generation_config
    in_codes = {f"{name}.weight" for name in read.matrices}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in in_codes:
            _put(decoder, name, parameter)
    return ReadModel(decoder, read.matrices)


def as_transformers(decoder: Decoder, linears: Mapping[str, TunableLinear]) -> nn.Module:
    """Return transformers' model of the decoder's weights, for saving: it shares them, and it cannot compute."""
    from transformers import AutoModelForCausalLM

    weights: dict[str, Tensor] = dict(decoder.named_parameters(remove_duplicate=False))
    weights |= {f"{name}.weight": linear.dense() for name, linear in linears.items()}
    shared = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in weights.values()}
    with torch.device("meta"):
        config = copy.deepcopy(decoder.config)
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=weights[EMBEDDING].dtype, attn_implementation="eager", trust_remote_code=False
        )
    for name in dict(model.named_parameters(remove_duplicate=False)):
        _put(model, name, shared[id(weights[name])])
    if decoder.generation_config is not None:
        model.generation_config = decoder.generation_config
    return model


def _fit(decoder: Decoder, plain: Mapping[str, StoredTensor], codes: Mapping[str, StoredCodes]) -> bool:
    """Return whether these are exactly the decoder's tensors, but for one of two that are meant to be one."""
    stored = {name: it.shape for name, it in (*plain.items(), *codes.items())}
    needed = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    lacking = needed.keys() - stored.keys()
    complete = not lacking or (decoder.config.tie_word_embeddings and lacking in ({HEAD}, {EMBEDDING}))
    in_linears = all(type(decoder.get_submodule(name.removesuffix(".weight"))) is BlankLinear for name in codes if name in needed)
    return complete and in_linears and all(needed.get(name) == shape for name, shape in stored.items())


def _filled(
    decoder: Decoder, plain: Mapping[str, StoredTensor], codes: Mapping[str, StoredCodes], form: str | None, buffer: DecodeBuffer
) -> dict[str, QuantisedMatrix]:
    """Put the stored tensors into the decoder; return the matrices of the linear layers that are held in codes."""
    matrices = {name.removesuffix(".weight"): stored.open(buffer) for name, stored in codes.items() if name != HEAD}
    if HEAD in codes:  # everything that uses the head reads its weights as they are
        _put(decoder, HEAD, codes[HEAD].open(buffer).dense().clone())
    for name, stored in plain.items():
        module, _, kind = name.rpartition(".")
        if form and kind == "weight" and name != HEAD and type(decoder.get_submodule(module)) is BlankLinear:
            matrices[module] = FORMS[form].quantise(stored.pieces(stored.shape[1] * BLOCK), stored.shape, buffer)
        else:
            _put(decoder, name, stored.read(decoder.get_parameter(name).dtype))
    if decoder.config.tie_word_embeddings:
        _tie(decoder)
    return matrices


def _tie(decoder: Decoder) -> None:
    """Make embedding and head one. As transformers has it: where the files hold both and they differ, they stay two."""
    table, head = decoder.get_parameter(EMBEDDING), decoder.get_parameter(HEAD)
    if table.is_meta:
        _put(decoder, EMBEDDING, head)
    elif head.is_meta or torch.equal(table, head):
        _put(decoder, HEAD, table)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the model's parameter of this name; a parameter is taken as it is, and may be shared."""
    parent, _, child = name.rpartition(".")
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    setattr(model.get_submodule(parent), child, parameter)
