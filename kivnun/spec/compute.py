"""Options of compute: the shape of the engine. Where it runs is not the spec's business. Next: `tune.py`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from kivnun.spec.section import Section, Why, kind_chooser


class LocalSpec(Section, frozen=True):
    """One process on this machine."""

    kind: Annotated[
        Literal["local"],
        Why("one process needs nothing set up"),
    ] = Field(default="local", description="One process.")
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
            "fast there, in less memory"
        ),
    ] = Field(
        default=None,
        ge=1,
        description="Tokens of one forward and backward pass, at most; the result of a step does not depend on it.",
    )
    activation_checkpointing: Annotated[
        bool, Why("it costs a second forward pass: turn it on when a run does not fit in memory")
    ] = Field(
        default=False,
        description="Keep each layer's input alone and compute the rest again in the backward pass: less memory, more time.",
    )
    share_prefixes: Annotated[
        bool, Why("it changes the order of sums, and so the last bits; turn it on where rows begin with the same long prompt")
    ] = Field(
        default=False,
        description="Compute what rows of one pass begin with once: less time for long common prompts and for preference pairs. "
        "Needs an adapter without dropout.",
    )
    packed_weights: Annotated[
        bool | None, Why("where kernels in C train an adapter, while it takes no more than an eighth of the machine's memory")
    ] = Field(
        default=None,
        description="Keep a frozen base's weights as the products of kernels in C read them: faster, for twice their bytes.",
    )
    kernels: Annotated[
        Literal["auto", "native", "triton", "torch"],
        Why("those in C on a CPU, in Triton on a GPU, where they can be built, else torch; pinned, since last bits depend on it"),
    ] = Field(
        default="auto",
        description="What computes norms, gates, attention and the loss: kernels in C (CPU), in Triton (GPU), or torch.",
    )


ComputeSpec: TypeAlias = Annotated[Annotated[LocalSpec, Tag("local")], Discriminator(kind_chooser("local"))]
