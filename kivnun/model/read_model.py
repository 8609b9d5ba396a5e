"""A model of transformers with a folder's tensors in it, read one at a time; quantised as they are read where that is asked for.

transformers builds the model, renames and puts together tensors of other files than its own, ties weights and makes what no file
holds. What it would take as it is, it is given zeros for that take no memory; they are replaced afterwards, one by one.
For families that our own decoder computes (`read_decoder.py`) this is asked only when their files do not hold just its tensors.
Next: `stored.py` (how a tensor is read), `quantised.py` (what becomes of it), `load.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kivnun.errors import BaseModelError
from kivnun.model import attention
from kivnun.model.families import read_config, refuse_family
from kivnun.model.quantised import BLOCK, FORMS, DecodeBuffer, QuantisedMatrix, pieces_of
from kivnun.model.stored import StoredTensor, split_codes, stored_tensors

SHOWN = 3
MISFITS = {
    "missing_keys": "lacks tensors of {}",
    "unexpected_keys": "holds tensors that {} does not have",
    "mismatched_keys": "holds tensors of other shapes than {} has (stored, needed)",
}


@dataclass(frozen=True, slots=True)
class ReadModel:
    """A model whose linear layers named in `matrices` hold no weights of their own."""

    model: nn.Module
    matrices: dict[str, QuantisedMatrix]


def read_model(folder: Path, dtype: torch.dtype, form: str | None, buffer: DecodeBuffer) -> ReadModel:
    """Return the folder's causal language model in `dtype`, its linear layers but the head as `form` ("nf4", "int8", None: dense).

    Codes that bitsandbytes has stored are taken as they are, and then nothing else is quantised. Raises BaseModelError when the
    folder does not hold exactly such a model.
    """
    plain, codes = split_codes(stored_tensors(folder))
    outline = _outline(folder, dtype)
    head = _head_name(outline)
    linears = {name for name, module in outline.named_modules() if type(module) is nn.Linear}
    to_quantise = sorted(linears - {head}) if form and not codes else []
    own = dict(outline.named_parameters()).keys() - _tied(outline)
    lazy = {name: _Absent(it.shape) if name in own else _Lazy(it) for name, it in plain.items()}
    model = _filled(folder, outline, dtype, lazy | {name: _Absent(it.shape) for name, it in codes.items()})
    foreign = [name for name in codes if name.removesuffix(".weight") not in linears]
    if foreign:
        raise _unfit(folder, "holds codes for what is no linear layer", foreign)

    matrices = {name.removesuffix(".weight"): stored.open(buffer) for name, stored in codes.items() if name != f"{head}.weight"}
    if f"{head}.weight" in codes:  # everything that uses the head reads its weights as they are
        model.get_parameter(f"{head}.weight").data = codes[f"{head}.weight"].open(buffer).dense().clone()
    for name in to_quantise:
        matrices[name] = _quantised(plain.get(f"{name}.weight"), model.get_submodule(name), FORMS[form or ""], buffer)
    without = {f"{name}.weight" for name in matrices}
    for name, stored in plain.items():
        if name in own and name not in without:
            parameter = model.get_parameter(name)
            parameter.data = stored.read(parameter.dtype)
    empty = [name for name, p in model.named_parameters() if name not in without and _takes_no_memory(p)]
    if empty:
        raise _unfit(folder, "leaves weights empty", empty)
    return ReadModel(model, matrices)


def _head_name(outline: nn.Module) -> str:
    head = outline.get_output_embeddings()  # type: ignore[operator]
    return next((name for name, module in outline.named_modules() if module is head), "")


def _tied(outline: nn.Module) -> set[str]:
    """Return the names whose tensors transformers compares, to see whether the files mean them to be one."""
    pairs: dict[str, str] = outline.all_tied_weights_keys  # type: ignore[assignment]
    return {*pairs.keys(), *pairs.values()}


def _takes_no_memory(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()


def decoded(read: ReadModel) -> nn.Module:
    """Return the model with its matrices decoded for good: transformers' own, with dense weights."""
    for name, matrix in read.matrices.items():
        linear: nn.Linear = read.model.get_submodule(name)  # type: ignore[assignment]
        linear.weight = nn.Parameter(matrix.dense().clone(), requires_grad=False)
    return read.model


