"""How many floating-point operations a step needs at least: the numerator of every "share of the floor".

Counted is useful work only: no padding, no scores of unsupervised positions, no masked half of the attention, no recomputation,
and no gradient that nobody asks for. A product of [m, k] and [k, n] is 2 m k n. With T tokens in rows of length L, S supervised
positions, N weights in the linear layers, D model width, V vocabulary, R rank, and I, O the width of a linear layer's sides:

    linear layers   4 N T                   forward, and the gradient of the input (a frozen weight has none)
    head            4 D V S                 the same, at supervised positions
    LoRA            6 R (I + O) T           x A', (x A') B', and four products of the backward pass, summed over sites
    attention       6 L (L + 1) heads dim   Q K' and P V, then four products backward, causal half; per row and layer
    first layer     - 2 I (O + R) T         the embedding needs no gradient, so the first projection gives none
    last layer      S in place of T         after its attention, since only supervised positions go on to the head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.engine.workload import RANK, Model, Row


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Floating-point operations of one step, by what they are spent on."""

    linear: int
    head: int
    adapter: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.head + self.adapter + self.attention


def step_flops(model: Model, rows: Sequence[Row], variant: str = "lora", objective: str = "likelihood") -> StepFlops:
    """Return the operations of one LoRA step over these rows.

    "dora" adds W A' once (2 N R) for the lengths of the adapted rows; "head" adds an adapter on the head, at supervised
    positions; "dpo" adds a forward pass of the head, since the loss must be known before its gradient. Dropout and rsLoRA add
    nothing that is a product of matrices.
    """
    tokens = sum(len(row.ids) for row in rows)
    supervised = sum(sum(row.supervised) for row in rows)
    first_inputs, first_outputs = model.linears["self_attn.qkv_proj"]
    widths = model.layers * sum(inputs + outputs for inputs, outputs in model.linears.values())
    adapter = 6 * RANK * widths * tokens - 2 * first_inputs * RANK * tokens
    after_attention = [shape for name, shape in model.linears.items() if name != "self_attn.qkv_proj"]
    adapter -= 6 * RANK * sum(map(sum, after_attention)) * (tokens - supervised)
    spared = 4 * sum(inputs * outputs for inputs, outputs in after_attention) * (tokens - supervised)
    if variant == "dora":
        adapter += 2 * model.linear_parameters * RANK
    if variant == "head":
        adapter += 6 * RANK * (model.hidden + model.vocab) * supervised
    return StepFlops(
        linear=4 * model.linear_parameters * tokens - 2 * first_inputs * first_outputs * tokens - spared,
        head=(6 if objective == "dpo" else 4) * model.hidden * model.vocab * supervised,
        adapter=adapter,
        attention=6 * model.layers * model.heads * model.head_dim * sum(len(r.ids) * (len(r.ids) + 1) for r in rows),
    )
