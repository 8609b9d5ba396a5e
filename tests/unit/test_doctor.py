"""The doctor on machines of all kinds: this one, and broken ones, made of folders, programs and packages."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kivnun.cli.main import run
from kivnun.model.checkup import STAGES as TRIED
from kivnun.plan import checkup, machine
from kivnun.plan.checkup import STAGES, Finding, try_out
from kivnun.plan.machine import Cpu, Disk, Driver, Machine, Memory, read_cpu, read_driver, read_memory

GIB = 2**30
TORCH: dict[str, Any] = {"version": "2.13.0", "built_for_cuda": None, "gpus": [], "bf16": None}
CUDA_TORCH = {**TORCH, "built_for_cuda": "13.0"}
GPU = {"name": "NVIDIA L4", "memory_bytes": 24 * GIB, "capability": [8, 9]}
WELL: dict[str, dict[str, Any]] = {
    "torch": TORCH,
    "libraries": {},
    "kernels": {"reason": None, "packs": ["bf16", "fp32"], "compiler": "cc: 12"},
    "triton": {"reason": "there is no CUDA device"},
    "speed": {"fp32": 66e9, "bf16": 165e9},
}


def a_machine(**parts: Any) -> Machine:
    usual: dict[str, Any] = {
        "python": "3.11.7",
        "system": "Linux",
        "cpu": Cpu("A processor", ("AVX2",), 8, 8, None),
        "memory": Memory(64 * GIB, 60 * GIB, None, None),
        "disks": (Disk("this folder", Path("here"), 100 * GIB, True),),
        "driver": None,
    }
    return Machine(**{**usual, **parts})


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Judge a machine and what was tried on it, as the doctor does."""

    def judge(tried: dict[str, dict[str, Any]] = WELL, **parts: Any) -> tuple[checkup.Checkup, dict[str, Finding]]:
        monkeypatch.setattr(checkup, "read_machine", lambda folder: a_machine(**parts))
        monkeypatch.setattr(checkup, "try_out", lambda: tried)
        found = checkup.check_up(Path())
        return found, {finding.name: finding for finding in found.findings}

    return judge


# --- this machine ---


def test_this_machine_is_judged_and_what_a_run_would_take_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    status = run(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    states = {finding["name"]: finding["state"] for finding in told["findings"]}
    assert status == 0, told
    assert told["ok"] is True
    assert {"Python", "processor", "cores", "memory", "torch works", "GPU", "transformers", "kernels in C", "hub"} <= set(states)
    assert ("C compiler" in states) == (shutil.which("cc") is not None or "CC" in os.environ)
    assert "speed in bf16" in states
    assert all(finding["do"] for finding in told["findings"] if finding["state"] == "problem")
    small, large = told["defaults"]
    assert (small["base"], large["base"]) == ("kivnun/tiny-phi", "microsoft/Phi-4-mini-instruct")
    assert large["precision"] == "bf16"
    assert small["threads"] == large["threads"] >= 1
    assert large["step_bytes"] > 7e9, "3.8 B numbers in two bytes"


def test_both_sides_know_the_same_stages() -> None:
    assert tuple(TRIED) == STAGES


# --- processes that try, on machines where something is broken ---


def in_environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_without_a_compiler_the_kernels_are_a_note_and_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.delenv("CC", raising=False)
    in_environment(monkeypatch, PATH=str(tmp_path / "bin"), XDG_CACHE_HOME=str(tmp_path))
    found = try_out(("kernels",))
    assert found == {"kernels": {"reason": "there is no C compiler (cc, gcc or clang)", "compiler": None}}
    (line,) = checkup._of_kernels(found)
    assert (line.state, line.do.startswith("install a C compiler")) == ("note", True)


def fake_package(folder: Path, name: str, text: str) -> str:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text, encoding="utf-8")
    return os.pathsep.join([str(folder), str(Path(checkup.__file__).parents[2])])


def test_a_torch_that_cannot_be_imported_is_a_problem_and_the_status_is_1(tmp_path: Path) -> None:
    place = fake_package(tmp_path, "torch", "raise OSError('libtorch.so: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": place}
    command = [sys.executable, "-m", "kivnun", "doctor"]
    plain = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert plain.returncode == 1
    line = next(line for line in plain.stdout.splitlines() if "torch works" in line)
    assert line.startswith("problem")
    assert "libtorch.so: cannot open shared object file" in line
    assert "make setup" in line
    assert plain.stdout.splitlines()[-1] == "1 problem to mend before a run is possible"
    assert "Traceback" not in plain.stderr


