"""The catalogue: which bases there are to tune and to ask, what they can do, what they cost, and which are refused and why.

What is told of a base is read from its configuration file or from the table of Phi models, never from a network. Next:
`kivnun/jobs/config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from kivnun.errors import KivnunError
from kivnun.jobs.config import ServiceConfig
from kivnun.model.families import BUILT_IN
from kivnun.model.phi import phi_by_id
from kivnun.plan.bases import base_files
from kivnun.service.auth import Reader
from kivnun.service.context import Shared

router = APIRouter()


class CatalogueBase(BaseModel):
    """A base. `window` and `family` are null where its files are not on this machine yet. It is not `tunable` where they are, and
    need code of their own or hold no safetensors: the operator has to give others. The family of a Phi model is the one it
    is published as ("Phi-4"), that of another base its architecture ("llama")."""

    id: str
    aliases: list[str]
    family: str | None
    window: int | None
    max_seq_len: int | None
    tunable: bool
    resident: bool
    methods: list[Literal["supervised", "dpo"]]
    techniques: list[str]
    precision: str
    rank: int
    max_rank: int
    price: dict[Literal["training", "prompt", "completion"], float]


class RefusedBase(BaseModel):
    """A base that is not offered."""

    id: str
    reason: str


class Catalogue(BaseModel):
    """All that is offered. Prices are of a million tokens."""

    object: Literal["x_catalogue"] = "x_catalogue"
    currency: str
    data: list[CatalogueBase]
    refused: list[RefusedBase]
    limits: dict[str, int | None]


@router.get("/x_catalogue", response_model=Catalogue)
def catalogue(service: Shared, who: Reader) -> dict[str, Any]:
    """Return the bases with prices and bounds, the refused ones with reasons, and the tenant's limits."""
    config = service.config
    return {
        "currency": config.currency, "data": [base_told(base, config) for base in config.bases],
        "refused": [{"id": base, "reason": reason} for base, reason in config.refused.items()],
        "limits": who.limits.model_dump(),
    }  # fmt: skip


def base_told(base: str, config: ServiceConfig) -> dict[str, Any]:
    """Return a base as the catalogue shows it."""
    entry = config.bases[base]
    family, window, tunable = _facts(config.model_of(base)) if entry.trainer == "pipeline" else ("toy", None, True)
    return {
        "id": base, "aliases": sorted(alias for alias, of in config.aliases.items() if of == base), "family": family,
        "window": window, "max_seq_len": entry.max_seq_len, "tunable": tunable, "resident": entry.resident,
        "methods": ["supervised", "dpo"], "techniques": ["QLoRA" if entry.precision == "nf4" else "LoRA"],
        "precision": entry.precision, "rank": entry.rank, "max_rank": entry.max_rank, "price": entry.price.model_dump(),
    }  # fmt: skip


def _facts(model: str) -> tuple[str | None, int | None, bool]:
    """Return a base's family and window, and whether it can be used. What a hub holds is not asked for."""
    phi = phi_by_id(model)
    if phi is not None:
        config: Mapping[str, object] = {**phi.config, "model_type": phi.family}  # its type is "phi3" from Phi-3 to Phi-4
    elif model in BUILT_IN or Path(model).is_dir():
        try:
            config = base_files(model).config
        except (KivnunError, OSError):
            return None, None, False
    else:
        return None, None, True
    family, window = config.get("model_type"), config.get("max_position_embeddings")
    return family if isinstance(family, str) else None, window if isinstance(window, int) else None, True
