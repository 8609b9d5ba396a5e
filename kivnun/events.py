"""The one record of a run: typed events, one JSON line each, in `events.jsonl`.

Everything printed, plotted or tested is read from here. A line is whole or ignored: a process that dies leaves at most a torn
last line, which readers skip and the next writer cuts off. `docs/reference/events.md` is generated from these classes.
Next: `pipeline.py`, which appends them; `evaluate/report.py`, which reads them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, cast, get_args, get_origin, get_type_hints

from kivnun.artifacts import storage_errors, sync_folder
from kivnun.errors import IntegrityError, RunFolderError

Time: TypeAlias = Annotated[str, "when it was appended, UTC, ISO 8601; set by the log"]
Step: TypeAlias = Annotated[int, "optimizer updates done so far in the run"]
Seconds: TypeAlias = Annotated[float, "wall-clock seconds that it took"]


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A process began to work on the run: from its first step, or from a checkpoint (then `resumed` follows)."""

    name: ClassVar[str] = "run_started"
    run: Annotated[str, "the run folder's name"]
    spec_hash: Annotated[str, "SHA-256 of the resolved spec"]
    time: Time = ""


@dataclass(frozen=True, slots=True)
class DataLoaded:
    """The rows were read, checked, split and turned into tokens."""

    name: ClassVar[str] = "data_loaded"
    format: Annotated[str, "the format found: messages, prompt_completion, text or preference"]
    train_rows: Annotated[int, "rows that are trained"]
    validation_rows: Annotated[int, "rows held out"]
    train_tokens: Annotated[int, "tokens of the training rows, once through"]
    trained_tokens: Annotated[int, "those of them that carry weight in the loss"]
    skipped: Annotated[int, "rows left out, as the spec allows; each is listed in the report"]
    truncated: Annotated[int, "rows cut to max_seq_len, as the spec allows"]
    time: Time = ""
    findings: Annotated[
        dict[str, object],
        "what looking at the rows brought up: counts of exact and near duplicates and of overlap, and `lengths`, a histogram of "
        "[most tokens, training rows, held-out rows]",
    ] = field(default_factory=dict[str, object])


@dataclass(frozen=True, slots=True)
class Planned:
    """What the run will take, predicted before the base was loaded; `run_finished` tells what it took."""

    name: ClassVar[str] = "planned"
    peak_bytes: Annotated[int, "the most memory of one process: resident on a CPU, allocated on a GPU"]
    parts: Annotated[dict[str, int], "bytes by part: process, weights, adapter, gradients, moments, activations, workspace"]
    seconds: Annotated[float, "wall-clock seconds of the whole run; nan where what the device computes a second is not known"]
    steps: Annotated[int, "updates that the whole run makes"]
    time: Time = ""


@dataclass(frozen=True, slots=True)
class BaseLoaded:
    """The base's weights are in memory."""

    name: ClassVar[str] = "base_loaded"
    model: Annotated[str, "the base's id or folder"]
    parameters: Annotated[int, "number of parameters"]
    precision: Annotated[str, "fp32 or bf16: how it computes"]
    content_hash: Annotated[str, "SHA-256 over its weights and configuration"]
    seconds: Seconds
    time: Time = ""


