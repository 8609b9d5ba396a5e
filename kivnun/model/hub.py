"""Bases from the Hugging Face hub: what is downloaded, that it is whole, and what to do where it cannot be had.

Files lie in the cache that all of Hugging Face's libraries share, and are laid there by its own. Large ones are fetched here: a
download that was cut goes on from where it was, in this process or a later one, and what came is held against the hash that the
hub names. Imports nothing heavy; the hub's library is loaded when it is asked. Next: `families.py` (what a folder holds).
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kivnun.artifacts import hash_file
from kivnun.errors import BaseModelError, IntegrityError, StorageError
from kivnun.model.phi import REFUSED_FAMILY, nearest_id, refusal_of

# What goes on while files are fetched: the base, bytes that are here, bytes in all.
OnBytes = Callable[[str, int, int], None]

SMALL = re.compile(r"[^/]+\.(json|jinja)|tokenizer\.model|LICENSE[^/]*")  # at the top of a repository; folders hold other formats
NOT_FOUND, GATED = "12-base-not-found", "13-gated-base"  # of docs/mistakes
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
TIMEOUT_S = 30.0
WAITS_S = (0.0, 1.0, 2.0, 4.0, 8.0)  # before each new try without a byte in between

log = logging.getLogger("kivnun.hub")


def download(model: str, revision: str | None = None, on_bytes: OnBytes = lambda name, done, total: None) -> Path:
    """Return the folder of a hub's model: its configuration, tokenizer and safetensors, and nothing else.

    A branch or tag is asked for at the hub each time; a commit that is here whole is taken without asking. Where the hub cannot be
    reached, or HF_HUB_OFFLINE is set, what the cache holds is taken, which a warning says. Raises BaseModelError, StorageError for
    a disk that is too small, IntegrityError for a file that is not what the hub says.
    """
    return _had(model, revision, lambda: _fetched(model, revision, on_bytes), _cached)


def download_texts(model: str, revision: str | None = None) -> Path:
    """Return the folder of a hub's model with its configuration and tokenizer in it; its weights may lack, and are not fetched.

    Otherwise as `download`.
    """
    return _had(model, revision, lambda: _texts(model, revision).folder, _cached_texts)


def may_come_later(error: BaseModelError) -> bool:
    """Return whether the hub could not answer, so that what is asked for may be had later."""
    return isinstance(error.__cause__, _Unreachable)


def _had(model: str, revision: str | None, fetch: Callable[[], Path], cached: Callable[[str, str | None, str], Path]) -> Path:
    """Return a model's folder from the hub or, where that need not or cannot be asked, from the cache."""
    reason = refusal_of(model)
    if reason is not None:
        raise BaseModelError(f"{model}: {reason[0]}", hint=reason[1], pages=(REFUSED_FAMILY,))
    if is_offline():
        return cached(model, revision, "HF_HUB_OFFLINE is set")
    if revision is not None and COMMIT.fullmatch(revision):
        try:
            folder = cached(model, revision, "it is a commit")
        except BaseModelError:
            folder = None  # not here yet, or not whole
        if folder is not None and (folder / "tokenizer.json").is_file():  # another program may have fetched the weights alone
            return folder
    try:
        with _told(model, revision):
            return fetch()
    except _Unreachable as error:
        try:
            folder = cached(model, revision, f"the hub cannot be reached ({error})")
        except BaseModelError as lacking:
            raise BaseModelError(lacking.message, hint=lacking.hint, pages=lacking.pages) from error
        log.warning("the hub cannot be reached (%s): taking what is here of %s, commit %s", error, model, commit_of(folder))
        return folder


def configuration(model: str) -> dict[str, Any]:
    """Return the config.json of a hub's model, and fetch nothing else of it. Raises BaseModelError."""
    from huggingface_hub import hf_hub_download

    try:
        with _told(model, None):
            found = json.loads(Path(hf_hub_download(model, "config.json")).read_text(encoding="utf-8"))
    except _Unreachable as error:
        raise BaseModelError(f"the configuration of {model!r} could not be had: {error}", hint=_hint_for(model)) from error
    if not isinstance(found, dict):
        raise BaseModelError(f"the config.json of {model!r} holds no JSON object", hint="use another base")
    return found