def test_a_torch_that_crashes_is_told_with_its_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", fake_package(tmp_path, "torch", "import os; os.abort()"))
    assert try_out() == {"torch": {"error": "the process that tried it was ended by signal 6"}}


def test_a_stage_that_fails_does_not_hide_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", fake_package(tmp_path, "tokenizers", "import os; os._exit(3)"))
    found = try_out(("torch", "libraries"))
    assert found["torch"]["version"]
    assert found["libraries"] == {"error": "the process that tried it ended with status 3"}


# --- what the system tells ---


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


MEMINFO = "MemTotal:       16384000 kB\nMemFree:  100 kB\nMemAvailable:    8192000 kB\n"


def test_limits_of_control_groups_of_version_2_count_the_outer_ones_too(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "proc/meminfo": MEMINFO,
            "sys/fs/cgroup/outer/memory.max": "2147483648\n",
            "sys/fs/cgroup/outer/memory.current": "1073741824\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/outer/inner/cpu.max": "max 100000\n",
        },
    )
    memory = read_memory(root)
    assert (memory.total, memory.available, memory.limit, memory.in_use) == (16384000 * 1024, 8192000 * 1024, 2 * GIB, GIB)
    assert memory.for_a_run == GIB
    assert read_cpu(root).quota == 1.5


