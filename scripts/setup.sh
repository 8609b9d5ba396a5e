#!/usr/bin/env bash
# Makes .venv with all that running, testing and measuring Kivnun uses, at the versions of constraints.txt. Safe to run again:
# a stamp in .venv remembers what was installed, and an unchanged stamp returns at once. Never calls the system's package
# manager (`make setup-system` does) and never asks anything.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/kivnun-setup
torch=torch==2.13.0
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '%s\n' "$*" >&2; }
fail() { say "setup: $1"; say "  hint: $2"; exit 1; }

# The first Python that is new enough and can make environments; a name may exist and not run (a version manager's shim).
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a Python 3.11 or newer with venv" "name another one, or leave PYTHON out"
  if command -v python3 >/dev/null && python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    fail "$(python3 --version) has no venv module" "on Debian and Ubuntu: apt-get install python3-venv (make setup-system does it)"
  fi
  fail "no Python 3.11 or newer found (python3 is: $(python3 --version 2>&1 || echo missing))" \
    "install Python 3.11, 3.12 or 3.13, or name one: make setup PYTHON=/path/to/python3.12"
}

# What was installed, as one hash: the versions, the package's own description, the interpreter and the place.
fingerprint() {
  "$1" - <<'PY'
import hashlib, os, pathlib, sys
parts = [pathlib.Path(name).read_bytes() for name in ("constraints.txt", "pyproject.toml", "scripts/setup.sh")]
print(hashlib.sha256(b"\0".join([*parts, sys.version.encode(), os.getcwd().encode()])).hexdigest())
PY
}

# True when the CPU index answers within five seconds; a machine without a way out must not wait minutes to learn it.
cpu_index_answers() {
  "$venv/bin/python" - "$cpu_index" <<'PY'
import subprocess, sys
probe = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + '/torch/', timeout=4).close()"
try:
    done = subprocess.run([sys.executable, "-c", probe, sys.argv[1]], timeout=5, capture_output=True)
except subprocess.TimeoutExpired:
    sys.exit(1)
sys.exit(done.returncode)
PY
}

# The plain wheel for Linux brings gigabytes of CUDA. Where there is no NVIDIA GPU, PyTorch's own index of CPU builds is tried first.
install_torch() {
  if "$venv/bin/python" -c 'import sys, importlib.metadata as m; sys.exit(m.version("torch").split("+")[0] != sys.argv[1])' \
    "${torch#torch==}" 2>/dev/null; then
    return
  fi
  if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && cpu_index_answers; then
    say "setup: no NVIDIA GPU here: PyTorch for the CPU"
    if pip_install --timeout 5 --retries 0 --no-deps --index-url "$cpu_index" "$torch"; then
      return
    fi
    say "setup: the index of CPU builds did not deliver; the plain build then"
  fi
  pip_install -c constraints.txt "$torch"
}

pip_install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@"; }

main() {
  local python wanted
  python=$(find_python)
  if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(fingerprint "$venv/bin/python")" = "$(cat "$stamp")" ]; then
    return
  fi
  if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
    say "setup: making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
  fi
  rm -f "$stamp"
  say "setup: installing PyTorch and the pinned libraries (minutes, once)"
  install_torch
  pip_install -c constraints.txt setuptools
  # Without build isolation the build uses the pinned setuptools above and downloads nothing of its own.
  pip_install -c constraints.txt --no-build-isolation -e '.[dev,bench,data,deepspeed,harness,serve,service,tensorboard]'
  wanted=$(fingerprint "$venv/bin/python")
  printf '%s\n' "$wanted" >"$stamp"
  say "setup: done ($("$venv/bin/python" -c 'import importlib.metadata as m; print("torch", m.version("torch"))'))"
}

main "$@"