def commit_of(folder: Path) -> str | None:
    """Return which commit of a repository a folder of the cache holds; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name) else None


def is_offline() -> bool:
    """Return whether the hub's library was told to ask nobody."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def refuse_damaged(folder: Path, hashes: Mapping[str, str]) -> None:
    """Raise IntegrityError where a file of the cache is not what the hub named it by: `hashes` are SHA-256, by name in `folder`.

    The cache keeps a large file under its SHA-256. Folders of other kinds have nothing to be compared with.
    """
    if commit_of(folder) is None:
        return
    for name, found in hashes.items():
        blob = (folder / name).resolve()
        if SHA256.fullmatch(blob.name) and found != blob.name:
            raise _damaged(blob, name, blob.name, found)


# --- the hub's answer ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Texts:
    """The small files of a model, which are here, and what else its repository holds at that commit."""

    folder: Path
    revision: Any
    files: dict[str, Any]
    small: list[str]


def _texts(model: str, revision: str | None) -> _Texts:
    """Fetch what is read of a model beside its weights."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    api.model_info(model, revision=revision, timeout=TIMEOUT_S)  # fails at once; what follows would go to the cache, or wait
    resolved = api.resolve_revision(model, revision=revision)
    entries = api.list_repo_tree(model, revision=resolved.resolved)
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    small = [name for name in files if SMALL.fullmatch(name)]
    if "config.json" not in files:
        raise BaseModelError(f"{model} is not a model folder: it has no config.json", hint="name a repository that holds a model")
    folder = _laid_out(model, resolved, small)
    _refuse_damaged_text(folder, {name: files[name].blob_id for name in small if files[name].lfs is None})
    _refuse_family(model, folder)
    return _Texts(folder, resolved, files, small)


def _fetched(model: str, revision: str | None, on_bytes: OnBytes) -> Path:
    texts = _texts(model, revision)
    folder, files = texts.folder, texts.files
    weights = _weights(model, list(files), folder)
    lacking = [name for name in weights if name not in files]
    if lacking:
        raise BaseModelError(f"{model} names weights that it does not hold: {', '.join(lacking[:3])}", hint="tell its authors")
    missing = [files[name] for name in weights if not (folder / name).is_file()]
    if missing:
        _fetch_all(model, texts.revision.resolved, missing, folder.parent.parent, on_bytes)
    return _laid_out(model, texts.revision, [*texts.small, *weights])


def _laid_out(model: str, revision: Any, names: Sequence[str], local: bool = False) -> Path:
    """Return the snapshot's folder with these files in it, as the hub's library lays them out."""
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    shown = _silent_bar()
    return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=local, tqdm_class=shown))


def _silent_bar() -> Any:
    """Return a progress bar that shows nothing: a person sees the command's own."""
    from tqdm import tqdm

    class Silent(tqdm):  # type: ignore[type-arg]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **{**named, "disable": True})

    return Silent


def _weights(model: str, names: Sequence[str], folder: Path) -> list[str]:
    """Return the weights to fetch, as `families.weight_files` chooses them. Raises BaseModelError where there are none."""
    if WHOLE in names:
        return [WHOLE]
    if INDEX in names:
        try:
            named = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise BaseModelError(f"the {INDEX} of {model} cannot be read: {error}", hint="tell its authors") from error
        return named
    found = [name for name in names if name.endswith(".safetensors")]
    if not found:
        raise without_weights(model, names)
    return found


def without_weights(model: str, names: Sequence[str]) -> BaseModelError:
    """Return what is said of a model whose files, by name, are no safetensors: those of other formats are never opened."""
    other = sorted({Path(name).suffix for name in names if name.endswith(OTHER_WEIGHTS)})
    return BaseModelError(
        f"{model} holds no .safetensors weights" + (f", only {', '.join(other)}" if other else ""),
        hint="open the model with transformers where you trust its files, save it with save_pretrained (safetensors), and give "
        "that folder as the base",
    )


def _refuse_family(model: str, folder: Path) -> None:
    """Refuse what cannot be used whatever its weights are, before gigabytes of them are fetched."""
    from kivnun.model.families import read_config, refuse_family

    refuse_family(model, read_config(folder))


