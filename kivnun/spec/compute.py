"""Options of compute: the shape of the engine. Where it runs is not the spec's business. Next: `tune.py`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from kivnun.spec.section import Section, SpecPath, Why, broken_rule, kind_chooser


class Shape(Section, frozen=True):
    """The options that every shape of the engine has."""

    kind: Annotated[Literal["local", "multi_process"], Why("one process needs nothing set up")] = Field(
        default="local", description="One process, or several."
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], Why("a GPU where there is one, else the CPU")] = Field(
        default="auto", description="What computes."
    )
    threads: Annotated[int | None, Why("as many as the process may use cores; pinned, since sums depend on it")] = Field(
        default=None, ge=1, le=1024, description="CPU threads."
    )
    micro_batch_tokens: Annotated[
        int | None,
        Why(
            "the longest row or, if larger, 4096; on a CPU 640 (fp32: 512) from 50 M parameters on, unless prefixes are shared: as "
            "fast there, in less memory; fewer where the plan finds that memory does not hold so many"
        ),
    ] = Field(
        default=None,
        ge=1,
        description="Tokens of one forward and backward pass, at most; the result of a step does not depend on it.",
    )
    activation_checkpointing: Annotated[
        bool | None, Why("it costs a second forward pass: off, unless the plan finds that a run does not fit in memory without")
    ] = Field(
        default=None,
        description="Keep each layer's input alone and compute the rest again in the backward pass: less memory, more time.",
    )
    share_prefixes: Annotated[
        bool, Why("it changes the order of sums, and so the last bits; turn it on where rows begin with the same long prompt")
    ] = Field(
        default=False,
        description="Compute what rows of one pass begin with once: less time for long common prompts and for preference pairs. "
        "Needs an adapter without dropout.",
    )
    kernels: Annotated[
        Literal["auto", "native", "triton", "torch"],
        Why("those in C on a CPU, in Triton on a GPU, where they can be built, else torch; pinned, since last bits depend on it"),
    ] = Field(
        default="auto",
        description="What computes norms, gates, attention and the loss: kernels in C (CPU), in Triton (GPU), or torch.",
    )


class LocalSpec(Shape, frozen=True):
    """One process on this machine."""

    kind: Annotated[
        Literal["local"],
        Why("one process needs nothing set up"),
    ] = Field(default="local", description="One process.")
    packed_weights: Annotated[
        bool | None, Why("where kernels in C train an adapter, while it takes no more than an eighth of the machine's memory")
    ] = Field(
        default=None,
        description="Keep a frozen base's weights as the products of kernels in C read them: faster, for twice their bytes.",
    )


class MultiProcessSpec(Shape, frozen=True):
    """Several processes, on one machine or more, that divide rows and state among them (ZeRO, Rajbhandari et al. 2020)."""

    kind: Literal["multi_process"] = Field(
        default="multi_process", description="Several processes: started on this machine, or by torchrun on several."
    )
    processes: Annotated[int, Why("two are the fewest that divide anything")] = Field(
        default=2, ge=1, le=4096, description="How many processes, over all machines; a run may be resumed with another number."
    )
    zero_stage: Annotated[
        Literal[0, 1, 2, 3], Why("the least memory: each process holds its part of weights, gradients and optimizer state")
    ] = Field(
        default=3,
        description="What is divided: 0 rows alone, 1 optimizer state, 2 also gradients, 3 also weights; 1 to 3 by DeepSpeed.",
    )
    offload: Annotated[
        Literal["none", "optimizer", "parameters"], Why("it costs time: turn it on when a GPU's memory does not hold its part")
    ] = Field(
        default="none",
        description="What a GPU leaves in the machine's memory: optimizer state (from stage 1 on), or that and weights (stage 3).",
    )
    deepspeed: Annotated[SpecPath | None, Why("the options here say all that is needed")] = Field(
        default=None,
        description="A DeepSpeed configuration (JSON) to take over: each field is taken, checked against this spec, or refused.",
    )
    bucket_elements: Annotated[
        int | None, Why("a fiftieth of the base, at least half a million: small beside a process's part")
    ] = Field(default=None, ge=1, description="Elements that are gathered or summed at once (stages 1 to 3).")
    sub_group_elements: Annotated[
        int | None, Why("a twentieth of the base, at least half a million: bounds what an update needs beside it")
    ] = Field(default=None, ge=1, description="Elements of a process's part that are updated at once (stage 3).")
    live_elements: Annotated[int | None, Why("as many as a bucket: more would keep weights gathered that nobody uses")] = Field(
        default=None, ge=1, description="Elements of gathered weights that may wait for their next use (stage 3)."
    )
    persistent_elements: Annotated[int | None, Why("tensors this small are dearer to gather than to keep")] = Field(
        default=None, ge=1, description="Tensors of up to so many elements stay whole in every process (stage 3)."
    )

    @property
    def packed_weights(self) -> bool:
        """Return false: packed weights cannot be divided."""
        return False

    @field_validator("offload")
    @classmethod
    def _has_something_to_leave(cls, offload: str, info: ValidationInfo) -> str:
        stage, needed = info.data.get("zero_stage"), {"none": 0, "optimizer": 1, "parameters": 3}[offload]
        if isinstance(stage, int) and stage < needed:
            raise broken_rule(f"is {offload}, which needs zero_stage {needed} or more, got {stage}", f"set zero_stage to {needed}")
        return offload


ComputeSpec: TypeAlias = Annotated[
    Annotated[LocalSpec, Tag("local")] | Annotated[MultiProcessSpec, Tag("multi_process")],
    Discriminator(kind_chooser("local")),
]