@dataclass(frozen=True, slots=True)
class AdapterOpened:
    """The trainee is ready: what will be trained, and where it sits in the base."""

    name: ClassVar[str] = "adapter_opened"
    kind: Annotated[str, "kind of adapter, as in the spec"]
    trainable_parameters: Annotated[int, "number of parameters that training changes"]
    modules: Annotated[dict[str, int], "target module's name -> how many of them were matched"]
    sites: Annotated[int, "modules adapted in all"]
    time: Time = ""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The held-out rows were scored."""

    name: ClassVar[str] = "evaluated"
    which: Annotated[Literal["base", "tuned"], "the base alone, or with the adapter as it is at this step"]
    step: Step
    nll: Annotated[float, "negative log-likelihood over the held-out rows, nats per trained token"]
    rows: Annotated[int, "held-out rows scored"]
    metrics: Annotated[dict[str, float], "task metric -> value"]
    intervals: Annotated[dict[str, tuple[float, float]], "metric -> 95 % bootstrap interval"]
    samples: Annotated[list[dict[str, object]], "a few held-out rows with the reference and the model's reply"]
    time: Time = ""
    forgetting: Annotated[
        dict[str, object],
        "what the model gives to text that has nothing to do with the task: source, rows, nll and its interval, and of the tuned "
        "model the interval of tuned minus base and the verdict; empty where none was scored",
    ] = field(default_factory=dict[str, object])
    accuracy: Annotated[
        float, "share of the held-out rows' trained tokens that no other token was likelier than; nan where it was not measured"
    ] = math.nan


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer update was made."""

    name: ClassVar[str] = "step_done"
    step: Step
    steps: Annotated[int, "updates that the whole run makes"]
    epoch: Annotated[int, "the epoch this step belongs to, from 0"]
    loss: Annotated[float, "the step's loss: for tokens, nats per unit of weight"]
    grad_norm: Annotated[float, "the gradient's norm before clipping"]
    learning_rate: Annotated[float, "the rate used"]
    rows: Annotated[int, "rows in the step"]
    tokens: Annotated[int, "tokens in the step"]
    trained_tokens: Annotated[int, "tokens in the step that carry weight"]
    computed_tokens: Annotated[int, "tokens that were computed: fewer than `tokens` where rows share what they begin with"]
    seconds: Seconds
    time: Time = ""
    accuracy: Annotated[
        float, "share of the tokens with weight that the model held to be the likeliest; nan where it was not measured"
    ] = field(default_factory=lambda: math.nan)


@dataclass(frozen=True, slots=True)
class PassesShortened:
    """Memory ran out in this step, which is repeated in shorter passes, as are all later ones, also those of a resumed run."""

    name: ClassVar[str] = "passes_shortened"
    step: Annotated[int, "the step that memory ran out in, the first with shorter passes"]
    micro_batch_tokens: Annotated[int, "tokens of a pass, at most, from here on"]
    time: Time = ""


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """The state after this step is durable."""

    name: ClassVar[str] = "checkpoint_saved"
    step: Step
    path: Annotated[str, "the checkpoint's folder, relative to the run folder"]
    seconds: Seconds
    time: Time = ""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The run went back to a checkpoint; events of later steps before this line are superseded."""

    name: ClassVar[str] = "resumed"
    step: Step
    path: Annotated[str, "the checkpoint's folder, relative to the run folder; empty: the run started over"]
    time: Time = ""


@dataclass(frozen=True, slots=True)
class Warned:
    """Something the user should know that does not stop the run."""

    name: ClassVar[str] = "warned"
    message: Annotated[str, "what, and what to do about it"]
    time: Time = ""


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The run is complete and its artifacts are written."""

    name: ClassVar[str] = "run_finished"
    status: Annotated[str, "succeeded"]
    steps: Annotated[int, "updates made"]
    trained_tokens: Annotated[int, "tokens trained in all steps"]
    seconds: Seconds
    peak_bytes: Annotated[int, "the most memory held: resident on a CPU, allocated on a GPU"]
    time: Time = ""


@dataclass(frozen=True, slots=True)
class RunFailed:
    """The run stopped on an error."""

    name: ClassVar[str] = "run_failed"
    code: Annotated[str, "the error's stable code"]
    message: Annotated[str, "the error's message"]
    time: Time = ""


@dataclass(frozen=True, slots=True)
class RunInterrupted:
    """The user asked to stop; the step in progress was finished and saved."""

    name: ClassVar[str] = "run_interrupted"
    step: Step
    time: Time = ""


Event: TypeAlias = (
    RunStarted | DataLoaded | Planned | BaseLoaded | AdapterOpened | Evaluated | StepDone | PassesShortened | CheckpointSaved
    | Resumed | Warned | RunFinished | RunFailed | RunInterrupted
)  # fmt: skip
EVENTS: dict[str, type[Event]] = {kind.name: kind for kind in get_args(Event)}
# Lines that others rely on after a power cut: fsynced before append returns.
_DURABLE = (PassesShortened, CheckpointSaved, Resumed, RunFinished, RunFailed, RunInterrupted)