# --- what the cache holds ------------------------------------------------------------------------------------------------------


def _cached(model: str, revision: str | None, why: str) -> Path:
    """Return the cache's folder of a model, whole, without asking the hub. Raises BaseModelError."""
    folder = _cached_folder(model, revision, why)
    names = [file.name for file in folder.iterdir() if file.is_file()]
    known = INDEX in names or any(name.endswith(".safetensors") for name in names)
    _refuse_lacking(model, revision, folder, ["config.json", *(_weights(model, names, folder) if known else [WHOLE])], why)
    return folder


def _cached_texts(model: str, revision: str | None, why: str) -> Path:
    """Return the cache's folder of a model with its configuration and tokenizer, as `_cached`."""
    folder = _cached_folder(model, revision, why)
    _refuse_lacking(model, revision, folder, ["config.json", "tokenizer.json"], why)
    return folder


def _cached_folder(model: str, revision: str | None, why: str) -> Path:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _laid_out(model, revision, ["config.json"], local=True)
    except LocalEntryNotFoundError as error:
        raise BaseModelError(
            f"base {model!r}{_at(revision)} is not on this machine, and {why}",
            hint="fetch it once with a network and without HF_HUB_OFFLINE, or give a folder",
            pages=(NOT_FOUND,),
        ) from error


def _refuse_lacking(model: str, revision: str | None, folder: Path, needed: Sequence[str], why: str) -> None:
    lacking = [name for name in needed if not (folder / name).is_file()]
    if lacking:
        raise BaseModelError(
            f"base {model!r}{_at(revision)} is here in part: {', '.join(lacking[:3])} was not fetched, and {why}",
            hint="fetch the rest with a network and without HF_HUB_OFFLINE",
        )


# --- large files ---------------------------------------------------------------------------------------------------------------


def _fetch_all(model: str, commit: str, files: Sequence[Any], place: Path, on_bytes: OnBytes) -> None:
    """Put files into the cache's blobs, one after the other: one connection is enough to fill a line, and a cut costs one file."""
    total, done = sum(file.size for file in files), 0
    (place / "blobs").mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    here = sum(part.stat().st_size for file in files if (part := _part(place, file)).is_file())
    if total - here > free:
        raise StorageError(
            f"{model} needs {(total - here) / 1e9:.1f} GB on the disk of {place}, which has {free / 1e9:.1f}",
            hint="make room, or set HF_HOME to a folder on another disk",
        )
    for file in files:
        if file.lfs is not None:  # the hub's library fetches what is too small for a hash of its own
            before = done
            _fetch(model, commit, file, place, lambda count, before=before: on_bytes(model, before + count, total))
        done += file.size
        on_bytes(model, done, total)


def _fetch(model: str, commit: str, file: Any, place: Path, on_count: Callable[[int], None]) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    sha256, part = file.lfs.sha256, _part(place, file)
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / place.name / f"{sha256}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # the hub's library takes the same one
        blob = place / "blobs" / sha256
        if blob.is_file():
            return
        _fill(model, commit, file, part, on_count)
        found = hash_file(part)
        if found != sha256:
            part.unlink()
            raise _damaged(part, file.path, sha256, found)
        os.replace(part, blob)


def _part(place: Path, file: Any) -> Path:
    """Return where a file grows. It stays when a download is cut, under a name that says what it will be."""
    return place / "blobs" / f"{file.lfs.sha256 if file.lfs else file.blob_id}.part"


def _fill(model: str, commit: str, file: Any, part: Path, on_count: Callable[[int], None]) -> None:
    """Fetch until the part is as long as the file: each try goes on from where the last one was cut."""
    from httpx2 import TransportError
    from huggingface_hub import hf_hub_url

    url, tries = hf_hub_url(model, file.path, revision=commit), 0
    part.touch()
    if part.stat().st_size > file.size:
        part.write_bytes(b"")
    while (have := part.stat().st_size) < file.size:
        reason = "it ended early"
        try:
            _receive(url, part, file.size, on_count)
        except TransportError as error:
            reason = type(error).__name__
        came = part.stat().st_size
        if came == file.size:
            return
        tries = 1 if came > have else tries + 1
        if tries > len(WAITS_S):
            raise BaseModelError(
                f"{model}: {came:,} of {file.size:,} bytes of {file.path} came, then the connection failed ({reason})",
                hint="run the command again: the download goes on from there",
            )
        time.sleep(WAITS_S[tries - 1])


