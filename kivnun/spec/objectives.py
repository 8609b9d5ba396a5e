"""Options of the objective: what the loss rewards. Next: `schedule.py`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from kivnun.spec.section import Section, Why, kind_chooser

ObjectiveKind: TypeAlias = Literal["supervised", "pretraining", "dpo"]


class SupervisedSpec(Section, frozen=True):
    """Likelihood of the replies, given what comes before them: `messages` and `prompt_completion` rows."""

    kind: Literal["supervised"] = Field(default="supervised", description="Raise the likelihood of the replies.")


class PretrainingSpec(Section, frozen=True):
    """Likelihood of every token: `text` rows."""

    kind: Literal["pretraining"] = Field(default="pretraining", description="Raise the likelihood of every token of a text.")


class DpoSpec(Section, frozen=True):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): `preference` rows."""

    kind: Literal["dpo"] = Field(
        default="dpo", description="Prefer the chosen reply to the rejected one, more than the start of the run did."
    )
    beta: Annotated[float, Why("the paper's value for dialogue and summaries, and every tool's default")] = Field(
        default=0.1, gt=0, description="How strongly the tuned model is held to the start of the run: higher stays closer."
    )


ObjectiveSpec: TypeAlias = Annotated[
    Annotated[SupervisedSpec, Tag("supervised")] | Annotated[PretrainingSpec, Tag("pretraining")] | Annotated[DpoSpec, Tag("dpo")],
    Discriminator(kind_chooser(None)),
]
