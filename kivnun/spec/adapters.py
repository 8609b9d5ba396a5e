"""Options of the adapter: what is trained. A tagged union, so that an option an adapter lacks cannot be given to it.

`full` trains every weight; `lora` (Hu et al. 2021, arXiv:2106.09685) a low-rank product beside each linear layer; `dora` (Liu et
al. 2024, arXiv:2402.09353) that and the norm of each output. The others are PEFT's: other deltas of a layer (loha, lokr, vera,
adalora, ia3), the norms alone (ln_tuning), or virtual tokens before every row (prompt, prefix). Next: `objectives.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, WithJsonSchema, field_validator

from kivnun.spec.section import Allowed, Name, Section, SpecPath, Why, as_list, broken_rule, kind_chooser, wrong_value


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


class Targeted(Section, frozen=True):
    """The option that all adapters of linear layers share."""

    target_modules: Annotated[
        TargetModules,
        Why("adapting attention and MLP alike is what brings LoRA to full tuning's quality (arXiv:2305.14314, section 4)"),
    ] = Field(
        default="all-linear",
        description="Which linear layers get an adapter: all but the head, or those named, such as qkv_proj; each name must match.",
    )


class LowRank(Targeted, frozen=True):
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
    rslora: Annotated[bool, Why("alpha / rank is what other tools assume; turn it on above rank 64")] = Field(
        default=False, description="Scale by alpha / sqrt(rank) (arXiv:2312.03732), which keeps high ranks learning."
    )
    start_from: Annotated[SpecPath | None, Why("a new adapter, which changes nothing at its start")] = Field(
        default=None,
        description="An adapter to go on with: a run, its adapter folder, or any PEFT folder. Its rank, alpha, rslora and target "
        "modules are taken over; the base must be the one it was trained on; the optimizer starts anew.",
    )
    init: Annotated[Literal["kaiming", "gaussian", "pissa", "olora", "eva"], Why("as PEFT does, so that runs compare")] = Field(
        default="kaiming",
        description="How A and B start; the tuned model starts as the base in any case. kaiming and gaussian draw A, eva takes the "
        "directions along which the layer's inputs vary most on training rows drawn by the seed (arXiv:2410.07170); B is zero. "
        "pissa takes the weight's largest singular values (arXiv:2404.02948), olora its QR (arXiv:2406.01775); their result is "
        "written as LoRA of twice the rank, which loads on the base as it is.",
    )
    loraplus_lr_ratio: Annotated[
        float, Why("1 is plain LoRA; arXiv:2402.12354 finds 16 better for hard tasks, at a lower rate")
    ] = Field(default=1.0, ge=1, le=1024, description="Learning rate of B over that of A (LoRA+).")

    @field_validator("init")
    @classmethod
    def _one_start(cls, init: str, info: ValidationInfo) -> str:
        if init != "kaiming" and info.data.get("start_from") is not None:
            raise broken_rule(f"is {init}, but adapter.start_from brings A and B as they were trained", "leave one of them out")
        return init

    @field_validator("init")
    @classmethod
    def _start_without_dropout(cls, init: str, info: ValidationInfo) -> str:
        if init in ("pissa", "olora") and info.data.get("dropout"):
            raise broken_rule(
                f"is {init}, whose start is taken off again and must not be dropped", "set adapter.dropout to 0, or leave init out"
            )
        return init


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


class Ia3Spec(Targeted, frozen=True):
    """Train a factor per output of each target, or per input of the second layer of an MLP (Liu et al. 2022, arXiv:2205.05638)."""

    kind: Literal["ia3"] = Field(
        default="ia3", description="One factor per output of each target is trained, and per input of an MLP's second layer."
    )


class LohaSpec(Targeted, frozen=True):
    """Train the elementwise product of two low-rank products (Hyeon-Woo et al. 2022, arXiv:2108.06098)."""

    kind: Literal["loha"] = Field(default="loha", description="The elementwise product of two low-rank products is trained.")
    rank: Annotated[int, Why("two products of rank 8 reach up to rank 64")] = Field(
        default=8, ge=1, le=1024, description="Rank of each of the two products."
    )
    alpha: Annotated[float | None, Why("2 * rank, so that the update's scale alpha / rank is 2 whatever the rank")] = Field(
        default=None, gt=0, description="Scale of the update: it is multiplied by alpha / rank."
    )


class LokrSpec(Targeted, frozen=True):
    """Train a Kronecker product of a small matrix and a low-rank one (Yeh et al. 2024, arXiv:2309.14859)."""

    kind: Literal["lokr"] = Field(
        default="lokr", description="A Kronecker product of a small matrix and a low-rank one is trained."
    )
    rank: Annotated[int, Why("what most tools start from")] = Field(
        default=8, ge=1, le=1024, description="Rank of the larger factor; one that is no smaller by it is trained whole."
    )
    alpha: Annotated[float | None, Why("2 * rank, so that the update's scale alpha / rank is 2 whatever the rank")] = Field(
        default=None, gt=0, description="Scale of the update: it is multiplied by alpha / rank."
    )
    decompose_factor: Annotated[int, Why("-1 makes the two factors as alike in size as the weight allows")] = Field(
        default=-1, ge=-1, le=1024, description="Largest size of the smaller factor's sides; -1 for no limit."
    )
    decompose_both: Annotated[bool, Why("the smaller factor is small already")] = Field(
        default=False, description="Hold the smaller factor as a low-rank product too, where that is smaller."
    )


class VeraSpec(Targeted, frozen=True):
    """Train two vectors beside fixed random matrices that all layers share (Kopiczko et al. 2024, arXiv:2310.11454)."""

    kind: Literal["vera"] = Field(default="vera", description="Two vectors per target beside random matrices that all share.")
    rank: Annotated[int, Why("as in the paper: what is trained hardly grows with it")] = Field(
        default=256, ge=1, le=4096, description="Rank of the shared random matrices."
    )
    d_initial: Annotated[float, Why("as in the paper, table 9")] = Field(
        default=0.1, gt=0, description="What the vector of the rank starts at; that of the outputs starts at zero."
    )


class AdaloraSpec(Targeted, frozen=True):
    """Train singular vectors and values, and leave the ranks to the layers that need them (Zhang et al. 2023, arXiv:2303.10512)."""

    kind: Literal["adalora"] = Field(default="adalora", description="Ranks are given up, step by step, where they matter least.")
    rank: Annotated[int, Why("half as much again as target_rank, as in the paper")] = Field(
        default=12, ge=2, le=1024, description="Rank that every target starts with."
    )
    target_rank: Annotated[int, Why("what PEFT starts from")] = Field(
        default=8, ge=1, le=1023, description="Rank left at the end, on average over the targets; below rank."
    )
    alpha: Annotated[float | None, Why("2 * rank, so that the update's scale alpha / rank is 2 whatever the rank")] = Field(
        default=None, gt=0, description="Scale of the update: it is multiplied by alpha / rank."
    )
    initial_share: Annotated[float, Why("a little training first shows what matters")] = Field(
        default=0.1, ge=0, lt=1, description="Share of the steps before the first rank is given up."
    )
    final_share: Annotated[float, Why("what is left needs steps of its own")] = Field(
        default=0.3, ge=0, lt=1, description="Share of the steps after the last rank was given up."
    )
    allocate_every_steps: Annotated[int, Why("runs here are short; longer ones may look less often")] = Field(
        default=1, ge=1, description="Steps between two looks at the budget."
    )
    orth_reg_weight: Annotated[float, Why("as in PEFT")] = Field(
        default=0.5,
        ge=0,
        description="Weight of the penalty that keeps singular vectors orthogonal; no part of the loss shown.",
    )

    @field_validator("target_rank")
    @classmethod
    def _below_rank(cls, target_rank: int, info: ValidationInfo) -> int:
        rank = info.data.get("rank")
        if isinstance(rank, int) and target_rank >= rank:
            raise broken_rule(
                f"is {target_rank}, but must be below adapter.rank, which is {rank}", "lower it, or raise adapter.rank"
            )
        return target_rank

    @field_validator("final_share")
    @classmethod
    def _leaves_time(cls, final_share: float, info: ValidationInfo) -> float:
        initial = info.data.get("initial_share")
        if isinstance(initial, float) and initial + final_share >= 1:
            raise broken_rule(
                f"is {final_share:g}, which with initial_share {initial:g} leaves no step to give ranks up in", "lower one of them"
            )
        return final_share


class LnTuningSpec(Section, frozen=True):
    """Train the norms of the base and nothing else (Zhao et al. 2023, arXiv:2312.11420)."""

    kind: Literal["ln_tuning"] = Field(default="ln_tuning", description="The base's norms are trained.")


class PromptSpec(Section, frozen=True):
    """Train embeddings of virtual tokens before every row (Lester et al. 2021, arXiv:2104.08691)."""

    kind: Literal["prompt"] = Field(default="prompt", description="Embeddings of virtual tokens before every row are trained.")
    num_virtual_tokens: Annotated[int, Why("from 20 on the paper saw little gain")] = Field(
        default=20, ge=1, le=1024, description="Virtual tokens."
    )


class PrefixSpec(Section, frozen=True):
    """Train keys and values of virtual tokens before every row, in every layer (Li and Liang 2021, arXiv:2101.00190)."""

    kind: Literal["prefix"] = Field(
        default="prefix", description="Keys and values of virtual tokens before every row are trained, in every layer."
    )
    num_virtual_tokens: Annotated[int, Why("between the 10 and 200 that the paper found best for its two tasks")] = Field(
        default=20, ge=1, le=1024, description="Virtual tokens."
    )


AdapterSpec: TypeAlias = Annotated[
    Annotated[FullSpec, Tag("full")]
    | Annotated[LoraSpec, Tag("lora")]
    | Annotated[DoraSpec, Tag("dora")]
    | Annotated[AdaloraSpec, Tag("adalora")]
    | Annotated[LohaSpec, Tag("loha")]
    | Annotated[LokrSpec, Tag("lokr")]
    | Annotated[VeraSpec, Tag("vera")]
    | Annotated[Ia3Spec, Tag("ia3")]
    | Annotated[LnTuningSpec, Tag("ln_tuning")]
    | Annotated[PromptSpec, Tag("prompt")]
    | Annotated[PrefixSpec, Tag("prefix")],
    Discriminator(kind_chooser("lora")),
]


def dropout_of(adapter: AdapterSpec) -> float:
    """Return the share of inputs that an adapter drops; 0 for those without dropout."""
    return adapter.dropout if isinstance(adapter, LowRank) else 0.0