def _receive(url: str, part: Path, size: int, on_count: Callable[[int], None]) -> None:
    """Append what the hub sends to the part. A hub that does not know how to go on is asked for all of it again."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    at = part.stat().st_size
    headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={at}-"} if at else {})
    with http_stream_backoff("GET", url, headers=headers, timeout=TIMEOUT_S, retry_on_exceptions=()) as response:
        hf_raise_for_status(response)
        goes_on = response.status_code == 206
        with part.open("ab" if goes_on else "wb") as stream:
            for chunk in response.iter_raw():  # as it comes: a cut loses nothing
                stream.write(chunk[: max(0, size - stream.tell())])
                on_count(stream.tell())


# --- what went wrong -----------------------------------------------------------------------------------------------------------


class _Unreachable(Exception):
    """Nobody answered, or the hub said that it cannot now: what is here may serve."""


@contextmanager
def _told(model: str, revision: str | None) -> Generator[None]:
    """Turn what the hub's library raises into one sentence and what to do."""
    from httpx2 import TransportError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    try:
        yield
    except (BaseModelError, StorageError, IntegrityError):
        raise
    except GatedRepoError as error:
        raise BaseModelError(
            f"{model} is behind a licence that this machine has not shown to be accepted",
            hint=f"accept it at https://huggingface.co/{model}, log in with `hf auth login` or set HF_TOKEN, and run again",
            pages=(GATED,),
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelError(
            f"{model} has no revision {revision!r}", hint="name a branch, a tag or a full commit of it, or leave base.revision out"
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"there is no model {model!r} on the hub, or it is private", hint=_hint_for(model), pages=(NOT_FOUND,)
        ) from error
    except HFValidationError as error:
        raise BaseModelError(f"{model!r} is no id of a hub's model: {str(error).splitlines()[0]}", hint=_hint_for(model)) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 429 or status >= 500:
            raise _Unreachable(f"it answered {status}") from error
        if status in (401, 403):
            raise BaseModelError(
                f"the hub refuses {model}: it answered {status}",
                hint="log in with `hf auth login`, or give HF_TOKEN a token that may read it",
                pages=(GATED,),
            ) from error
        raise BaseModelError(f"the hub does not give {model}: it answered {status}", hint=_hint_for(model)) from error
    except (RevisionResolutionError, TransportError, LocalEntryNotFoundError) as error:
        cause = error.__cause__ if isinstance(error, RevisionResolutionError) and error.__cause__ else error
        response = getattr(cause, "response", None)
        raise _Unreachable(f"it answered {response.status_code}" if response is not None else type(cause).__name__) from error
    except OSError as error:
        raise BaseModelError(
            f"{model} could not be downloaded: {str(error).splitlines()[0]}", hint="run again, or set HF_HOME to another folder"
        ) from error


def _hint_for(model: str) -> str:
    near = nearest_id(model)
    start = f"did you mean {near}? Else " if near and near != model else ""
    return f"{start}check the id and the network; a private model needs `hf auth login`; or give a folder"


def _at(revision: str | None) -> str:
    return f" at {revision}" if revision else ""


def _damaged(file: Path, name: str, said: str, found: str) -> IntegrityError:
    return IntegrityError(
        f"{name} is not what the hub holds: its SHA-256 should be {said}, is {found}",
        hint=f"remove {file} and run again: it is fetched anew" if file.is_file() else "run again: it is fetched anew",
    )


def _refuse_damaged_text(folder: Path, blobs: Mapping[str, str]) -> None:
    """Hold small files against git's hash of them. Raises IntegrityError."""
    for name, said in blobs.items():
        content = (folder / name).read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        if found != said:
            raise IntegrityError(
                f"{name} is not what the hub holds: git's hash of it should be {said}, is {found}",
                hint=f"remove {(folder / name).resolve()} and run again: it is fetched anew",
            )
