"""Models: the configured bases, and what a tenant's own jobs made of them.

Ids hold `:` and `/`, which clients send as `%2F`; both arrive here as they are. Next: `deployments.py`, `kivnun/jobs/models.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from kivnun.jobs import deployments, models
from kivnun.jobs.config import ServiceConfig
from kivnun.jobs.database import Transaction
from kivnun.jobs.models import Model
from kivnun.jobs.tenants import find_tenant
from kivnun.service.auth import Reader, Tuner
from kivnun.service.context import Shared
from kivnun.service.dialect import Dialect, dialect_of
from kivnun.service.errors import ApiError
from kivnun.service.sent import sent_as

router = APIRouter()


class Capabilities(BaseModel):
    """What can be done with a model, in Azure's words."""

    fine_tune: bool = True
    inference: bool = True
    completion: bool = True
    chat_completion: bool = True
    embeddings: bool = False


class Deprecation(BaseModel):
    """When a model ends: never by itself."""

    fine_tune: int | None = None
    inference: int | None = None


class ModelObject(BaseModel):
    """A model. Azure's dialect has the fields from `status` on as well."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    x_base: str | None = None
    x_job: str | None = None
    x_step: int | None = None
    x_adapter_hash: str | None = None
    status: Literal["succeeded"] | None = None
    lifecycle_status: Literal["generally-available"] | None = None
    capabilities: Capabilities | None = None
    deprecation: Deprecation | None = None
    model: str | None = None
    fine_tune: str | None = None


class ModelList(BaseModel):
    """All of them: this list has no pages."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class DeletedModel(BaseModel):
    """The model answers no longer."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


@router.get("/models", response_model=ModelList, response_model_exclude_unset=True)
def list_models(request: Request, service: Shared, who: Reader) -> dict[str, Any]:
    """Return the bases and their other names, then the tenant's tuned models and checkpoints, the newest first."""
    config, dialect = service.config, dialect_of(request)

    def look(tx: Transaction) -> tuple[float, list[Model]]:
        return _since(tx, who.tenant), models.page(tx, who.tenant)[0]

    since, tuned = service.db.read(look)
    bases = [base_object(name, since, config, dialect) for name in (*config.bases, *config.aliases)]
    return {"object": "list", "data": [*bases, *(tuned_object(model, config, dialect) for model in tuned)]}


@router.get("/models/{model:path}", response_model=ModelObject, response_model_exclude_unset=True)
def retrieve_model(model: str, request: Request, service: Shared, who: Reader) -> dict[str, Any]:
    """Return a base (by its id or an alias of it), a tuned model or a checkpoint."""
    config, dialect = service.config, dialect_of(request)
    if config.base_id(model) is not None:
        return base_object(model, service.db.read(lambda tx: _since(tx, who.tenant)), config, dialect)
    found = service.db.read(lambda tx: models.find(tx, model, who.tenant))
    if found is None:
        raise no_such_model(model, config)
    return tuned_object(found, config, dialect)


@router.delete("/models/{model:path}", response_model=DeletedModel)
def delete_model(model: str, request: Request, service: Shared, who: Tuner) -> dict[str, Any]:
    """Delete a tuned model or a checkpoint of the tenant's own. A deletion whose answer was lost is answered again."""
    config = service.config
    if config.base_id(model) is not None:
        raise ApiError(400, f"{model!r} is a base: only tuned models can be deleted", code="not_a_tuned_model", param="model")

    is_retry = sent_as(request, "").retry_count > 0

    def delete(tx: Transaction) -> None:
        if is_retry and models.was_deleted(tx, model, who.tenant):
            return
        if models.find(tx, model, who.tenant) is None:
            raise no_such_model(model, config)
        names, jobs = deployments.of_model(tx, who.tenant, model), models.jobs_from(tx, model, who.tenant)
        if names:
            raise _in_use(f"the deployments {', '.join(names)} point at it: delete them first")
        if jobs:
            raise _in_use(f"the jobs {', '.join(jobs)} continue from it: wait for their end, or cancel them")
        models.delete(tx, model, who.tenant, service.clock())

    service.db.write("model deleted", delete)
    return {"id": model, "object": "model", "deleted": True}


def no_such_model(name: str, config: ServiceConfig) -> ApiError:
    """Return the answer for a model that there is not, that is another tenant's, or that is refused with a reason."""
    if name in config.refused:
        message = f"{name} is not offered: {config.refused[name]}"
        return ApiError(404, message, code="model_not_found", param="model")
    return ApiError(
        404, f"the model {name[:200]!r} does not exist; GET /v1/models lists those that do", code="model_not_found", param="model"
    )


def base_object(name: str, since: float, config: ServiceConfig, dialect: Dialect) -> dict[str, Any]:
    """Return a base on the wire, by its id or an alias. Its `created` is when its tenant was made: it was offered from then on."""
    base = config.base_id(name) or name
    told: dict[str, Any] = {"id": name, "object": "model", "created": int(since), "owned_by": config.organization}
    if base != name:
        told["x_base"] = base
    return told if dialect == "openai" else {**told, **_azure(base, None)}


def tuned_object(model: Model, config: ServiceConfig, dialect: Dialect) -> dict[str, Any]:
    """Return a tuned model or a checkpoint on the wire."""
    told: dict[str, Any] = {
        "id": model.id, "object": "model", "created": int(model.created_at), "owned_by": model.tenant,
        "x_base": model.base, "x_job": model.job, "x_step": model.step, "x_adapter_hash": model.content_hash,
    }  # fmt: skip
    return told if dialect == "openai" else {**told, **_azure(model.base, model.job)}


def _azure(base: str, job: str | None) -> dict[str, Any]:
    return {
        "status": "succeeded", "lifecycle_status": "generally-available", "capabilities": Capabilities().model_dump(),
        "deprecation": Deprecation().model_dump(), **({} if job is None else {"model": base, "fine_tune": job}),
    }  # fmt: skip


def _in_use(why: str) -> ApiError:
    return ApiError(400, f"the model cannot be deleted: {why}", code="model_in_use", param="model")


def _since(tx: Transaction, tenant: str) -> float:
    found = find_tenant(tx, tenant)
    assert found is not None, "a key's tenant exists"
    return found.created_at
