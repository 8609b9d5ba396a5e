#!/usr/bin/env bash
# Builds the wheel, installs it alone in a clean environment, and runs it from another folder: shows that no file is missing
# from the package. The libraries come from .venv through a .pth file; the package itself does not, and the last check says so.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# From a copy: setuptools reuses build/ and would ship a file that was deleted since.
mkdir "$work/source"
cp -R kivnun pyproject.toml README.md LICENSE NOTICE "$work/source/"
"$root/.venv/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir "$work/dist" "$work/source"

"$root/.venv/bin/python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-index "$work"/dist/*.whl
libraries=$("$root/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$libraries" >"$site/libraries.pth"

cd "$work"
version=$(venv/bin/kivnun --version)
bases=$(venv/bin/kivnun bases --json)
for name in translation domain; do  # the first needs CLDR, the second reads an installed library; both their spec from the wheel
  venv/bin/kivnun scenario write "$name" --output "$work/$name" --json >/dev/null
  test -s "$work/$name/spec.yaml"
done
venv/bin/python - "$site" "$bases" <<'PY'
import json, pathlib, sys
import kivnun
site, bases = pathlib.Path(sys.argv[1]).resolve(), json.loads(sys.argv[2])
found = pathlib.Path(kivnun.__file__).resolve()
assert found.is_relative_to(site), f"the smoke run used {found}, not the wheel"
for base in (base for base in bases if base["folder"] is not None):  # the others are on the hub
    folder = pathlib.Path(base["folder"])
    assert folder.resolve().is_relative_to(site), f"{base['id']} does not come from the wheel: {folder}"
    assert (folder / "config.json").is_file(), f"{base['id']} has no config.json in the wheel"
PY
printf 'wheel: %s, %s of weights and code, runs alone\n' "$version" "$(du -h "$work"/dist/*.whl | cut -f1)"
