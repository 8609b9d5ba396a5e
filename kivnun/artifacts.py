"""What is on disk is whole or absent: atomic files and folders, hashes, manifests, and the numeric environment they were made in.

Every artifact (checkpoint, adapter, run folder) is a folder with a `manifest.json` that is written last and lists each file's
size and SHA-256. A process that dies at any point leaves the old state or the new one, and perhaps hidden leftovers
(`.tmp-*`, `.old-*`) that `sweep` clears. Next: `events.py` (the run's record), `train/checkpoint.py` (which states are kept).
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, cast

from kivnun.errors import IntegrityError, StorageError

MANIFEST = "manifest.json"
_LEFTOVER = re.compile(r"\.(tmp|old)-(.+)-[0-9a-f]{8}")

# --- errors of the disk ------------------------------------------------------------------------------------------------------

_DISK_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than is allowed here",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the system does not permit it",
    errno.EIO: "the disk reports an input/output error",
    errno.EEXIST: "a file of that name is in the way",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
}
_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def storage_errors(path: Path) -> Generator[None]:
    """Turn the disk's own failures inside the block into StorageError, naming `path`; other errors pass unchanged."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        number = _system_error_number(error)
        if number not in _DISK_WORDS:
            raise
        raise StorageError(
            f"cannot write {path}: {_DISK_WORDS[number]} ({os.strerror(number)})",
            hint=_hint(number, path),
            pages=("20-disk-full",) if number in _ROOM else (),
        ) from error


def _system_error_number(error: Exception) -> int | None:
    """Return the errno behind an exception. Libraries written in Rust (safetensors) raise their own class, with the number in
    the text only: "I/O error: No space left on device (os error 28)"."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _hint(number: int, path: Path) -> str:
    if number in _ROOM:
        return f"{_free_space(path)} free there; make room or choose another folder; what was saved before is intact"
    if number == errno.EIO:
        return "look at the system's log for the device; what was saved before may need `kivnun verify`"
    return "choose a folder that can be written to; what was saved before is intact"


def _free_space(path: Path) -> str:
    existing = next((place for place in (path, *path.absolute().parents) if place.exists()), Path("/"))
    free_bytes = shutil.disk_usage(existing).free
    return f"{free_bytes / 2**20:.1f} MiB"


# --- atomic writes -----------------------------------------------------------------------------------------------------------


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace `path` with `data` (text as UTF-8): after a crash the old content or the new is there, never a part.
    The folder must exist. Raises StorageError; the old content is then intact and no partial file stays."""
    content = data.encode() if isinstance(data, str) else data
    temporary = _beside(path, "tmp")
    with storage_errors(path):
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell; `sweep` clears what stays
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Give an empty folder to fill; at the block's end make it durable and rename it to `path`.

    A folder already at `path` is replaced as a whole: it is moved aside, the new one takes its name, then it is deleted. A
    process killed between the two renames leaves it as `.old-*`, which `sweep` puts back. When the block raises, `path` is as
    it was and the partial folder is removed. Raises StorageError."""
    temporary = _beside(path, "tmp")
    with storage_errors(path):
        make_folder(path.parent)
        try:
            temporary.mkdir()
            yield temporary
            _sync_tree(temporary)
            _take_name(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # the first error is the one to tell; `sweep` clears what stays
            raise


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, and put their names on disk. One that is there already is left as it is."""
    with storage_errors(path):
        if not path.is_dir():
            make_folder(path.parent)
            path.mkdir(exist_ok=True)
            sync_folder(path.parent)


def discard(path: Path) -> None:
    """Delete a folder so that a process killed in the middle never leaves a part of it under its own name."""
    aside = _beside(path, "tmp")
    with storage_errors(path):
        os.rename(path, aside)
        sync_folder(path.parent)
        shutil.rmtree(aside)