# --- one event, one line -----------------------------------------------------------------------------------------------------


def to_json(event: Event) -> str:
    """Return the event as one line of JSON, name and time first. JSON has no NaN: it and the infinities become strings.
    Raises TypeError when a field does not hold what its annotation says: such a line could not be read back."""
    values = {name: _checked(getattr(event, name), annotation, name) for name, annotation in _field_types(type(event)).items()}
    ordered = {"name": event.name, "time": values.pop("time"), **values}
    return json.dumps(_plain(ordered), ensure_ascii=False, allow_nan=False)


def from_json(line: str) -> Event:
    """Return the event that `line` holds. Raises IntegrityError for anything else: unknown name, missing, extra or wrong field."""
    try:
        content: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise IntegrityError("not a JSON object")
    values = cast(dict[str, Any], content)
    name = values.pop("name", None)
    kind = EVENTS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise IntegrityError(f"no known event; known are {', '.join(EVENTS)}")
    if kind is StepDone and "tokens" in values:  # records from before rows could share what they begin with
        values.setdefault("computed_tokens", values["tokens"])
    types_of = _field_types(kind)
    for name, default in _defaults(kind).items():  # records from before the field was there
        values.setdefault(name, default)
    if types_of.keys() != values.keys():
        raise IntegrityError(f"{kind.name} has the fields {', '.join(values)}; it must have {', '.join(types_of)}")
    try:
        return kind(**{field: _checked(values[field], annotation, field) for field, annotation in types_of.items()})
    except TypeError as error:
        raise IntegrityError(f"{kind.name}: {error}") from None


