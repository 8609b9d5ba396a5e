"""Azure's deployments: the control plane's own paths, and the list that the data plane had.

A deployment is a name for a model (`kivnun/jobs/deployments.py`); it is ready when it is made, and costs nothing. Subscription,
resource group and account are whatever a script has: the key says whose deployments are meant.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kivnun.jobs import deployments, models
from kivnun.jobs.config import ServiceConfig
from kivnun.jobs.database import Transaction
from kivnun.jobs.deployments import Deployment
from kivnun.service.api.models import no_such_model
from kivnun.service.auth import Reader, Tuner
from kivnun.service.context import Shared
from kivnun.service.errors import ApiError

root = APIRouter()

MOST = 1000  # of one tenant
MOST_BYTES = 1 << 16  # of one body, which is kept
_ACCOUNT = "/subscriptions/{subscription}/resourceGroups/{group}/providers/Microsoft.CognitiveServices/accounts/{account}"
_PATH = _ACCOUNT + "/deployments/{name}"
Word = Annotated[str, Path(max_length=128)]
Name = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class _Open(BaseModel):
    # Azure adds properties with every version of its API; they are kept and told as they came.
    model_config = ConfigDict(extra="allow")


class DeployedModel(_Open):
    """The model by name: a base, a tuned model or a checkpoint."""

    format: str = Field(default="OpenAI", max_length=64)
    name: str = Field(min_length=1, max_length=400)
    version: str | None = Field(default=None, max_length=64)


class DeploymentProperties(_Open):
    """What is deployed."""

    model: DeployedModel


class Sku(_Open):
    """How it is paid for: taken, told, and without effect."""

    name: str = Field(default="Standard", max_length=64)
    capacity: int = Field(default=1, ge=0, le=1_000_000)


class DeploymentAsked(_Open):
    """The body of a PUT."""

    sku: Sku = Field(default_factory=Sku)
    properties: DeploymentProperties

    @model_validator(mode="after")
    def _can_be_kept(self) -> DeploymentAsked:
        try:
            written = json.dumps(self.model_dump(), allow_nan=False, ensure_ascii=False).encode()
        except ValueError:
            raise ValueError("NaN, Infinity and halves of surrogate pairs are no JSON") from None
        if len(written) > MOST_BYTES:
            raise ValueError(f"the body may have {MOST_BYTES} bytes at most, got {len(written)}")
        return self


class DeploymentObject(_Open):
    """A deployment as the control plane tells it."""

    id: str
    name: str
    type: Literal["Microsoft.CognitiveServices/accounts/deployments"]
    sku: dict[str, Any]
    properties: dict[str, Any]
    systemData: dict[str, Any]


class DeploymentPage(BaseModel):
    """All deployments: one page."""

    value: list[DeploymentObject]


class ShortDeployment(BaseModel):
    """A deployment as the data plane tells it."""

    id: str
    object: Literal["deployment"] = "deployment"
    model: str
    owner: str
    status: Literal["succeeded"] = "succeeded"
    created_at: int
    updated_at: int


class ShortDeployments(BaseModel):
    """All deployments."""

    object: Literal["list"] = "list"
    data: list[ShortDeployment]


@root.put(_PATH, response_model=DeploymentObject, responses={201: {"model": DeploymentObject, "description": "It is new."}})
def put_deployment(
    subscription: Word, group: Word, account: Word, name: Name, asked: DeploymentAsked, service: Shared, who: Tuner,
    response: Response,
) -> dict[str, Any]:  # fmt: skip
    """Make a deployment (201), or point it at another model (200)."""
    model = service.config.base_id(asked.properties.model.name) or asked.properties.model.name

    def put(tx: Transaction) -> tuple[Deployment, bool]:
        _check_model(tx, who.tenant, model, service.config)
        if len(deployments.all_of(tx, who.tenant)) >= MOST and deployments.find_deployment(tx, who.tenant, name) is None:
            raise ApiError(400, f"there are {MOST} deployments already: delete one first", code="quota_exceeded")
        return deployments.put(tx, who.tenant, name, model, asked.model_dump(mode="json"), service.clock())

    made, is_new = service.db.write("deployment put", put)
    response.status_code = 201 if is_new else 200
    return _told(made, subscription, group, account)


@root.get(_PATH, response_model=DeploymentObject)
def get_deployment(
    subscription: Word, group: Word, account: Word, name: Name, service: Shared, who: Reader
) -> dict[str, Any]:  # fmt: skip
    found = service.db.read(lambda tx: deployments.find_deployment(tx, who.tenant, name))
    if found is None:
        raise no_such_deployment(name)
    return _told(found, subscription, group, account)


@root.get(_ACCOUNT + "/deployments", response_model=DeploymentPage)
def list_deployments(subscription: Word, group: Word, account: Word, service: Shared, who: Reader) -> dict[str, Any]:
    found = service.db.read(lambda tx: deployments.all_of(tx, who.tenant))
    return {"value": [_told(deployment, subscription, group, account) for deployment in found]}


@root.delete(_PATH, status_code=200, responses={204: {"description": "There was none."}})
def delete_deployment(
    subscription: Word, group: Word, account: Word, name: Name, service: Shared, who: Tuner
) -> Response:  # fmt: skip
    """Remove a deployment (200); where there is none, nothing is done (204), as Azure's control plane has it."""
    removed = service.db.write("deployment removed", lambda tx: deployments.remove(tx, who.tenant, name))
    return Response(status_code=200 if removed else 204)


@root.get("/openai/deployments", response_model=ShortDeployments)
def list_short(service: Shared, who: Reader) -> dict[str, Any]:
    found = service.db.read(lambda tx: deployments.all_of(tx, who.tenant))
    return {"data": [_short(deployment) for deployment in found]}


@root.get("/openai/deployments/{name}", response_model=ShortDeployment)
def get_short(name: Name, service: Shared, who: Reader) -> dict[str, Any]:
    found = service.db.read(lambda tx: deployments.find_deployment(tx, who.tenant, name))
    if found is None:
        raise no_such_deployment(name)
    return _short(found)


def no_such_deployment(name: str) -> ApiError:
    """Return the answer for a deployment that there is not, or that is another tenant's."""
    return ApiError(404, f"the deployment {name[:64]!r} does not exist", code="DeploymentNotFound")


def _check_model(tx: Transaction, tenant: str, model: str, config: ServiceConfig) -> None:
    if model not in config.bases and models.find(tx, model, tenant) is None:
        why = no_such_model(model, config)
        raise ApiError(400, why.message, code="DeploymentModelNotSupported", param="properties.model.name")


def _told(found: Deployment, subscription: str, group: str, account: str) -> dict[str, Any]:
    place = _ACCOUNT.format(subscription=subscription, group=group, account=account)
    times = {"createdAt": _iso(found.created_at), "lastModifiedAt": _iso(found.updated_at)}
    properties = {**found.body["properties"], "provisioningState": "Succeeded"}
    return {
        **found.body, "id": f"{place}/deployments/{found.name}", "name": found.name,
        "type": "Microsoft.CognitiveServices/accounts/deployments", "sku": found.body["sku"], "properties": properties,
        "systemData": times,
    }  # fmt: skip


def _short(found: Deployment) -> dict[str, Any]:
    return {
        "id": found.name, "model": found.model, "owner": found.tenant,
        "created_at": int(found.created_at), "updated_at": int(found.updated_at),
    }  # fmt: skip


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
