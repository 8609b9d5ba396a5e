"""One question to a base of a foreign family that has just been loaded: does it compute packed rows as transformers alone does?

Any causal language model may be given. Those that carry state from token to token, bring an attention of their own or treat
their logits in a way unknown here would train on something else than they say, and nothing would look wrong. For the families of
our own decoder the parity tests hold the answer.
Shapes: L tokens of a row, V vocabulary. Next: `load.py` (who asks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kivnun.errors import BaseModelError
from kivnun.model.attention import NAME, Rows
from kivnun.model.foreign import ForeignTrunk

if TYPE_CHECKING:
    from kivnun.model.load import Base

LENGTH = 20
BLOCK = 5  # tokens: what leaks over a row's start is felt by its first tokens most

# Relative distance of logits: kernels differ by 1e-6 (bfloat16: 1e-2), unrelated logits by more than 1.
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.2}


@torch.no_grad()
def refuse_unlike_transformers(base: Base, trunk: ForeignTrunk) -> None:
    """Raise BaseModelError unless two rows in one pack have the logits that transformers gives them in a batch of two."""
    vocabulary = base.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    ids_2L = (torch.arange(2 * LENGTH, device=base.device) * 7 + 3).remainder(vocabulary).view(2, LENGTH)
    try:
        ours_2LV, theirs_2LV = _packed(base, ids_2L), _batched(base, trunk, ids_2L)
    except BaseModelError:
        raise
    except Exception as error:  # whatever a stranger's forward raises, the user needs one sentence
        raise BaseModelError(
            f"{base.name} cannot be run row by row: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            hint="use a causal language model that computes through transformers' attention interface",
        ) from error
    distance = float((_lengths(ours_2LV - theirs_2LV) / _lengths(theirs_2LV)).max())
    if not distance <= TOLERANCE[base.dtype]:
        raise BaseModelError(
            f"{base.name} does not compute packed rows as it computes them alone (logits differ by {distance:.2g} of their length)",
            hint="use a model whose tokens meet in attention alone: no recurrent or convolutional layers, no scaled logits",
        )


def _lengths(logits_2LV: Tensor) -> Tensor:
    """Return the length of each block of tokens' logits."""
    return logits_2LV.reshape(2 * LENGTH // BLOCK, -1).norm(dim=1)


def _packed(base: Base, ids_2L: Tensor) -> Tensor:
    positions_T = torch.arange(LENGTH, device=base.device).repeat(2)
    h_TD = base.hidden(ids_2L.flatten(), positions_T, Rows([LENGTH, LENGTH]))
    return base.head(h_TD).view(2, LENGTH, -1).float()


def _batched(base: Base, trunk: ForeignTrunk, ids_2L: Tensor) -> Tensor:
    """Return logits [2, L, V] by transformers' own forward and attention."""
    if trunk.packed is not None:
        trunk.packed.lengths = [LENGTH]
    base.model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        return base.model(input_ids=ids_2L, use_cache=False).logits.float()
    finally:
        base.model.set_attn_implementation(NAME)  # type: ignore[operator]