@cache
def _field_types(kind: type[Event]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _defaults(kind: type[Event]) -> dict[str, Any]:
    made = {field.name: field.default_factory for field in fields(kind) if field.default_factory is not MISSING}
    return {name: make() for name, make in made.items()}


def _checked(value: Any, annotation: Any, name: str) -> Any:
    """Return `value` as its annotation has it (a JSON list becomes a tuple, an int a float). Raises TypeError."""
    kind = cast(type[object], type(value))
    origin, parts = get_origin(annotation), get_args(annotation)
    if kind is dict and origin is dict:
        return {_checked(key, parts[0], name): _checked(entry, parts[1], name) for key, entry in value.items()}
    if kind in (list, tuple) and origin is list:
        return [_checked(entry, parts[0], name) for entry in value]
    if kind in (list, tuple) and origin is tuple and len(value) == len(parts):
        return tuple(_checked(entry, part, name) for entry, part in zip(value, parts, strict=True))
    if annotation is float and (kind is int or issubclass(kind, float) or (kind is str and value in _NON_FINITE)):
        number = float(value)
        return math.nan if math.isnan(number) else number  # the one NaN, so that an event read back equals the one written
    if annotation is object or kind is annotation or (origin is Literal and value in parts):
        return value
    wanted = annotation.__name__ if isinstance(annotation, type) else annotation
    raise TypeError(f"{name} must be {wanted}, got {kind.__name__}")


_NON_FINITE = ("nan", "inf", "-inf")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in cast(dict[Any, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in cast(list[Any], value)]
    return value


# --- the file ----------------------------------------------------------------------------------------------------------------


def utc_now() -> datetime:
    """Return the present moment; the clock that commands pass to EventLog."""
    return datetime.now(UTC)


class EventLog:
    """The writer of one `events.jsonl`, which goes on after its last whole line. The file stays locked while it is open, so
    that two processes never write one run. Use as a context manager.

    Raises RunFolderError when another process writes there, StorageError."""

    def __init__(self, path: Path, clock: Callable[[], datetime]) -> None:
        self.path = path
        self._clock = clock
        with storage_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            self._length = self._end_of_whole_lines()
            with storage_errors(path):
                sync_folder(path.parent)
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, event: Event) -> Event:
        """Write one line and return the event with its time. The line is with the system when this returns, and on disk for
        the events that others rely on (checkpoint, resume, end). Raises StorageError; the file then ends with the line before."""
        stamped = replace(event, time=_utc_text(self._clock()))
        line = (to_json(stamped) + "\n").encode()
        with storage_errors(self.path):
            try:
                os.ftruncate(self._descriptor, self._length)  # cuts what a killed writer or a failed write left behind
                _write_all(self._descriptor, line, self._length)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, self._length)
                raise
            self._length += len(line)
            if isinstance(stamped, _DURABLE):
                os.fsync(self._descriptor)
        return stamped

    def sync(self) -> None:
        """Put all lines on disk. Called before a checkpoint is saved: after a power cut the record reaches at least as far as
        the newest checkpoint, so that no step between them is missing from it. Raises StorageError."""
        with storage_errors(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Make all lines durable and release the lock."""
        try:
            self.sync()
        finally:
            os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(f"another process is writing {self.path}", hint="wait for it to end, or stop it") from None
        except OSError as error:
            # Some network file systems have no locks. A run there is still right as long as one process works on it.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise

    def _end_of_whole_lines(self) -> int:
        """Return where the next line goes. A last line that lacks only its line feed gets it; a torn one is cut by `append`."""
        with storage_errors(self.path):
            whole, _ = _split_torn(self.path.read_bytes())
            if not whole or whole.endswith(b"\n"):
                return len(whole)
            _write_all(self._descriptor, b"\n", len(whole))
            return len(whole) + 1


def read_events(path: Path) -> list[Event]:
    """Return the run's events in order, without a torn last line and without what a later `resumed` superseded.
    Raises IntegrityError with the line number for a line that is damaged, RunFolderError when there is no such file."""
    try:
        whole, _ = _split_torn(path.read_bytes())
    except FileNotFoundError:
        raise RunFolderError(f"{path} does not exist", hint="give the folder of a run") from None
    events: list[Event] = []
    for number, line in enumerate(whole.removesuffix(b"\n").split(b"\n") if whole else [], start=1):
        try:
            event = from_json(line.decode())
        except (IntegrityError, UnicodeDecodeError) as error:
            reason = error.message if isinstance(error, IntegrityError) else "not UTF-8"
            raise IntegrityError(f"{path}:{number}: {reason}", hint="the line is damaged; restore the file from a copy") from None
        if isinstance(event, Resumed):
            events = _without_superseded(events, event.step)
        elif _scores_base(event):
            # A process killed between this line and the score's own file leaves the line; the next one scores the base again.
            events = [old for old in events if not _scores_base(old)]
        events.append(event)
    return events


def _without_superseded(events: list[Event], step: int) -> list[Event]:
    """Return what still counts of the events before a run went back to `step`: it redoes the later steps, and what came after
    the checkpoint of that very step (a score of the last one, an end not quite reached). The base's score holds for any."""
    returned = (at for at, event in enumerate(events) if isinstance(event, (CheckpointSaved, Resumed)) and event.step == step)
    saved_at = max(returned, default=len(events))
    return [event for at, event in enumerate(events) if not _superseded(event, step, after_saving=at > saved_at)]


def _superseded(event: Event, step: int, *, after_saving: bool) -> bool:
    if _scores_base(event):
        return False
    if isinstance(event, (StepDone, Evaluated, CheckpointSaved)) and event.step > step:
        return True
    return after_saving and isinstance(event, (Evaluated, RunFinished))


def _scores_base(event: Event) -> bool:
    return isinstance(event, Evaluated) and event.which == "base"


def _split_torn(content: bytes) -> tuple[bytes, bytes]:
    """Return (whole lines, torn rest). A last line without its line feed is whole when it is an event: no proper beginning of
    a JSON object is one."""
    end = content.rfind(b"\n") + 1
    try:
        from_json(content[end:].decode())
    except (IntegrityError, UnicodeDecodeError):
        return content[:end], content[end:]
    return content, b""


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _utc_text(moment: datetime) -> str:
    assert moment.tzinfo is not None, "the clock must know its time zone"
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
