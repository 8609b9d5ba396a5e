"""What an operator decides about the service: bases, prices, limits. One YAML file, read by every process of it alike.

    version: 1
    currency: EUR
    bases:
      kivnun/tiny-phi: {resident: true}
      support-base: {model: /srv/models/phi-4-mini, precision: nf4, price: {training: 3.0, prompt: 0.2, completion: 0.8}}
    aliases: {gpt-4o-mini-2024-07-18: kivnun/tiny-phi}
    limits: {requests_per_minute: 600, active_jobs: 3}

Without a file, the Phi families and the built-in base are offered and nothing costs anything. Next: `schema.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails

from kivnun.errors import SpecError
from kivnun.spec.section import Section, as_mapping
from kivnun.spec.yaml_text import YamlError, read_yaml

BaseId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,95}$")]
Count = Annotated[int, Field(ge=1)]
MAX_BYTES = 1 << 20


class Price(Section, frozen=True):
    """Prices of a million tokens, in the configured currency."""

    training: float = Field(default=0.0, ge=0, description="Of tokens that are trained on.")
    prompt: float = Field(default=0.0, ge=0, description="Of tokens asked.")
    completion: float = Field(default=0.0, ge=0, description="Of tokens answered.")


class BaseEntry(Section, frozen=True):
    """A base that can be tuned and asked."""

    model: str | None = Field(default=None, description="A folder, a hub id or the built-in id; the entry's own id where absent.")
    revision: str | None = Field(default=None, description="The hub's revision to pin.")
    precision: Literal["auto", "fp32", "bf16", "int8", "nf4"] = Field(default="auto", description="Of the base's weights.")
    rank: int = Field(default=16, ge=1, le=512, description="LoRA's rank, where a job does not ask for another by x_lora.")
    max_rank: int = Field(default=128, ge=1, le=512, description="The highest rank a job may ask for.")
    max_seq_len: int | None = Field(default=None, ge=8, description="Tokens of an example at most; the base's own where absent.")
    price: Price = Field(default_factory=Price)
    resident: bool = Field(default=False, description="Whether an inference worker is kept with this base loaded.")
    trainer: Literal["pipeline", "toy"] = Field(
        default="pipeline", description="toy: a deterministic stand-in without a model, for tests of the service itself."
    )


class Limits(Section, frozen=True):
    """What one tenant may have and do. A tenant's own limits override these one by one."""

    requests_per_minute: Count = 600
    tokens_per_minute: Count = 200_000
    active_jobs: Count = 3
    waiting_jobs: Count = 100
    files: Count = 10_000
    storage_bytes: Count = 100 << 30
    file_bytes: Count = 512 << 20
    upload_bytes: Count = 8 << 30
    training_tokens: Annotated[int | None, Field(ge=1)] = None  # of one job
    answers_at_once: Count = 32


class ServiceConfig(Section, frozen=True):
    """The configuration of a service."""

    version: Literal[1] = 1
    organization: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,32}$")] = "kivnun"
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")] = "EUR"
    bases: dict[BaseId, BaseEntry] = Field(default_factory=lambda: dict(DEFAULT_BASES))
    refused: dict[BaseId, str] = Field(
        default_factory=lambda: dict(REFUSED_BASES), description="Bases and why they are not offered."
    )
    aliases: dict[str, BaseId] = Field(
        default_factory=dict, description="Other names of bases: scripts may keep the name they have."
    )
    limits: Limits = Field(default_factory=Limits)
    max_body_bytes: Count = 8 << 20
    webhook_hosts: tuple[str, ...] = Field(
        default=(), description="Hosts that webhooks may reach although they are private, or by http: HOST or HOST:PORT."
    )
    on_demand_gib: Annotated[float | None, Field(ge=0)] = Field(
        default=None,
        description="Memory of bases that are loaded on demand, together; by default what residents and training leave.",
    )
    results_encoding: Literal["base64", "raw"] = Field(default="base64", description="Of results files under /v1, as OpenAI's.")

    @model_validator(mode="after")
    def _aliases_name_bases(self) -> ServiceConfig:
        for alias, base in self.aliases.items():
            if base not in self.bases:
                raise ValueError(f"aliases.{alias} names {base!r}, which is not among bases")
        return self

    def base_id(self, name: str) -> str | None:
        """Return the id of a base by its id or another name of it; None where there is none."""
        name = self.aliases.get(name, name)
        return name if name in self.bases else None

    def model_of(self, base: str) -> str:
        """Return where a configured base is: a folder, a hub id or the built-in id."""
        return self.bases[base].model or base


_PHI = (
    "microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-128k-instruct", "microsoft/Phi-3-medium-4k-instruct",
    "microsoft/Phi-3-medium-128k-instruct", "microsoft/Phi-3.5-mini-instruct", "microsoft/phi-4", "microsoft/Phi-4-mini-instruct",
)  # fmt: skip
DEFAULT_BASES = {"kivnun/tiny-phi": BaseEntry(resident=True), **{name: BaseEntry() for name in _PHI}}
_SMALL = "its block-sparse attention and its own activation are not supported yet; use Phi-3-mini or Phi-3-medium"
REFUSED_BASES = {"microsoft/Phi-3-small-8k-instruct": _SMALL, "microsoft/Phi-3-small-128k-instruct": _SMALL}


def read_config(path: Path | None) -> ServiceConfig:
    """Return the configuration in a file, or that of a service without one. Raises SpecError, with every key that is wrong."""
    if path is None:
        return ServiceConfig()
    hint = "docs/guides/service-operate.md shows a configuration"
    try:
        found = read_yaml(path.read_bytes()[:MAX_BYTES].decode("utf-8-sig")).value
    except OSError as error:
        raise SpecError(f"--config {path} cannot be read: {error.strerror}", hint=hint) from None
    except (UnicodeDecodeError, YamlError) as error:
        raise SpecError(f"--config {path} is no YAML in UTF-8: {error}", hint=hint) from None
    tree = as_mapping(found)
    if tree is None:
        raise SpecError(f"--config {path} must hold a mapping, got {type(found).__name__}", hint=hint)
    if isinstance(tree.get("webhook_hosts"), list):
        tree["webhook_hosts"] = tuple(tree["webhook_hosts"])  # type: ignore[arg-type]
    try:
        return ServiceConfig.model_validate(tree)
    except ValidationError as error:
        raise SpecError(f"--config {path}: " + "; ".join(map(_said, error.errors())), hint=hint) from None


def _said(problem: ErrorDetails) -> str:
    """Return what is wrong with a key of a configuration, and what is allowed there."""
    *section, key = problem["loc"] or ("the whole",)
    place = ".".join(map(str, (*section, key)))
    if problem["type"] != "extra_forbidden":
        return f"{place}: {problem['msg']}, got {str(problem['input'])[:60]!r}"
    allowed = tuple(_section(section).model_fields)
    near = difflib.get_close_matches(str(key), allowed, 1)
    return f"{place} is not an option{f', did you mean {near[0]}?' if near else ''} (allowed are {', '.join(allowed)})"


def _section(keys: Sequence[int | str]) -> type[Section]:
    if keys[:1] == ["bases"]:
        return BaseEntry if len(keys) == 2 else Price
    return Limits if keys == ["limits"] else ServiceConfig
