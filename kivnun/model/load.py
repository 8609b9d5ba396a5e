"""A base: a pretrained model, pinned by hash, that knows no adapter, with one way into its trunk and its head.

Some families are computed by a decoder of our own, without transformers' modelling code; any other causal language model is
transformers', run row by row. In both, loading replaces linear layers and the embedding by tunable ones.
Shapes: T tokens of a pack, S selected ones of them, D model width, V vocabulary.
Next: `decoder.py`, `foreign.py` (the two), `adapters.py` (what is lent to a base), `loss.py` (what is done with the head).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kivnun.errors import BaseModelError
from kivnun.model import attention
from kivnun.model.attention import Rows
from kivnun.model.decoder import BlankLinear, Decoder, design_of
from kivnun.model.families import (
    WINDOW_IN_MASK,
    base_hash,
    read_config,
    refuse_family,
    refuse_other_base,
    refuse_other_precision,
)
from kivnun.model.foreign import ForeignTrunk, replace_module
from kivnun.model.kernels import Kernels, choose
from kivnun.model.linear import TunableEmbedding, TunableLinear
from kivnun.model.loss import FrozenHead, GraphHead
from kivnun.model.probe import refuse_unlike_transformers
from kivnun.model.products import whole
from kivnun.model.quantised import FORMS, DecodeBuffer, FrozenMatrix, QuantisedMatrix, pieces_of
from kivnun.model.read_decoder import as_transformers, read_decoder, taken_over
from kivnun.model.read_model import ReadModel, decoded, hide_bars, open_config, read_model
from kivnun.model.rope import RowRotary
from kivnun.model.sites import NormSite, Opened, PrefixSite, PromptSite, Site, Virtual, with_virtual_tokens

# What a base computes in. Quantised ones do so in bfloat16, as QLoRA does: half the memory of a decoded matrix and of activations,
# and digits enough beside those the codes leave out.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16, "int8": torch.bfloat16}


# Token ids, positions, rows and selected tokens (None: all) -> final hidden states.
Trunk = Callable[[Tensor, Tensor, Rows, Tensor | None], Tensor]

PIECE_ROWS = 4096  # rows of a matrix that are quantised at once: a multiple of a block


@dataclass(slots=True)
class Base:
    """A loaded base. `linears` holds every tunable linear layer by its name in the model; `head_name` is the language head's."""

    name: str  # of transformers' class
    model: nn.Module
    trunk: Trunk
    config: Any
    folder: Path
    content_hash: str
    dtype: torch.dtype
    device: torch.device
    linears: dict[str, TunableLinear]
    head_name: str
    tied: bool  # whether the head's weight is the embedding's
    rotary: RowRotary | None
    kernels: Kernels
    slow: list[str]  # one line for each kind of layer that is not on the fast path, and why
    virtual: Virtual | None = None  # lent: tokens before each row

    @property
    def num_parameters(self) -> int:
        """Return the number of weights; a tied matrix counts once."""
        codes = {p for module in self.model.modules() if isinstance(module, FrozenMatrix) for p in module.parameters()}
        plain = sum(p.numel() for p in self.model.parameters() if p not in codes)
        elsewhere = [
            linear for name, linear in self.linears.items() if linear.weight is None and not (self.tied and name == self.head_name)
        ]
        return plain + sum(linear.in_features * linear.out_features for linear in elsewhere)

    @contextmanager
    def using(self, sites: Mapping[str, Site]) -> Iterator[None]:
        """Lend sites to the layers of these names (virtual tokens to the base itself), and take them back whatever happens."""
        taken: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
        for name, site in sites.items():
            if isinstance(site, PromptSite | PrefixSite):
                self.virtual = site
                if isinstance(site, PromptSite):
                    self.embedding.prompt_PD = site.embeddings_PD
            elif isinstance(site, NormSite):
                norm = self.model.get_submodule(name)
                taken.append((norm, site.lend(norm)))
            else:
                self.linears[name].site = site
        try:
            yield
        finally:
            for norm, tensors in taken:
                norm._parameters.update(tensors)
            for name, site in sites.items():
                if isinstance(site, PromptSite | PrefixSite):
                    self.virtual = None
                    if isinstance(site, PromptSite):
                        self.embedding.prompt_PD = None
                elif not isinstance(site, NormSite):
                    self.linears[name].site = None

    @property
    def embedding(self) -> TunableEmbedding:
        """Return the table of token embeddings. Raises BaseModelError for a base whose table does more than look up."""
        table = self.model.get_input_embeddings()  # type: ignore[operator]
        if not isinstance(table, TunableEmbedding):
            raise BaseModelError(
                f"{self.name} embeds tokens by a layer of its own ({type(table).__name__}), which takes no virtual tokens",
                hint="use another adapter, such as lora or prefix",
            )
        return table

    def hidden(self, ids_T: Tensor, positions_T: Tensor, rows: Rows, select_S: Tensor | None = None) -> Tensor:
        """Return the final hidden states [T, D] of packed rows, or those of the selected tokens alone, [S, D].

        `positions_T` are positions within rows. Virtual tokens that were lent come before each row, and are not among the tokens
        returned. Packs are padded to whole numbers of rows by a row of their own (`products.whole`), selections by tokens whose
        states nobody sees. Raises BaseModelError for branches that belong to rows which turn them by different factors.
        """
        self._refuse_two_rotations(rows, positions_T)
        if self.virtual is not None:
            opened = self._with_virtual(ids_T, positions_T, rows)
            ids_T, positions_T, rows = opened.ids_T, opened.positions_T, opened.rows
            select_S = opened.places_T if select_S is None else opened.places_T[select_S]
        num_tokens = len(ids_T)
        short = whole(num_tokens, self.kernels, self.dtype) - num_tokens
        if short > 0:
            ids_T = torch.cat([ids_T, ids_T.new_zeros(short)])
            positions_T = torch.cat([positions_T, torch.arange(short, device=positions_T.device)])
            parents = None if rows.parents is None else [*rows.parents, -1]
            rows = replace(rows, lengths=[*rows.lengths, short], slots=[*rows.slots, None], parents=parents)
        # Of this pass alone: what its layers share (bounds) must not outlive it.
        rows = replace(rows, kernels=self.kernels, _bounds=None)
        if select_S is None:
            return self.trunk(ids_T, positions_T, rows, None)[:num_tokens]
        num_selected = len(select_S)
        filled_S = torch.cat([select_S, select_S.new_zeros(whole(num_selected, self.kernels, self.dtype) - num_selected)])
        return self.trunk(ids_T, positions_T, rows, filled_S)[:num_selected]

    def _with_virtual(self, ids_T: Tensor, positions_T: Tensor, rows: Rows) -> Opened:
        assert self.virtual is not None
        longest = int(positions_T.max()) + 1 + self.virtual.count
        # Virtual tokens of a prompt are turned as their row is, those of a prefix never.
        by_length = self.rotary is not None and self.rotary.turns_by_length(longest) and isinstance(self.virtual, PromptSite)
        return with_virtual_tokens(
            self.virtual, self.vocabulary, ids_T, positions_T, rows, one_branch=rows.cache is None and not by_length
        )

    @property
    def vocabulary(self) -> int:
        """Return how many tokens the embedding knows: the first id of virtual ones."""
        return int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator, union-attr]

    def is_long(self, length: int) -> bool:
        """Return whether a row of so many tokens, virtual ones not counted, takes LongRoPE's long factors."""
        count = 0 if self.virtual is None else self.virtual.count
        return self.rotary is not None and self.rotary.is_long(length + count)

    def _refuse_two_rotations(self, rows: Rows, positions_T: Tensor) -> None:
        if rows.parents is None or self.rotary is None:
            return
        longest = int(positions_T.max()) + 1 + (0 if self.virtual is None else self.virtual.count)
        if self.rotary.turns_by_length(longest):
            raise BaseModelError(
                f"rows of more than {self.rotary.original_length:,} tokens are rotated by other factors than shorter ones, so that "
                f"what they begin with cannot be shared; the longest has {longest:,}",
                hint="set base.rope_factors to long or short, or leave compute.share_prefixes out",
            )

    def save(self, folder: Path) -> None:
        """Write the weights as they are now, as a folder that transformers loads."""
        hide_bars()
        model: Any = as_transformers(self.model, self.linears) if isinstance(self.model, Decoder) else self.model
        model.save_pretrained(folder)

    def padded(self, values_T: np.ndarray) -> np.ndarray:
        """Return per-token values with zeros for the tokens that `hidden` adds to a pack."""
        return np.pad(values_T, (0, whole(len(values_T), self.kernels, self.dtype) - len(values_T)))

    def language_head(self, parameters: Sequence[Tensor]) -> FrozenHead | GraphHead:
        """Return the head for a loss, which trains `parameters`: by two plain products where it is a frozen matrix and no more."""
        linear = self.linears[self.head_name]
        capped = getattr(self.config, "final_logit_softcapping", None) is not None
        if parameters or capped or linear.site is not None:
            return GraphHead(self._logits, parameters, self.kernels)
        return FrozenHead(linear)

    def head(self, h_CD: Tensor) -> Tensor:
        """Return logits [C, V] of hidden states [C, D], with what the family does to them after the head."""
        return self._capped(self.linears[self.head_name](h_CD))

    def _logits(self, h_CD: Tensor) -> Tensor:
        """Return the same for a loss, which goes through its chunks with the head's weights at hand: no hook is called."""
        return self._capped(self.linears[self.head_name].forward(h_CD))

    def _capped(self, logits_CV: Tensor) -> Tensor:
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return logits_CV if softcap is None else torch.tanh(logits_CV / softcap) * softcap