def _quantised(stored: StoredTensor | None, linear: nn.Module, form: type[Any], buffer: DecodeBuffer) -> QuantisedMatrix:
    """Return a layer's matrix from its file, or, where transformers has renamed it or made it of several, from the layer."""
    weight = linear.get_parameter("weight")
    pieces = pieces_of(weight) if stored is None else stored.pieces(weight.shape[1] * BLOCK)
    return form.quantise(pieces, weight.shape, buffer)


@dataclass(frozen=True, slots=True)
class _Lazy:
    """A tensor of a file, as transformers 5 asks for one: first for all of it by `[...]`, then for a device and a dtype."""

    stored: StoredTensor

    def __getitem__(self, _key: object) -> _Lazy:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        return self.stored.read(dtype)


@dataclass(frozen=True, slots=True)
class _Absent:
    """Zeros in place of a weight that is not read: one number, seen under every index."""

    shape: torch.Size

    def __getitem__(self, _key: object) -> _Absent:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros((), dtype=dtype).expand(self.shape)


def hide_bars() -> None:
    """Keep transformers from drawing bars: what a person sees of a command is its own; bars within it only tear the screen.

    Nor shall DeepSpeed, which transformers imports where it is installed, say that it looked for a GPU.
    """
    from transformers.utils import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    logging.disable_progress_bar()


def open_config(folder: Path) -> Any:
    """Return transformers' configuration of a folder. Raises BaseModelError when it knows no such model.

    `trust_remote_code` is False here and wherever a model is made: unless told so, transformers asks at the terminal whether it may
    run the code that a model brings along."""
    from transformers import AutoConfig

    refuse_family(str(folder), read_config(folder))
    with told_simply(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    vars(config).pop("quantization_config", None)  # codes are read by `stored.py`; transformers would call bitsandbytes
    return config


def generation_config(folder: Path) -> Any:
    """Return what the folder says of generating, to go out with a result as it came in; None where it says nothing."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    with told_simply(folder):
        return GenerationConfig.from_pretrained(folder)


def _outline(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Return the folder's model without any weights."""
    from transformers import AutoModelForCausalLM

    attention.register()
    config = open_config(folder)
    with told_simply(folder), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=False)


def _filled(folder: Path, outline: nn.Module, dtype: torch.dtype, tensors: Mapping[str, object]) -> nn.Module:
    from transformers.utils import logging

    generation = generation_config(folder)
    hide_bars()
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # what does not fit is refused below, in fewer words
    try:
        with told_simply(folder):
            model, info = type(outline).from_pretrained(  # type: ignore[attr-defined]
                None,
                config=outline.config,
                state_dict=tensors,
                dtype=dtype,
                attn_implementation=attention.NAME,
                generation_config=generation,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(said)
    model.config.name_or_path = str(folder)
    kind = type(model).__name__
    for key, what in MISFITS.items():
        if info[key]:
            raise _unfit(folder, what.format(kind), info[key])
    return model


def _unfit(folder: Path, what: str, names: Iterable[Any]) -> BaseModelError:
    shown = sorted(str(name) for name in names)
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return BaseModelError(
        f"{folder} cannot be loaded: it {what}: {', '.join(shown[:SHOWN])}{more}",
        hint="download the model again, or save it with save_pretrained of the transformers version in use",
    )


@contextmanager
def told_simply(name: Path | str) -> Iterator[None]:
    """Turn what transformers raises into one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, KeyError):  # an attention class looked up by our name: it has an attention of its own
            reason = "it does not compute through transformers' attention interface"
        raise BaseModelError(
            f"{name} cannot be loaded as a causal language model: {reason}",
            hint="it must open with AutoModelForCausalLM.from_pretrained and use transformers' attention interface",
        ) from error
