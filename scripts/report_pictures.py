"""Pictures of the report and of a comparison, for the documentation: makes two short runs and takes screenshots with Chromium.

    python scripts/report_pictures.py docs/pictures

Writes report-wide.png, report-dark.png, report-phone.png and compare-wide.png. Runs and rows are made in a temporary folder.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from kivnun.cli.main import run
from kivnun.data.scenarios import cldr

SPEC = {
    "version": 1,
    "base": "kivnun/tiny-phi",
    "data": {"train": "rows/train.jsonl", "validation": "rows/validation.jsonl"},
    "adapter": {"kind": "lora", "rank": 16},
    "schedule": {"steps": 60, "batch_rows": 16, "learning_rate": 4e-3},
    "evaluation": {"metrics": ["exact_match", "chrf"], "generate_rows": 40, "max_new_tokens": 24, "every_steps": 12, "samples": 3},
    "seed": 7,
}
# Name of the picture -> page, width, height, and what else the browser is told.
PICTURES: dict[str, tuple[str, int, int, tuple[str, ...]]] = {
    "report-wide": ("words/report.html", 1440, 1900, ()),
    "report-dark": ("words/report.html", 1440, 1900, ("--force-dark-mode",)),
    "report-phone": ("words/report.html", 390, 1900, ()),
    "compare-wide": ("compare.html", 1440, 1900, ()),
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main(place: Path) -> int:
    """Write the pictures into a folder; return the exit status."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print(f"no browser found: one of {', '.join(BROWSERS)} must be installed (make setup-system does it)", file=sys.stderr)
        return 1
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        cldr.write(folder / "rows")
        (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC), encoding="utf-8")
        runs: list[tuple[str, list[str]]] = [("words", []), ("rank-1", ["--set", "adapter.rank=1"])]
        for name, changes in runs:
            status = run(["tune", str(folder / "spec.yaml"), "--output", str(folder / name), *changes])
            if status:
                return status
        if status := run(["compare", *(str(folder / name) for name, _ in runs), "--output", str(folder / "compare.html")]):
            return status
        for name, (page, width, height, more) in PICTURES.items():
            take(browser, folder / page, place / f"{name}.png", width, height, more)
            print(place / f"{name}.png")
    return 0


def take(browser: str, page: Path, picture: Path, width: int, height: int, more: tuple[str, ...]) -> None:
    """Take the picture of the top of a page, `height` pixels of it."""
    command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", f"--window-size={width},{height}"]
    subprocess.run(
        [*command, *more, f"--screenshot={picture.absolute()}", page.as_uri()], check=True, capture_output=True, timeout=120
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/report_pictures.py FOLDER")
    sys.exit(main(Path(sys.argv[1])))