def load_base(
    folder: Path,
    precision: str,
    device: str = "cpu",
    rope_factors: str = "per_row",
    *,
    kernels: str = "auto",
    recompute: bool = False,
    packed: bool = False,
    content_hash: str | None = None,
) -> Base:
    """Return the base in `folder` in `precision` ("fp32", "bf16", "nf4" or "int8") on `device` ("cpu" or "cuda").

    Memory stays near that of what is loaded: tensors are read, converted and quantised one at a time. With `packed` the weights of
    linear layers are kept as a CPU's products read them: faster, for twice their bytes, and only for a base that stays as it is.
    Raises BaseModelError when the folder holds no causal language model that Kivnun can run row by row, or holds it in another
    precision for good; IntegrityError when its hash is not the `content_hash` that was asked for, before anything is read into
    memory, or when a file of the hub's cache is damaged.
    """
    refuse_unsupported(folder, read_config(folder))
    found = base_hash(folder)
    refuse_other_base(folder, found, content_hash)
    chosen = choose(kernels, device)
    read = _read(folder, precision, rope_factors, chosen if device == "cpu" else choose("auto", "cpu"))
    for matrix in read.matrices.values():  # quantised on the CPU, decoded where the base computes
        matrix.buffer.kernels = chosen
    base = _prepared(folder, read, DTYPES[precision], device, rope_factors, chosen, recompute, found)
    if packed:
        for linear in base.linears.values():
            linear.pack()
    return base