def sweep(parent: Path) -> None:
    """Clear what a killed writer left in `parent`; a folder that was moved aside and not yet replaced gets its name back.
    Only for the one process that may write there: a living writer's temporary folder would be removed too."""
    with storage_errors(parent):
        for leftover in sorted(parent.iterdir()) if parent.is_dir() else []:
            found = _LEFTOVER.fullmatch(leftover.name)
            if found is None:
                continue
            if found[1] == "old" and not (parent / found[2]).exists():
                os.rename(leftover, parent / found[2])
            elif leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
            sync_folder(parent)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{kind}-{path.name}-{secrets.token_hex(4)}")


def _take_name(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`. POSIX cannot rename over a folder that holds files, hence the step aside."""
    aside = _beside(path, "old") if path.exists() else None
    if aside is not None:
        os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except OSError:
        if aside is not None:
            os.rename(aside, path)
        raise
    sync_folder(path.parent)
    if aside is not None:
        shutil.rmtree(aside)


def _sync_tree(folder: Path) -> None:
    """Make everything in `folder` durable. Files get the folder's own read and write permissions, which follow the user's
    umask: safetensors 0.8 gives its files 0600 whatever the umask, and a group that shares a folder could not read them."""
    mode = folder.stat().st_mode & 0o666
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(Path(place, name), "rb") as file:
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable. Some file systems (FUSE, network) refuse fsync on a folder: nothing more can be done."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# --- hashes and manifests ----------------------------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path, pattern: str = "**/*") -> str:
    """Return one SHA-256 over the relative names and bytes of the files in `folder` that match the glob `pattern`."""
    return hash_files({name: hash_file(folder / name) for name in _names(folder, folder.glob(pattern))})


def hash_files(hashes: Mapping[str, str]) -> str:
    """Return one SHA-256 over files by their relative names and their own hashes."""
    return _digest(hashes)


def listed_hash(manifest: Mapping[str, Any], folder: str, without: str | None = None) -> str | None:
    """Return what `hash_folder` gives of a subfolder, from the manifest that lists its files, one left out by name; None where
    it lists none."""
    prefix = f"{folder}/"
    files = {name.removeprefix(prefix): said["sha256"] for name, said in manifest["files"].items() if name.startswith(prefix)}
    files.pop(without or "", None)
    return _digest(files) if files else None


def code_hash() -> str:
    """Return one SHA-256 over the package's Python files: which code made an artifact."""
    return hash_folder(Path(__file__).parent, "**/*.py")


def write_manifest(folder: Path, fields: Mapping[str, Any], files: Iterable[str] | None = None) -> None:
    """Write `manifest.json`, atomically and last: `fields` (JSON values) and every file's size and SHA-256.

    `files` names the files or subfolders to list, relative to `folder`; None means everything there. A run folder, whose
    events grow, lists only what no longer changes. A digest of the manifest itself guards the fields. Raises StorageError."""
    assert not {"files", "digest"} & set(fields), "these two names are the manifest's own"
    listed = [folder] if files is None else [folder / name for name in files]
    names = _names(folder, (file for place in listed for file in ([place] if place.is_file() else place.rglob("*"))))
    sizes = {name: {"size": (folder / name).stat().st_size, "sha256": hash_file(folder / name)} for name in names}
    content = {**fields, "files": sizes}
    content["digest"] = _digest(content)
    atomic_write(folder / MANIFEST, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest's fields, with `files`; the files themselves are not read. Raises IntegrityError."""
    path = folder / MANIFEST
    try:
        content: object = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise IntegrityError(f"{folder} has no {MANIFEST}: it was not written to its end", hint="it cannot be used") from None
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON: {error}", hint="the file is damaged; restore it from a copy") from None
    if not isinstance(content, dict):
        raise IntegrityError(f"{path} is not a JSON object", hint="the file is damaged; restore it from a copy")
    manifest = cast(dict[str, Any], content)
    said = manifest.pop("digest", None)
    found = _digest(manifest)
    if said != found:
        raise IntegrityError(
            f"{path} was changed: its digest says {said}, its content gives {found}", hint="restore it from a copy"
        )
    return manifest


def check_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest's fields after comparing every listed file with its size and hash. Raises IntegrityError, which
    names the first file that differs and both hashes. Files that are not listed are not looked at."""
    manifest = read_manifest(folder)
    for name, said in manifest["files"].items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise IntegrityError(
                f"{folder / MANIFEST} lists {name!r}, which is outside its folder", hint="restore the folder from a copy"
            )
        if not path.is_file():
            raise IntegrityError(
                f"{path} is missing: {MANIFEST} lists it with sha256 {said['sha256']}", hint="restore it from a copy"
            )
        found = hash_file(path)
        if found != said["sha256"]:
            size = path.stat().st_size
            raise IntegrityError(
                f"{path} was changed: {MANIFEST} says sha256 {said['sha256']} ({said['size']} bytes), "
                f"the file has {found} ({size} bytes)",
                hint="restore it from a copy, or make it again",
            )
    return manifest


def _names(folder: Path, files: Iterable[Path]) -> list[str]:
    """Return the sorted relative names of files, without manifests at the top and leftovers of killed writers."""
    relative = {file.relative_to(folder) for file in files if file.is_file()}
    whole = [name for name in relative if not any(_LEFTOVER.fullmatch(part) for part in name.parts)]
    return sorted(name.as_posix() for name in whole if name != Path(MANIFEST))


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# --- the numeric environment -------------------------------------------------------------------------------------------------

_PACKAGES = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "kivnun")
# Instruction sets by which oneDNN, MKL, ATen and tokenizers' friends pick kernels; other flags do not change a sum.
_KERNEL_FLAG = re.compile(r"(avx|amx|fma|f16c|sse4|ssse3|asimd|sve|neon|bf16|i8mm|fp16|fphp)\w*|sme(?!p)\w*")
# Variables by which a user changes those kernels from outside; recorded because they change results, never set here.
_SWITCHES = (
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_DYNAMIC",
    "MKL_ENABLE_INSTRUCTIONS", "NVIDIA_TF32_OVERRIDE", "OMP_DYNAMIC", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip


def numeric_environment(threads: int, device: str, kernels: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what decides the last bit of a result besides spec, data and code: two equal environments give equal bits.
    `kernels` are the engine's own choices, by name. Versions are read from metadata: nothing is imported."""
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        **_processor(Path("/proc/cpuinfo")),
        **{f"version.{package}": _version(package) for package in _PACKAGES},
        **{f"variable.{name}": os.environ[name] for name in _SWITCHES if name in os.environ},
        "threads": threads,
        "device": device,
        "gpu": _gpus(Path("/proc/driver/nvidia")) if device.startswith("cuda") else "none",
        **{f"kernel.{name}": choice for name, choice in sorted((kernels or {}).items())},
    }


def environment_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each entry that differs; an empty list means that results are equal to the bit."""
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name, 'not set')}, is {now.get(name, 'not set')}" for name in changed]


def _processor(cpuinfo: Path) -> dict[str, str]:
    """Return the CPU's model and the kernel-choosing flags of its first core. Without /proc: what Python knows."""
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    first: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        first.setdefault(name.strip().lower(), value.strip())
    flags = (first.get("flags") or first.get("features") or "").split()
    numbers = " ".join(first[name] for name in ("cpu family", "model", "stepping", "cpu part") if name in first)
    model = f"{first.get('model name') or platform.processor() or 'unknown'} ({numbers})"
    return {"cpu": model, "cpu_features": " ".join(sorted(flag for flag in flags if _KERNEL_FLAG.fullmatch(flag)))}


def _gpus(driver: Path) -> str:
    """Return the driver's version and the GPUs' models as the kernel module tells them, so that torch is not needed."""
    version = re.search(r"\d{3}[.\d]+", (driver / "version").read_text()) if (driver / "version").is_file() else None
    models = [re.search(r"Model:\s*(.+)", file.read_text()) for file in sorted(driver.glob("gpus/*/information"))]
    return f"driver {version[0] if version else 'unknown'}; {', '.join(model[1] for model in models if model) or 'unknown'}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
