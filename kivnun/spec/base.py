"""Options of the base: which pretrained model is tuned, and in what precision it computes. Next: `data.py`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from kivnun.spec.section import Allowed, Name, Section, Why, absolute, broken_rule, spec_folder, wrong_value

BUILT_IN = "kivnun/"
QUANTISED = ("int8", "nf4")
SHA256 = re.compile(r"[0-9a-f]{64}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)


def is_hub_id(model: str) -> bool:
    """Tell whether `model` is an id to be fetched: neither a built-in id nor a folder."""
    return not model.startswith(BUILT_IN) and HUB_ID.fullmatch(model) is not None


class BaseSpec(Section, frozen=True):
    """The pretrained model. It is never changed by a run: what is trained is kept apart."""

    model: Annotated[
        Name, Allowed("a hub id such as microsoft/Phi-4-mini-instruct, a built-in id such as kivnun/tiny-phi, or a folder")
    ] = Field(description="The model: a hub id `org/name`, a built-in id `kivnun/...`, or a folder, relative to the spec's.")
    revision: Annotated[
        Name | None,
        Why("the hub's default branch; the manifest records the hash of the weights themselves"),
    ] = Field(default=None, description="Branch, tag or commit of a hub id. Refused for folders and built-in ids, which have none.")
    content_hash: Annotated[
        Name | None,
        Allowed("64 hexadecimal digits, as `kivnun bases FOLDER` prints them"),
        Why("the base is taken as it is found, and the manifest records its hash"),
    ] = Field(
        default=None,
        description="The SHA-256 that the base must have, over its configuration, weights and tokenizer. Another one is refused.",
    )
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "int8", "nf4"],
        Why(
            "as the base is stored, where that is int8 or nf4; else fp32 on a CPU below 500 M parameters, where memory is no "
            "concern and exactness is; otherwise bf16, half the memory"
        ),
    ] = Field(
        default="auto",
        description="Precision the base is held in; trained weights and sums are fp32 whichever it is. int8 and nf4 hold the "
        "linear layers but the head in bitsandbytes' codes, for lora and dora, and compute in bf16; lora on nf4 is QLoRA, with "
        "double quantisation.",
    )
    rope_factors: Annotated[
        Literal["per_row", "short", "long"],
        Why("a row's own length decides, as when the model is used, so that no neighbour in a batch changes a row's result"),
    ] = Field(default="per_row", description="Which LongRoPE factors to use, in families that have two sets.")

    @model_validator(mode="before")
    @classmethod
    def _from_shorthand(cls, value: object) -> object:
        return {"model": value} if isinstance(value, str) else value

    @field_validator("model")
    @classmethod
    def _locate(cls, model: str, info: ValidationInfo) -> str:
        folder = spec_folder(info)
        if folder is None or model.startswith(BUILT_IN):
            return model
        try:
            path = absolute(model, folder)
        except RuntimeError:
            raise wrong_value("the home folder that `~` stands for is unknown") from None
        if path.is_dir() or model.startswith(("/", "./", "../", "~")) or model in (".", ".."):
            return str(path)
        if HUB_ID.fullmatch(model) is None:
            raise wrong_value(f"there is no folder {path}, and a hub id has the form org/name", "12-base-not-found")
        return model

    @field_validator("content_hash")
    @classmethod
    def _is_a_hash(cls, content_hash: str | None) -> str | None:
        if content_hash is not None and SHA256.fullmatch(content_hash) is None:
            raise wrong_value("a SHA-256 has 64 hexadecimal digits in lower case")
        return content_hash

    @field_validator("revision")
    @classmethod
    def _only_hub_ids_have_revisions(cls, revision: str | None, info: ValidationInfo) -> str | None:
        model = info.data.get("model")
        if revision is not None and isinstance(model, str) and not is_hub_id(model):
            raise broken_rule(f"has no meaning for `{model}`, which is not a hub id", "leave it out")
        return revision
