"""The body of a create as it is allowed to be, and every way in which it is not, told in words: what was sent, what is allowed.

Fields of OpenAI's and Azure's request, and extensions under `x_` alone. Next: `creating.py` (what is asked of the database).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import TypeIs

from kivnun.data.chat_shape import nearest
from kivnun.service.dialect import Dialect
from kivnun.service.errors import ApiError, bad_request
from kivnun.service.hyperparameters import MethodType

METHODS = "supervised and dpo"
MAX_SEED = 2**31 - 1
_AZURE_SUFFIX = re.compile(r"[A-Za-z0-9_-]{1,40}")
_OF_OTHER_METHODS = ("beta", "compute_multiplier", "eval_interval", "eval_samples", "reasoning_effort")


def _broken(words: str, received: object) -> PydanticCustomError:
    return PydanticCustomError("broken", "{text}", {"text": f"must be {words}, got {_shown(received)}"})


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _auto_or_integer(most: int) -> Callable[[object], object]:
    """Return the check of `auto`, null or an integer from 1 on."""

    def checked(value: object) -> object:
        if value is None or value == "auto":
            return "auto"
        if not _is_number(value) or not 1 <= value <= most or value != int(value):
            raise _broken(f'"auto" or an integer from 1 to {most}', value)
        return int(value)

    return checked


def _auto_or_number(most: float) -> Callable[[object], object]:
    """Return the check of `auto`, null or a number above 0."""

    def checked(value: object) -> object:
        if value is None or value == "auto":
            return "auto"
        if not _is_number(value) or not 0 < value <= most:
            raise _broken(f'"auto" or a number above 0 and of {most:g} at most', value)
        return float(value)

    return checked


def _is_number(value: object) -> TypeIs[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _schema(number: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"const": "auto"}, number, {"type": "null"}]})


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)


Auto = Literal["auto"]
Epochs = Annotated[int | Auto, BeforeValidator(_auto_or_integer(50)), _schema({"type": "integer", "minimum": 1, "maximum": 50})]
BatchSize = Annotated[
    int | Auto, BeforeValidator(_auto_or_integer(256)), _schema({"type": "integer", "minimum": 1, "maximum": 256})
]
Multiplier = Annotated[
    float | Auto, BeforeValidator(_auto_or_number(10_000)), _schema({"type": "number", "exclusiveMinimum": 0, "maximum": 10_000})
]
Beta = Annotated[
    float | Auto, BeforeValidator(_auto_or_number(2)), _schema({"type": "number", "exclusiveMinimum": 0, "maximum": 2})
]
_NAMES = Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=1, max_length=64)]


def _targets(value: object) -> object:
    names = cast("list[object]", value) if isinstance(value, list) else None
    if value is None or value == "all-linear" or (names and all(isinstance(name, str) and 0 < len(name) <= 128 for name in names)):
        return value
    raise _broken('"all-linear" or a list of names of modules', value)


Targets = Annotated[Literal["all-linear"] | _NAMES | None, BeforeValidator(_targets)]


class SupervisedHyperparameters(_Part):
    n_epochs: Epochs = "auto"
    batch_size: BatchSize = "auto"
    learning_rate_multiplier: Multiplier = "auto"


class DpoHyperparameters(SupervisedHyperparameters):
    beta: Beta = "auto"


class SupervisedMethod(_Part):
    hyperparameters: SupervisedHyperparameters | None = None


class DpoMethod(_Part):
    hyperparameters: DpoHyperparameters | None = None


class Method(_Part):
    type: MethodType
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None


class Lora(_Part):
    """What the adapter is, where the base's own settings are not wanted."""

    rank: Annotated[int, Field(ge=1, le=512)] | None = None
    alpha: Annotated[float, Field(gt=0, le=4096, strict=False)] | None = None
    targets: Targets = None


Text = Annotated[str, Field(min_length=1, max_length=256)]


class CreateJob(_Part):
    """The body of `POST /fine_tuning/jobs`."""

    model: Text
    training_file: Text
    validation_file: Text | None = None
    method: Method | None = None
    hyperparameters: SupervisedHyperparameters | None = Field(default=None, json_schema_extra={"deprecated": True})
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    metadata: dict[str, str] | None = None
    integrations: list[dict[str, Any]] | None = None
    training_type: Annotated[str, Field(min_length=1, max_length=64)] | int | None = Field(default=None, alias="trainingType")
    x_lora: Lora | None = None
    x_over_long: Literal["refuse", "truncate"] | None = None
    x_dry_run: bool | None = None

    @property
    def kind(self) -> MethodType:
        return self.method.type if self.method is not None else "supervised"

    def asked(self) -> dict[str, Any]:
        """Return the hyperparameters as they were asked for, `auto` where nothing was."""
        if self.kind == "dpo":
            assert self.method is not None
            given = (self.method.dpo and self.method.dpo.hyperparameters) or DpoHyperparameters()
        else:
            own = self.method.supervised.hyperparameters if self.method is not None and self.method.supervised is not None else None
            given = own or self.hyperparameters or SupervisedHyperparameters()
        return given.model_dump()

    def extensions(self) -> dict[str, Any]:
        """Return what was asked for beyond OpenAI's fields, as a job keeps it."""
        found = {
            "x_lora": None if self.x_lora is None else self.x_lora.model_dump(exclude_none=True),
            "x_over_long": self.x_over_long,
            "trainingType": self.training_type,
        }
        return {name: value for name, value in found.items() if value is not None}