@torch.no_grad()
def base_from_model(
    model: nn.Module, precision: str, device: str = "cpu", *, kernels: str = "auto", recompute: bool = False
) -> Base:
    """Return transformers' causal language model as a base, as `load_base` would of its folder; the model itself is changed.

    For models that were made where they are used, with weights of no file: no hash names them. Weights are quantised where the
    model is, one matrix at a time.
    """
    chosen, dtype = choose(kernels, device), DTYPES[precision]
    attention.register()
    model.set_attn_implementation(attention.NAME)  # type: ignore[operator]
    head, matrices, buffer = model.get_output_embeddings(), {}, DecodeBuffer(dtype, chosen)  # type: ignore[operator]
    for name, module in model.named_modules():
        if precision in FORMS and type(module) is nn.Linear and module is not head:
            matrices[name] = FORMS[precision].quantise(_pieces_for(precision, module.weight), module.weight.shape, buffer)
            module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    read = taken_over(ReadModel(model, matrices), "per_row")
    return _prepared(Path(type(model).__name__), read, dtype, device, "per_row", chosen, recompute, "in memory")


def _pieces_for(precision: str, weight_OI: Tensor) -> Iterator[Tensor]:
    """Yield pieces of a matrix where they can be quantised: int8's encoding is for the CPU alone."""
    for piece in pieces_of(weight_OI, PIECE_ROWS):
        yield piece if precision == "nf4" else piece.cpu()


def load_decoded(folder: Path, precision: str, rope_factors: str = "per_row") -> Base:
    """Return the base in `folder` as quantised in `precision` ("nf4" or "int8"), its matrices decoded for good, in float32.

    The weights are the values that the quantised base computes with: rounded to bfloat16, then widened.
    """
    kernels = choose("auto", "cpu")
    read = _read(folder, precision, rope_factors, kernels)
    dense = ReadModel(decoded(read).float(), {})
    return _prepared(folder, dense, torch.float32, "cpu", rope_factors, kernels, False, base_hash(folder))


