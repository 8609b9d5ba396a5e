"""Writes are whole or absent, hashes find any change, and the disk's failures become clear errors."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from disks import forbidden_folder, read_only, small_disk
from kivnun.artifacts import (
    MANIFEST,
    _processor,
    atomic_folder,
    atomic_write,
    check_manifest,
    code_hash,
    discard,
    environment_difference,
    hash_file,
    hash_folder,
    make_folder,
    numeric_environment,
    read_manifest,
    storage_errors,
    sweep,
    write_manifest,
)
from kivnun.errors import IntegrityError, StorageError

MEBIBYTE = 2**20


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_atomic_write_replaces_the_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.txt", "old")
    atomic_write(tmp_path / "a.txt", "כוונון")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "כוונון"
    assert names(tmp_path) == ["a.txt"]


def test_content_is_on_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def fsync(descriptor: int) -> None:
        calls.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split("-")[0])

    def rename(source: Path, target: Path, real=os.rename) -> None:
        calls.append(f"rename to {Path(target).name}")
        real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with atomic_folder(tmp_path / "made") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "x").write_bytes(b"x")
        (folder / "y").write_bytes(b"y")
    parent = f"sync {tmp_path.name.split('-')[0]}"
    assert calls == ["sync x", "sync inner", "sync y", "sync .tmp", "rename to made", parent]


def test_every_folder_on_the_way_is_on_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [str(tmp_path), str(tmp_path / "a")]


def test_a_block_that_raises_leaves_the_old_folder_and_no_part_of_the_new(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "made") as folder:
        (folder / "x").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "made") as folder:
        (folder / "x").write_text(str((folder / "y").write_text("new")) + (folder / "absent").read_text())
    assert names(tmp_path) == ["made"]
    assert (tmp_path / "made" / "x").read_text() == "old"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with atomic_folder(tmp_path / "made") as folder:
            (folder / name).write_text(name)
    assert names(tmp_path) == ["made"]
    assert names(tmp_path / "made") == ["second"]


def test_a_folder_that_cannot_take_its_name_gives_it_back_to_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "x").write_text("old")

    def rename(source: Path, target: Path, real=os.rename) -> None:
        if source.name.startswith(".tmp-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(StorageError, match="input/output error"), atomic_folder(tmp_path / "made"):
        pass
    assert names(tmp_path) == ["made"]
    assert (tmp_path / "made" / "x").read_text() == "old"


def test_files_of_a_folder_follow_the_umask_whatever_the_library_that_wrote_them(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "made") as folder:
            save_file({"x": np.zeros(4, np.float32)}, folder / "x.safetensors")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "made" / "x.safetensors").stat().st_mode) == 0o640


def test_sweep_clears_leftovers_and_puts_a_folder_back_that_was_moved_aside(tmp_path: Path) -> None:
    (tmp_path / ".tmp-a.json-0123abcd").write_text("partial")
    for leftover in (".tmp-made-0123abcd", ".old-made-0123abcd", ".old-kept-0123abcd"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "x").write_text(leftover)
    (tmp_path / "kept").mkdir()
    (tmp_path / ".tmp-of-the-user").write_text("not ours")
    sweep(tmp_path)
    sweep(tmp_path / "absent")
    assert names(tmp_path) == [".tmp-of-the-user", "kept", "made"]
    assert (tmp_path / "made" / "x").read_text() == ".old-made-0123abcd"


def test_discard_deletes_the_folder(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "x").write_text("x")
    discard(tmp_path / "made")
    assert names(tmp_path) == []


def test_a_folder_that_is_being_deleted_has_lost_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made").mkdir()
    seen: list[bool] = []
    monkeypatch.setattr(shutil, "rmtree", lambda folder: seen.append((tmp_path / "made").exists()))
    discard(tmp_path / "made")
    assert seen == [False]


# --- the disk's failures -----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_clear_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", MEBIBYTE) as disk:
        atomic_write(disk / "a.bin", b"old")
        with pytest.raises(StorageError, match=r"a\.bin: the disk is full") as caught:
            atomic_write(disk / "a.bin", bytes(2 * MEBIBYTE))
        assert (disk / "a.bin").read_bytes() == b"old"
        assert names(disk) == ["a.bin"]
        assert "MiB free" in str(caught.value)
        assert "intact" in str(caught.value)


def test_a_full_disk_that_safetensors_meets_is_the_same_error(tmp_path: Path) -> None:
    """safetensors raises a class of its own, not OSError."""
    with small_disk(tmp_path / "disk", MEBIBYTE) as disk:
        with pytest.raises(StorageError, match="the disk is full"), atomic_folder(disk / "made") as folder:
            save_file({"x": np.zeros(MEBIBYTE, np.float32)}, folder / "x.safetensors")
        assert names(disk) == []


def test_a_read_only_file_system_is_a_clear_error(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", MEBIBYTE) as disk:
        atomic_write(disk / "a.txt", "old")
        with read_only(disk):
            with pytest.raises(StorageError, match="read-only"):
                atomic_write(disk / "a.txt", "new")
            with pytest.raises(StorageError, match="read-only"), atomic_folder(disk / "made"):
                pass
        assert (disk / "a.txt").read_text() == "old"


def test_a_folder_without_write_permission_is_a_clear_error() -> None:
    with forbidden_folder() as folder:
        with pytest.raises(StorageError, match="permission is denied"):
            atomic_write(folder / "a.txt", "new")
        with pytest.raises(StorageError, match="permission is denied"), atomic_folder(folder / "deeper" / "made"):
            pass


def test_a_file_in_the_way_of_a_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is in the way"), atomic_folder(tmp_path / "file" / "made"):
        pass
    with pytest.raises(StorageError, match="is a file, not a folder"):
        atomic_write(tmp_path / "file" / "made", "x")


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO])
def test_errors_no_test_machine_can_make_are_worded_too(number: int, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}: the disk") as caught, storage_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert caught.value.code == "storage"
    assert caught.value.hint


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        (tmp_path / "absent").read_text()
    with pytest.raises(ValueError, match="not of the disk"), storage_errors(tmp_path):
        raise ValueError("not of the disk")


# --- hashes and manifests ----------------------------------------------------------------------------------------------------


def test_hash_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert hash_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_hash_folder_sees_content_and_names_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "x").write_text("x")
    before = hash_folder(tmp_path)
    os.utime(tmp_path / "inner" / "x", (0, 0))
    assert hash_folder(tmp_path) == before
    (tmp_path / "inner" / "x").rename(tmp_path / "inner" / "y")
    assert hash_folder(tmp_path) != before


def test_code_hash_covers_the_package() -> None:
    assert len(code_hash()) == 64
    assert code_hash() == code_hash()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"aaaa")
    (folder / "inner" / "b.bin").write_bytes(b"bb")
    write_manifest(folder, {"step": 3, "loss": 0.5})
    return folder


def test_a_manifest_lists_every_file_and_gives_the_fields_back(artifact: Path) -> None:
    manifest = check_manifest(artifact)
    assert (manifest["step"], manifest["loss"]) == (3, 0.5)
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {"a.bin": 4, "inner/b.bin": 2}


def test_a_changed_file_is_named_with_both_hashes(artifact: Path) -> None:
    before = hash_file(artifact / "inner" / "b.bin")
    (artifact / "inner" / "b.bin").write_bytes(b"bc")
    with pytest.raises(IntegrityError) as caught:
        check_manifest(artifact)
    for part in ("inner/b.bin", before, hash_file(artifact / "inner" / "b.bin")):
        assert part in str(caught.value)


def test_any_single_changed_byte_is_found(artifact: Path) -> None:
    for file in (artifact / MANIFEST, artifact / "a.bin"):
        content = file.read_bytes()
        for place in range(len(content.rstrip())):
            damaged = bytearray(content)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            try:
                unchanged = json.loads(damaged) == json.loads(content) if file.name == MANIFEST else False
            except ValueError:
                unchanged = False
            if not unchanged:  # a space that became another space says the same
                with pytest.raises(IntegrityError):
                    check_manifest(artifact)
        file.write_bytes(content)
    check_manifest(artifact)


def test_a_missing_file_or_manifest_is_found(artifact: Path) -> None:
    (artifact / "a.bin").unlink()
    with pytest.raises(IntegrityError, match=r"a\.bin is missing"):
        check_manifest(artifact)
    (artifact / MANIFEST).unlink()
    with pytest.raises(IntegrityError, match="no manifest"):
        read_manifest(artifact)


def test_a_run_folder_lists_only_what_no_longer_changes(artifact: Path) -> None:
    write_manifest(artifact, {}, files=["inner"])
    (artifact / "a.bin").write_bytes(b"grows")
    assert list(check_manifest(artifact)["files"]) == ["inner/b.bin"]


def test_a_manifest_never_makes_us_read_outside_its_folder(artifact: Path) -> None:
    (artifact.parent / "outside").write_text("x")
    write_manifest(artifact, {}, files=["../outside"])
    with pytest.raises(IntegrityError, match="outside its folder"):
        check_manifest(artifact)


# --- the numeric environment -------------------------------------------------------------------------------------------------

TWO_CORES = """processor : 0
model name : Some CPU
cpu family : 6
model : 143
stepping : 8
flags : fpu smep avx2 amx_bf16 avx512f
processor : 1
model name : Other CPU
flags : fpu
"""


def test_the_processor_is_told_by_model_and_the_flags_that_choose_kernels(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(TWO_CORES)
    assert _processor(tmp_path / "cpuinfo") == {"cpu": "Some CPU (6 143 8)", "cpu_features": "amx_bf16 avx2 avx512f"}
    assert _processor(tmp_path / "absent")["cpu_features"] == ""


def test_environments_differ_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    before = numeric_environment(2, "cpu", {"gemm": "onednn"})
    assert environment_difference(before, json.loads(json.dumps(before))) == []
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    now = numeric_environment(4, "cpu", {"gemm": "mkl"})
    assert environment_difference(before, now) == [
        "kernel.gemm was onednn, is mkl",
        "threads was 2, is 4",
        "variable.ONEDNN_MAX_CPU_ISA was not set, is AVX2",
    ]


def test_the_core_values_never_import_torch() -> None:
    script = (
        "import sys, kivnun.artifacts as a, kivnun.events, kivnun.train.checkpoint; a.numeric_environment(1, 'cpu');"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