def read_create(tree: Mapping[str, Any], dialect: Dialect) -> CreateJob:
    """Return the body of a create. Raises ApiError that names the first thing that is wrong with it."""
    method = tree.get("method")
    kind = cast("Mapping[str, Any]", method).get("type") if isinstance(method, Mapping) else None
    if kind == "reinforcement":
        raise unsupported_method()
    try:
        body = CreateJob.model_validate(tree)
    except ValidationError as error:
        raise _told(error.errors(include_url=False)[0]) from None
    _check_method(body)
    _check_metadata(body.metadata)
    if body.integrations:
        raise bad_request(
            "integrations are not offered here: metrics are in GET /fine_tuning/jobs/{id}/events and in the results files; leave "
            "integrations out, or send null or []",
            "integrations",
            "unsupported_integration",
        )
    if dialect == "azure" and body.suffix is not None and not _AZURE_SUFFIX.fullmatch(body.suffix):
        raise bad_request(
            f"suffix must be 1 to 40 characters of A-Z, a-z, 0-9, _ and - on this path, got {_shown(body.suffix)}", "suffix"
        )
    return body


def unsupported_method() -> ApiError:
    return bad_request(
        f"reinforcement tuning is not offered here; methods offered are {METHODS}", "method.type", "unsupported_method"
    )


def _check_method(body: CreateJob) -> None:
    if body.method is None:
        return
    other = "dpo" if body.method.type == "supervised" else "supervised"
    if getattr(body.method, other) is not None:
        raise bad_request(
            f"method.{other} is given, but method.type is {body.method.type}: leave one of them out", f"method.{other}"
        )
    given = body.hyperparameters is not None and bool(body.hyperparameters.model_fields_set)
    own = body.method.supervised if body.method.type == "supervised" else body.method.dpo
    if given and (body.method.type == "dpo" or (own is not None and own.hyperparameters is not None)):
        raise bad_request(
            "hyperparameters and method are both given: put them into method alone, the former is deprecated", "hyperparameters"
        )


def _check_metadata(metadata: dict[str, str] | None) -> None:
    for key, value in (metadata or {}).items():
        if len(key) > 64 or len(value) > 512:
            raise bad_request("metadata must have keys of at most 64 characters and values of at most 512", "metadata")
    if metadata and len(metadata) > 16:
        raise bad_request(f"metadata must have at most 16 pairs, got {len(metadata)}", "metadata")


def _told(error: ErrorDetails) -> ApiError:
    """Return what is wrong in words, with the path of the field."""
    # Members of a union stand in the path by their type's name, which says nothing to a client.
    path = [str(step) for step in error["loc"] if not _is_type_name(step)]
    param, kind, received = ".".join(path), error["type"], error["input"]
    if kind == "missing":
        return bad_request(f"{param} is missing", param, "missing_required_parameter")
    if kind == "extra_forbidden":
        return _unknown(path)
    if kind == "broken":
        return bad_request(f"{param} {error['msg']}", param)
    context = error.get("ctx", {})
    words = {
        "string_type": "a text", "dict_type": "an object", "model_type": "an object", "list_type": "a list",
        "int_type": "an integer", "bool_type": "true or false", "float_type": "a number",
        "literal_error": str(context.get("expected")), "string_too_short": "at least 1 character",
        "string_too_long": f"at most {context.get('max_length')} characters",
        "greater_than": f"above {context.get('gt')}", "greater_than_equal": f"at least {context.get('ge')}",
        "less_than_equal": f"at most {context.get('le')}",
    }.get(kind)  # fmt: skip
    if words is None:
        return bad_request(f"{param}: {error['msg']}", param)
    return bad_request(f"{param} must be {words}, got {_shown(received)}", param)


def _is_type_name(step: int | str) -> bool:
    return isinstance(step, str) and (step in ("str", "int") or step.startswith(("literal", "list", "constrained", "function")))


def _unknown(path: list[str]) -> ApiError:
    *parents, name = path
    known = _known_fields(parents)
    param = ".".join(path)[:200]
    if name in _OF_OTHER_METHODS and parents and parents[-1] == "hyperparameters":
        return bad_request(
            f"{param} is no hyperparameter of this method: it has {', '.join(known)}", param, "unsupported_hyperparameter"
        )
    near = nearest(name, known)
    hint = f"did you mean {near}?" if near is not None else f"known are {', '.join(known)}"
    return bad_request(f"unknown parameter {param!r}; {hint}", param, "unknown_parameter")


def _known_fields(parents: list[str]) -> list[str]:
    models: dict[str, type[BaseModel]] = {
        "": CreateJob, "method": Method, "method.supervised": SupervisedMethod, "method.dpo": DpoMethod, "x_lora": Lora,
        "hyperparameters": SupervisedHyperparameters, "method.supervised.hyperparameters": SupervisedHyperparameters,
        "method.dpo.hyperparameters": DpoHyperparameters,
    }  # fmt: skip
    fields = models[".".join(parents)].model_fields
    return [field.alias or name for name, field in fields.items()]


def body_schema() -> dict[str, Any]:
    """Return the JSON Schema of the body, whole in itself, for the API's description."""
    schema = CreateJob.model_json_schema()
    parts = schema.pop("$defs", {})

    def whole(node: Any) -> Any:
        if isinstance(node, dict):
            tree = cast("dict[str, Any]", node)
            if "$ref" in tree:
                return whole(parts[str(tree["$ref"]).rpartition("/")[2]])
            return {key: whole(item) for key, item in tree.items()}
        return [whole(item) for item in cast("list[Any]", node)] if isinstance(node, list) else node

    return whole(schema)
