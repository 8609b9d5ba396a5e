"""What a toy job is: a run of the shape of a real one, without a model, so that the service itself can be tested by the hundred.

Its spec is made where files are judged, and run by `worker/toy.py`; both read it here. Lines of the data are rows; a row's tokens
follow from its length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from kivnun.errors import SpecError
from kivnun.spec.section import Section, as_mapping
from kivnun.spec.yaml_text import YamlError, read_yaml, write_yaml


class ToySpec(Section, frozen=True):
    """A toy run. The last three options are for tests of what may happen to a trainer."""

    version: Literal[1] = 1
    toy: Literal[True] = True
    seed: int = Field(default=0, ge=0)
    epochs: int = Field(default=1, ge=1)
    batch_rows: int = Field(default=1, ge=1)
    rows: Annotated[int | None, Field(ge=1)] = Field(default=None, description="Rows of the data, to be checked against it.")
    checkpoint_every_steps: Annotated[int | None, Field(ge=1)] = Field(default=None, description="Besides each epoch's end.")
    step_ms: float | list[float] = Field(default=0.0, description="How long a step takes; of a list, each step the next.")
    dies_at_step: int | None = Field(default=None, description="The process ends as if it were killed, each time.")
    fails_at_step: int | None = Field(default=None, description="The loss is not finite.")
    ignores_stop: bool = Field(default=False, description="SIGTERM is not heeded.")

    def to_yaml(self) -> str:
        return write_yaml(self.model_dump(mode="json", exclude_none=True))

    def seconds_of(self, step: int) -> float:
        """Return how long a step takes."""
        times = self.step_ms if isinstance(self.step_ms, list) else [self.step_ms]
        return times[(step - 1) % len(times)] / 1000

    def steps_of(self, rows: int) -> int:
        return self.epochs * -(-rows // self.batch_rows)


def is_toy(text: str) -> bool:
    """Return whether a job's spec is a toy's."""
    try:
        return (as_mapping(read_yaml(text).value) or {}).get("toy") is True
    except YamlError:
        return False


def read_toy(text: str) -> ToySpec:
    """Return the toy spec in a text. Raises SpecError."""
    try:
        return ToySpec.model_validate(as_mapping(read_yaml(text).value))
    except (YamlError, ValidationError) as error:
        raise SpecError(
            f"the toy's spec cannot be read: {_first(error)}", hint="kivnun/jobs/toy.py says what it may hold"
        ) from None


def rows_of(content: bytes) -> list[bytes]:
    """Return the rows of a data file: its lines that hold anything."""
    return [line for line in content.split(b"\n") if line.strip()]


def tokens_of(row: bytes) -> int:
    """Return how many tokens of a row are trained."""
    return max(1, len(row) // 4)


def planned_tokens(spec: ToySpec, rows: Iterable[bytes]) -> int:
    """Return the trained tokens of a whole run."""
    return spec.epochs * sum(map(tokens_of, rows))


def rows_of_step(spec: ToySpec, rows: Sequence[bytes], step: int) -> Sequence[bytes]:
    """Return the rows of a step, counted from 1: in the order of the file, each once an epoch."""
    per_epoch = -(-len(rows) // spec.batch_rows)
    first = (step - 1) % per_epoch * spec.batch_rows
    return rows[first : first + spec.batch_rows]


def _first(error: Any) -> str:
    return error.errors(include_input=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
