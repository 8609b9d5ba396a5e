"""On what a table was measured: processor, cores, versions, and which code."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

import kivnun
from kivnun.artifacts import code_hash

ROOT = Path(kivnun.__file__).parents[1]


def machine_facts() -> dict[str, str]:
    """Return what a reader needs to compare two tables; the commit where the code lies in a repository, else its hash."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    known = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    commit = _git("rev-parse", "--short", "HEAD")
    changed = " with changes" if commit and _git("status", "--porcelain", "--untracked-files=no", "--", "kivnun") else ""
    return {
        "CPU": known.get("model name", platform.processor() or "unknown"),
        "cores": str(sum(line.startswith("processor") for line in lines)),
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "Kivnun": kivnun.__version__,
        "code": f"{commit}{changed}" if commit else code_hash()[:12],
    }


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        return ""
