"""Options of the data: which rows are trained on, which are held out, what happens to misfits. Next: `adapters.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator

from kivnun.spec.section import Allowed, Section, SpecPath, Why, as_list, broken_rule, path_from, wrong_value

PATH_SCHEMA = {"type": "string", "minLength": 1}


DataFormat: TypeAlias = Literal["auto", "messages", "prompt_completion", "text", "preference"]


class SourceSpec(Section, frozen=True):
    """One training file, and how much of the training is drawn from it."""

    path: SpecPath = Field(description="The file, relative to the spec's folder.")
    share: Annotated[float | None, Why("every row of every file is trained on once per epoch")] = Field(
        default=None,
        gt=0,
        description="Weight of this file in what is sampled, relative to the other files' shares: 3 and 1 are 75 % and 25 %. "
        "Given for all files or for none.",
    )


def _sources(value: object) -> object:
    """Return one path, or a list of paths and mappings, as a tuple of what `SourceSpec` takes."""
    items = as_list(value)
    if items is None:
        items = [value]
    if not items:
        raise wrong_value("name at least one file")
    return tuple({"path": item} if isinstance(item, str | Path) else item for item in items)


def _share_or_path(value: object, info: ValidationInfo) -> float | Path | None:
    """Return a number between 0 and 1 as it is, text as a path; refuse the rest."""
    if value is None:
        return None
    if isinstance(value, str | Path):
        if str(value).replace(".", "", 1).isdecimal():
            raise wrong_value("a share is written without quotes; a file of that name as ./" + str(value))
        path = path_from(value, info)
        assert isinstance(path, Path)
        return path
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise wrong_value()
    return float(value)


class DataSpec(Section, frozen=True):
    """The examples. Rows are never dropped or changed silently: `bad_rows` and `over_long` say what may happen."""

    train: Annotated[
        tuple[SourceSpec, ...],
        BeforeValidator(_sources),
        Allowed("a path, or a list of paths and mappings {path, share}"),
    ] = Field(strict=False, description="The training file, or a list of files; a file may be given as `{path, share}`.")
    validation: Annotated[
        float | Path | None,
        BeforeValidator(_share_or_path),
        Allowed("a number between 0 and 1 (both excluded), a path, or null"),
        WithJsonSchema(
            {"anyOf": [{"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, PATH_SCHEMA, {"type": "null"}]}
        ),
        Why("a tenth is enough to tell base from tuned with an interval, and costs little of the training data"),
    ] = Field(default=0.1, description="Held-out rows: a share of the training rows, a file of its own, or null for none.")
    format: Annotated[
        DataFormat,
        Why("the keys of the first row say which format a file is in; a file that mixes formats is refused"),
    ] = Field(default="auto", description="How rows are written. Named, a file in another format is refused.")
    template: Annotated[SpecPath | None, Why("the base's own chat template is what it was trained with")] = Field(
        default=None, description="A Jinja chat template to use in place of the base's own."
    )
    max_seq_len: Annotated[int | None, Why("as many tokens as the base was made for")] = Field(
        default=None, ge=2, description="Longest row in tokens; `over_long` says what happens to longer ones."
    )
    bad_rows: Annotated[
        Literal["refuse", "skip"],
        Why("a row that cannot be read is usually a mistake worth seeing"),
    ] = Field(
        default="refuse",
        description="Rows that cannot be read: refuse the file with every error listed, or skip them and list them.",
    )
    over_long: Annotated[
        Literal["refuse", "skip", "truncate"],
        Why("a cut row teaches the model to stop in the middle, and a skipped one changes what is measured"),
    ] = Field(default="refuse", description="Rows above `max_seq_len`: refuse the file, skip them, or cut their end off.")

    @field_validator("train")
    @classmethod
    def _shares_for_all_or_none(cls, train: tuple[SourceSpec, ...]) -> tuple[SourceSpec, ...]:
        given = [source.share is not None for source in train]
        if any(given) and not all(given):
            missing = ", ".join(source.path.name for source in train if source.share is None)
            raise broken_rule(f"has shares for some files but not for {missing}", "give every file a share, or none")
        if len(train) == 1 and any(given):
            raise broken_rule("has a share for its only file, where it changes nothing", "leave the share out")
        return train

    @field_validator("train")
    @classmethod
    def _no_file_twice(cls, train: tuple[SourceSpec, ...]) -> tuple[SourceSpec, ...]:
        paths = [source.path for source in train]
        twice = sorted({str(path) for path in paths if paths.count(path) > 1})
        if twice:
            raise broken_rule(f"names {', '.join(twice)} more than once", "use share to draw more from a file")
        return train

    @field_validator("validation")
    @classmethod
    def _not_a_training_file(cls, validation: float | Path | None, info: ValidationInfo) -> float | Path | None:
        train: tuple[SourceSpec, ...] = info.data.get("train", ())
        if isinstance(validation, Path) and any(source.path == validation for source in train):
            raise broken_rule("is one of the training files", "a share such as 0.1 holds rows out of the training file")
        return validation