def read_decoded(folder: Path, precision: str) -> nn.Module:
    """Return transformers' own model with the weights that a base quantised in `precision` computes with."""
    refuse_unsupported(folder, read_config(folder))
    refuse_other_precision(folder, precision)
    dtype = DTYPES[precision]
    return decoded(read_model(folder, dtype, precision if precision in FORMS else None, DecodeBuffer(dtype, choose("auto", "cpu"))))


def _read(folder: Path, precision: str, rope_factors: str, kernels: Kernels) -> ReadModel:
    refuse_unsupported(folder, read_config(folder))
    refuse_other_precision(folder, precision)
    dtype, form = DTYPES[precision], precision if precision in FORMS else None
    buffer, config = DecodeBuffer(dtype, kernels), open_config(folder)
    design = design_of(config)
    if design is None:
        return read_model(folder, dtype, form, buffer)
    return read_decoder(folder, config, design, rope_factors, dtype, form, buffer)


def _prepared(
    folder: Path,
    read: ReadModel,
    dtype: torch.dtype,
    device: str,
    rope_factors: str,
    kernels: Kernels,
    recompute: bool,
    content_hash: str,
) -> Base:
    model = read.model
    name = model.name if isinstance(model, Decoder) else type(model).__name__
    linears, head_name = _install_tunables(model, name, read.matrices, kernels)
    model.to(device)
    model.eval()
    model.requires_grad_(False)
    if isinstance(model, Decoder):
        model.recompute = recompute
        trunk, rotary = model, model.rotary
    else:
        trunk = ForeignTrunk(model, rope_factors, recompute)
        rotary = trunk.packed and trunk.packed.by_row
    base = Base(
        name=name,
        model=model,
        trunk=trunk,
        config=model.config,
        folder=folder,
        content_hash=content_hash,
        dtype=dtype,
        device=torch.device(device),
        linears=linears,
        head_name=head_name,
        tied=linears[head_name].weight is model.get_input_embeddings().weight,  # type: ignore[operator, union-attr]
        rotary=rotary if isinstance(rotary, RowRotary) else None,
        kernels=kernels,
        slow=trunk.slow if isinstance(trunk, ForeignTrunk) else [],
    )
    if isinstance(trunk, ForeignTrunk):
        refuse_unlike_transformers(base, trunk)
    return base


def refuse_unsupported(name: Path | str, config: Mapping[str, object]) -> None:
    """Raise BaseModelError for a base whose config.json tells that it cannot be run, whatever its weights are."""
    refuse_family(str(name), config)
    _refuse_unseen_rules(name, config)
    for key in ("logit_scale", "logits_scaling"):
        if config.get(key) not in (None, 1, 1.0):
            raise BaseModelError(f"{name} scales its logits by {key}, which is not supported", hint="use another base")


def _refuse_unseen_rules(name: Path | str, config: Mapping[str, object]) -> None:
    """Refuse what a short probe cannot show: rules that only longer rows would meet."""
    window = None if config.get("use_sliding_window") is False else config.get("sliding_window")
    longest = config.get("max_position_embeddings")
    if config.get("model_type") in WINDOW_IN_MASK and isinstance(window, int) and isinstance(longest, int) and window < longest:
        raise BaseModelError(
            f"{name} has a sliding window of {window} that its attention is not told of, so it would not be kept",
            hint="use another base, or one of this family whose window covers max_position_embeddings",
        )
    if config.get("attention_chunk_size") is not None:
        raise BaseModelError(f"{name} attends within chunks, which is not supported", hint="use another base")


def _install_tunables(
    model: nn.Module, name: str, matrices: Mapping[str, QuantisedMatrix], kernels: Kernels
) -> tuple[dict[str, TunableLinear], str]:
    """Put tunable layers in the place of plain ones; return the linear ones by name, and the language head's name."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears: dict[str, TunableLinear] = {}
    head_name = ""
    for at, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and type(module) in (nn.Linear, BlankLinear):
            linears[at] = TunableLinear(module, kernels, matrices.get(at))
            replace_module(model, at, linears[at])
            head_name = at if module is head else head_name
        elif type(module) is nn.Embedding:
            replace_module(model, at, TunableEmbedding(module))
    if not head_name:
        raise BaseModelError(f"{name} has no linear language head", hint="use a causal language model")
    return linears, head_name
