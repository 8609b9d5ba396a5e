"""Options of the schedule: how long, in what portions, how fast, and with which optimizer. Next: `evaluation.py`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from kivnun.spec.section import Section, Why, broken_rule, kind_chooser


class AdamWSpec(Section, frozen=True):
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101)."""

    kind: Annotated[Literal["adamw"], Why("needs the least tuning, and suits adapters and whole models alike")] = Field(
        default="adamw", description="AdamW for every trained weight."
    )
    beta1: Annotated[float, Why("the paper's value")] = Field(
        default=0.9, ge=0, lt=1, description="Decay of the mean of gradients."
    )
    beta2: Annotated[float, Why("the paper's value; short runs lose nothing by it")] = Field(
        default=0.999, ge=0, lt=1, description="Decay of the mean of squared gradients."
    )
    eps: Annotated[
        float,
        Why("the paper's value"),
    ] = Field(default=1e-8, gt=0, description="Added to the root before dividing.")
    weight_decay: Annotated[
        float,
        Why("an adapter is small, and shrinking it pulls towards the base for no measured gain"),
    ] = Field(default=0.0, ge=0, description="Share of a weight, times the learning rate, taken off it each step. Matrices only.")


class MuonSpec(Section, frozen=True):
    """Muon (Jordan et al. 2024), with its update scaled to AdamW's (arXiv:2502.16982): matrices; AdamW for all else."""

    kind: Literal["muon"] = Field(default="muon", description="Muon for matrices, AdamW for embeddings, norms and vectors.")
    momentum: Annotated[float, Why("its authors' value")] = Field(
        default=0.95, ge=0, lt=1, description="Momentum of matrices, before orthogonalisation."
    )
    weight_decay: Annotated[float, Why("none was needed to train the built-in base")] = Field(
        default=0.0, ge=0, description="Share of a weight, times the learning rate, taken off it each step. Matrices only."
    )
    adamw_share: Annotated[float, Why("3e-3 beside Muon's 4e-3 trained the built-in base best")] = Field(
        default=0.75, gt=0, description="AdamW's learning rate, for embeddings, norms and vectors, as a share of learning_rate."
    )
    beta1: Annotated[float, Why("the AdamW paper's value")] = Field(
        default=0.9, ge=0, lt=1, description="AdamW's decay of the mean of gradients."
    )
    beta2: Annotated[float, Why("the AdamW paper's value")] = Field(
        default=0.999, ge=0, lt=1, description="AdamW's decay of the mean of squared gradients."
    )
    eps: Annotated[float, Why("the AdamW paper's value")] = Field(
        default=1e-8, gt=0, description="AdamW's addition to the root before dividing."
    )


OptimizerSpec: TypeAlias = Annotated[
    Annotated[AdamWSpec, Tag("adamw")] | Annotated[MuonSpec, Tag("muon")], Discriminator(kind_chooser("adamw"))
]


class ScheduleSpec(Section, frozen=True):
    """Length, step size and learning rate. `epochs` or `steps`, `batch_rows` or `batch_tokens`: never both."""

    epochs: Annotated[
        int | None, Why("3, unless steps is given: small sets need a few passes, and more begin to be learnt by heart")
    ] = Field(default=None, ge=1, description="Passes over the training rows.")
    steps: Annotated[int | None, Why("epochs rules")] = Field(
        default=None, ge=1, description="Optimizer updates in all, in place of epochs."
    )
    batch_rows: Annotated[
        int | None, Why("16, unless batch_tokens is given: steady gradients, and enough steps from small sets")
    ] = Field(default=None, ge=1, description="Rows in one step, all files together.")
    batch_tokens: Annotated[int | None, Why("batch_rows rules")] = Field(
        default=None, ge=1, description="Tokens in one step at most, in place of batch_rows; a longer row makes a step alone."
    )
    learning_rate: Annotated[
        float | None,
        Why("by adapter, objective and size of the base: an adapter takes ten times what the whole model does, DPO far less"),
    ] = Field(default=None, gt=0, description="The highest learning rate, reached after the warm-up.")
    warmup_share: Annotated[
        float,
        Why("a few steps for the optimizer's averages to fill before it moves at full speed"),
    ] = Field(default=0.03, ge=0, lt=1, description="Share of the steps in which the rate rises linearly.")
    decay: Annotated[
        Literal["linear", "cosine", "constant"], Why("ends at zero, where the last steps settle; no shape beats it clearly")
    ] = Field(default="linear", description="How the rate falls after the warm-up.")
    decay_start_share: Annotated[float, Why("the rate falls from the end of the warm-up on")] = Field(
        default=0.0, ge=0, lt=1, description="Share of the steps after which the rate begins to fall; 0.6 holds it flat for 60 %."
    )
    final_share: Annotated[float, Why("a run ends at rest")] = Field(
        default=0.0, ge=0, lt=1, description="Share of learning_rate towards which the rate falls."
    )
    max_grad_norm: Annotated[
        float | None,
        Why("one bad batch cannot undo many good ones; steady runs stay below it"),
    ] = Field(default=1.0, gt=0, description="Norm above which a step's gradient is scaled down; null for no limit.")
    optimizer: Annotated[OptimizerSpec, Why("AdamW needs the least tuning")] = Field(
        default=AdamWSpec(), description="How gradients become updates."
    )

    @field_validator("steps")
    @classmethod
    def _steps_or_epochs(cls, steps: int | None, info: ValidationInfo) -> int | None:
        if steps is not None and info.data.get("epochs") is not None:
            raise broken_rule("cannot be given together with schedule.epochs", "remove one of them, or set it to null")
        return steps

    @field_validator("batch_tokens")
    @classmethod
    def _tokens_or_rows(cls, batch_tokens: int | None, info: ValidationInfo) -> int | None:
        if batch_tokens is not None and info.data.get("batch_rows") is not None:
            raise broken_rule("cannot be given together with schedule.batch_rows", "remove one of them, or set it to null")
        return batch_tokens

    @field_validator("decay_start_share", "final_share")
    @classmethod
    def _only_with_decay(cls, share: float, info: ValidationInfo) -> float:
        if share != 0 and info.data.get("decay") == "constant":
            raise broken_rule("has no effect when schedule.decay is constant", "leave it out, or choose linear or cosine")
        return share

    @field_validator("decay_start_share")
    @classmethod
    def _after_the_warm_up(cls, share: float, info: ValidationInfo) -> float:
        warmup = info.data.get("warmup_share", 0)
        if 0 < share < warmup:
            raise broken_rule(f"is {share}, inside the warm-up ({warmup})", "give a later share, or 0 for right after it")
        return share
