"""Options of the data: which rows are trained on, which are held out, what happens to misfits. Next: `adapters.py`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationInfo, WithJsonSchema, field_validator

from kivnun.spec.section import Allowed, Section, SpecPath, Why, as_list, as_mapping, broken_rule, path_from, wrong_value

PATH_SCHEMA = {"type": "string", "minLength": 1}
HUB = "hf:"
"""What the name of a data set of the Hugging Face hub begins with, hf://ORG/NAME; as a path its first part."""


DataFormat: TypeAlias = Literal[
    "auto",
    "messages",
    "sharegpt",
    "preference",
    "prompt_completion",
    "prompt_response",
    "instruction",
    "multiple_choice",
    "entities",
    "classification",
    "text",
]
DataKey: TypeAlias = Literal[
    "messages", "tools", "conversations", "id", "system", "prompt", "chosen", "rejected", "input", "preferred_output",
    "non_preferred_output", "completion", "response", "instruction", "output", "question", "choices", "answer", "answerKey",
    "tokens", "tags", "labels", "text", "entities", "label", "text2", "text1",
]  # fmt: skip
"""Every key that a row of some format may have."""


def _data_path(value: object, info: ValidationInfo) -> object:
    """Return a file's path as any path of a spec, and a data set of the hub as it is named."""
    return Path(value) if isinstance(value, str | Path) and str(value).startswith(f"{HUB}/") else path_from(value, info)


def _path_text(path: Path) -> str:
    return f"{HUB}//{'/'.join(path.parts[1:])}" if path.parts[:1] == (HUB,) else str(path)


PATH_TEXT = PlainSerializer(_path_text, return_type=str, when_used="json")
DataPath = Annotated[
    Path,
    BeforeValidator(_data_path),
    PATH_TEXT,
    Allowed("a path, or hf://ORG/NAME"),
    WithJsonSchema(PATH_SCHEMA),
]


class SourceSpec(Section, frozen=True):
    """One training file, and how much of the training is drawn from it."""

    path: DataPath = Field(
        description="A JSONL, JSON, CSV, TSV or Parquet file or a data set's folder, relative to the spec's folder; or hf://ORG/NAME."
    )
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
    """Return a number between 0 and 1 as it is, text as a path or a data set's name; refuse the rest."""
    if value is None:
        return None
    if isinstance(value, str | Path):
        if str(value).replace(".", "", 1).isdecimal():
            raise wrong_value("a share is written without quotes; a file of that name as ./" + str(value))
        path = _data_path(value, info)
        assert isinstance(path, Path)
        return path
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise wrong_value()
    return float(value)


def _columns(value: object) -> object:
    """Return a mapping from keys of a format to columns; refuse keys that no format has, and a column that is given twice."""
    columns = as_mapping(value)
    if columns is None:
        return value
    known = get_args(DataKey)
    for key, column in columns.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            also = f"; did you mean {near[0]!r}?" if near else ""
            raise broken_rule(f"has the key {key!r}, which rows of no format have{also}", f"the keys are {', '.join(known)}")
        if not isinstance(column, str) or not column:
            raise broken_rule(f"must give {key} the name of a column")
    if len(set(columns.values())) != len(columns):
        raise broken_rule("gives one column to two keys", "each key has a column of its own")
    return columns


def _instruction(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise wrong_value("leave it out to ask what the format asks by default")
    return value


class DataSpec(Section, frozen=True):
    """The examples. Rows are never dropped or changed silently: `bad_rows` and `over_long` say what may happen."""

    train: Annotated[
        tuple[SourceSpec, ...],
        BeforeValidator(_sources),
        Allowed("a path, or a list of paths and mappings {path, share}"),
    ] = Field(strict=False, description="The training file, or a list of files; a file may be given as `{path, share}`.")
    validation: Annotated[
        float | Annotated[Path, PATH_TEXT] | None,
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
    columns: Annotated[
        Mapping[str, str] | None,
        BeforeValidator(_columns),
        Allowed("a mapping from keys to columns, such as {text: review, label: stars}, or null"),
        Why("the columns of the files have the keys' own names"),
    ] = Field(default=None, description="Which column of the files, or key of their rows, is which key of the format.")
    instruction: Annotated[
        str | None,
        BeforeValidator(_instruction),
        Why("a format asks its own short question: 'Which label?', or to mark each entity"),
    ] = Field(default=None, description="What is asked of each text in classification, entities and multiple_choice.")
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