def test_limits_of_control_groups_of_version_1(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/box\n4:cpu,cpuacct:/box\n",
            "proc/meminfo": MEMINFO,
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "1073741824\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "0\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert read_memory(root).limit == GIB
    assert read_cpu(root).quota == 0.5


def test_a_machine_without_proc_is_read_all_the_same(tmp_path: Path) -> None:
    assert read_memory(tmp_path).total > 0
    assert read_memory(tmp_path).limit is None
    assert read_cpu(tmp_path).allowed >= 1


@pytest.mark.parametrize(
    ("text", "model", "features"),
    [
        ("model name : Xeon 4\nflags : fpu avx2 avx512f amx_tile\n", "Xeon 4", ("AVX2", "AVX-512", "AMX")),
        ("processor : 0\nmodel name : Neoverse\nFeatures : fp asimd sve bf16\n", "Neoverse", ("NEON", "NEON BF16", "SVE")),
    ],
)
def test_processors_are_named_with_what_decides_kernels(text: str, model: str, features: tuple[str, ...], tmp_path: Path) -> None:
    cpu = read_cpu(written(tmp_path, {"proc/cpuinfo": text}))
    assert (cpu.model, cpu.features) == (model, features)


def program(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_driver_is_asked_and_may_be_missing_broken_or_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "echo 'NVIDIA L4, 23034, 580.1'", monkeypatch)
    assert read_driver() == Driver((("NVIDIA L4", 23034 * 2**20, "580.1"),), None)
    program(tmp_path, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", monkeypatch)
    broken = read_driver()
    assert broken is not None
    assert "version mismatch" in (broken.problem or "")
    program(tmp_path, "exit 9", monkeypatch)
    assert read_driver() == Driver((), "nvidia-smi fails: status 9")
    program(tmp_path, "true", monkeypatch)
    assert read_driver() == Driver((), None)
    (tmp_path / "nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_driver() is None


# --- what is made of it ---


def test_a_machine_where_all_is_well_has_no_note_about_itself(judged: Any) -> None:
    found, lines = judged()
    assert found.ok
    assert [name for name in ("cores", "memory", "GPU", "kernels in C") if lines[name].state != "ok"] == []
    assert [one.fits for one in found.defaults] == [True, True]


@pytest.mark.parametrize(
    ("parts", "line", "state", "advice"),
    [
        ({"cpu": Cpu("x", (), 64, 8, 1.5)}, "cores", "note", "set compute.threads to 1"),
        ({"memory": Memory(GIB, 100 * 2**20, None, None)}, "memory", "problem", "end other programs"),
        ({"memory": Memory(64 * GIB, 60 * GIB, 8 * GIB, GIB)}, "memory", "note", ""),
        ({"disks": (Disk("this folder", Path("x"), GIB, False),)}, "disk: this folder", "problem", "another folder"),
        ({"disks": (Disk("this folder", Path("x"), 2**20, True),)}, "disk: this folder", "problem", "make room"),
        ({"disks": (Disk("downloads", Path("x"), 2**20, True),)}, "disk: downloads", "note", "make room"),
        ({"disks": (Disk("kernels", Path("x"), GIB, False),)}, "disk: kernels", "note", "XDG_CACHE_HOME"),
        ({"driver": Driver((), "nvidia-smi fails: no NVML")}, "GPU", "note", "mend the NVIDIA driver"),
        ({"driver": Driver((("L4", GIB, "580"),), None)}, "GPU", "note", "built for CUDA"),
    ],
)
def test_what_is_in_the_way_is_told_with_what_to_do(judged: Any, parts: dict[str, Any], line: str, state: str, advice: str) -> None:
    found, lines = judged(**parts)
    assert lines[line].state == state
    assert advice in lines[line].do
    assert found.ok == (state != "problem")


def test_a_gpu_that_torch_does_not_see_is_explained(judged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver((("L4", GIB, "470.1"),), None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _, lines = judged({**WELL, "torch": CUDA_TORCH}, driver=driver)
    assert "the driver (470.1) may be too old for CUDA 13.0" in lines["GPU"].do
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    _, lines = judged({**WELL, "torch": CUDA_TORCH}, driver=driver)
    assert "CUDA_VISIBLE_DEVICES is ''" in lines["GPU"].found


def test_a_gpu_decides_what_a_run_takes(judged: Any) -> None:
    tried = {**WELL, "torch": {**CUDA_TORCH, "gpus": [GPU], "bf16": True}, "triton": {"reason": None}}
    found, lines = judged(tried)
    assert lines["GPU"].state == "ok"
    assert {(one.device, one.precision, one.kernels) for one in found.defaults} == {("cuda", "bf16", "triton")}
    _, lines = judged({**tried, "torch": {**CUDA_TORCH, "gpus": [GPU], "bf16": False}, "triton": {"reason": "no ptxas"}})
    assert (lines["GPU"].state, lines["kernels in Triton"].state) == ("note", "note")


def test_products_in_bf16_that_are_slower_than_in_fp32_are_a_note(judged: Any) -> None:
    _, lines = judged({**WELL, "speed": {"fp32": 66e9, "bf16": 20e9}})
    assert (lines["speed in fp32"].state, lines["speed in bf16"].state) == ("ok", "note")


def test_versions_are_compared_with_what_is_needed_and_what_was_tested(judged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"peft": "0.1.0", "transformers": "5.99.0", "torch": "2.13.0+cu130", "rich": None}
    real = machine.version_of
    monkeypatch.setattr(checkup, "version_of", lambda name: versions.get(name, real(name)))
    monkeypatch.setattr(checkup, "pinned", lambda: {"torch": "2.13.0", "transformers": "5.23.0"})
    found, lines = judged()
    assert not found.ok
    assert (lines["peft"].state, lines["rich"].state) == ("problem", "problem")
    assert "0.1.0, >=" in lines["peft"].found
    assert (lines["transformers"].state, lines["transformers"].found) == ("note", "5.99.0; tested with 5.23.0")
    assert lines["torch"].state == "ok", "a build for another device is the same version"


def test_every_extra_that_a_user_may_want_is_told() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(checkup.EXTRAS) == set(project["optional-dependencies"]) - {"dev", "bench"}


def test_an_extra_that_is_missing_is_no_problem_and_says_what_it_is_for(judged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "version_of", lambda name: None if name in checkup.EXTRAS else "99")
    _, lines = judged()
    line = lines["extra: deepspeed"]
    assert (line.state, line.do) == ("ok", "pip install 'kivnun[deepspeed]', if it is wanted")
    assert "zero_stage" in line.found


class Quiet(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


def test_the_hub_is_asked_on_request_only_and_what_it_does_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "not asked" in checkup._of_the_hub(False).found
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert checkup._of_the_hub(True).found.startswith(f"{address} answers")
    server.shutdown()
    server.server_close()
    silent = checkup._of_the_hub(True)
    assert (silent.state, "is not reached" in silent.found) == ("note", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in checkup._of_the_hub(True).found
