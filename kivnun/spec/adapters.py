"""Options of the adapter: what is trained. A tagged union, so that an option an adapter lacks cannot be given to it.

`full` trains every weight; `lora` (Hu et al. 2021, arXiv:2106.09685) a low-rank product beside each linear layer; `dora` (Liu et
al. 2024, arXiv:2402.09353) that and the norm of each output. Next: `objectives.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, WithJsonSchema

from kivnun.spec.section import Allowed, Name, Section, Why, as_list, kind_chooser, wrong_value


def _targets(value: object) -> object:
    """Return `all-linear` as it is, a list of distinct names as a tuple; refuse the rest."""
    if value == "all-linear":
        return value
    items = as_list(value)
    if items is None:
        raise wrong_value(f"write [{value}] for one name" if isinstance(value, str) and value else None)
    if not items or not all(isinstance(item, str) and item.strip() for item in items):
        raise wrong_value()
    if len(set(items)) != len(items):
        raise wrong_value("each name once")
    return tuple(items)


TargetModules: TypeAlias = Annotated[
    Literal["all-linear"] | tuple[Name, ...],
    BeforeValidator(_targets),
    Allowed("all-linear, or a list of module names"),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": "all-linear", "type": "string"},
                {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"type": "string", "minLength": 1}},
            ]
        }
    ),
]


class FullSpec(Section, frozen=True):
    """Train every weight of the base; the result is a whole model."""

    kind: Annotated[
        Literal["full"],
        Why("names this adapter"),
    ] = Field(default="full", description="Every weight is trained.")


class LowRank(Section, frozen=True):
    """The options that LoRA and DoRA share."""

    kind: Annotated[Literal["lora", "dora"], Why("LoRA is the adapter every server and tool loads")] = Field(
        default="lora", description="Which low-rank adapter: lora, or dora, which also trains the norm of each output."
    )
    rank: Annotated[
        int,
        Why("what most tools and papers start from; below 1 % of a large base's size"),
    ] = Field(default=16, ge=1, le=1024, description="Rank of the update: the inner size of the product of B and A.")
    alpha: Annotated[
        float | None,
        Why("2 * rank, so that the update's scale alpha / rank is 2 whatever the rank; with rslora 8, the same at rank 16"),
    ] = Field(
        default=None, gt=0, description="Scale of the update: it is multiplied by alpha / rank, or alpha / sqrt(rank) with rslora."
    )
    dropout: Annotated[float, Why("few epochs over many rows overfit little, and zero keeps runs comparable")] = Field(
        default=0.0, ge=0, lt=1, description="Share of the adapter's inputs set to zero while training."
    )
    target_modules: Annotated[
        TargetModules,
        Why("adapting attention and MLP alike is what brings LoRA to full tuning's quality (arXiv:2305.14314, section 4)"),
    ] = Field(
        default="all-linear",
        description="Which linear layers get an adapter: all but the head, or those named, such as qkv_proj; each name must match.",
    )
    rslora: Annotated[bool, Why("alpha / rank is what other tools assume; turn it on above rank 64")] = Field(
        default=False, description="Scale by alpha / sqrt(rank) (arXiv:2312.03732), which keeps high ranks learning."
    )
    init: Annotated[Literal["kaiming", "gaussian"], Why("as PEFT does, so that runs compare")] = Field(
        default="kaiming", description="How A is drawn; B starts at zero, so that the tuned model starts as the base."
    )


class LoraSpec(LowRank, frozen=True):
    """Train a low-rank product beside each target; the base stays as it is."""

    kind: Annotated[Literal["lora"], Why("LoRA is the adapter every server and tool loads")] = Field(
        default="lora", description="A low-rank product beside each target module is trained."
    )


class DoraSpec(LowRank, frozen=True):
    """Train a low-rank product and the norm of each output; slower than LoRA, at times better at low rank."""

    kind: Literal["dora"] = Field(
        default="dora", description="As lora, and the norm of each output of a target module is trained too."
    )


AdapterSpec: TypeAlias = Annotated[
    Annotated[FullSpec, Tag("full")] | Annotated[LoraSpec, Tag("lora")] | Annotated[DoraSpec, Tag("dora")],
    Discriminator(kind_chooser("lora")),
]
