"""Pictures of the service's web pages, for the documentation: runs `kivnun serve`, tunes the built-in base through its pages, and
takes screenshots with Chromium on the way.

    python scripts/service_pictures.py docs/pictures

Writes service-NAME.png: what stands in PICTURES. The service, its data and its key are in a temporary folder. Takes two minutes on
an idle machine.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kivnun.data.scenarios import cldr

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CONFIG = """
version: 1
bases:
  kivnun/tiny-phi: {resident: true, price: {training: 3.0, prompt: 0.2, completion: 0.8}}
  microsoft/Phi-3.5-mini-instruct: {price: {training: 3.0, prompt: 0.2, completion: 0.8}}
  microsoft/Phi-4-mini-instruct: {price: {training: 3.0, prompt: 0.2, completion: 0.8}}
  microsoft/phi-4: {precision: nf4, price: {training: 8.0, prompt: 0.5, completion: 2.0}}
"""
# Name of the picture -> address, width, height, theme.
PICTURES: dict[str, tuple[str, int, int, str]] = {
    "catalogue": ("#/catalogue", 1440, 1000, "light"),
    "report": ("#/data/{broken}", 1440, 900, "light"),
    "plan": ("#/tune?training_file={good}&validation_file={held_out}", 1440, 1180, "light"),
    "job": ("#/jobs/{job}", 1440, 1300, "dark"),
    "job-phone": ("#/jobs/{job}", 390, 1500, "light"),
    "playground": ("#/playground", 1440, 1010, "light"),
    "playground-phone": ("#/playground", 390, 1400, "dark"),
    "usage": ("#/keys", 1440, 1300, "light"),
}
ROWS = 480  # of which it has seen each twice after 60 steps
QUESTION = "Write in Hebrew: November 20, 2032"


@dataclass(frozen=True, slots=True)
class Rows:
    """The files that are sent."""

    good: Path
    held_out: Path
    broken: Path


def main(place: Path) -> int:
    """Write the pictures into a folder; return the exit status."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print(f"no browser found: one of {', '.join(BROWSERS)} must be installed (make setup-system does it)", file=sys.stderr)
        return 1
    from playwright.sync_api import sync_playwright

    place.mkdir(parents=True, exist_ok=True)
    key = f"sk-kivnun-{secrets.token_urlsafe(32)}"
    with tempfile.TemporaryDirectory() as work, serving(Path(work), key) as url, sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--hide-scrollbars"])
        ids = tune(started, url, key, write_rows(Path(work) / "rows"))
        for name, (address, width, height, theme) in PICTURES.items():
            page = signed_in(started, url, key, width, height, theme)
            page.goto(f"{url}/{address.format(**ids)}")
            settle(page, name)
            page.screenshot(path=place / f"service-{name}.png")
            page.context.close()
            print(place / f"service-{name}.png")
        started.close()
    return 0


@contextmanager
def serving(folder: Path, key: str) -> Iterator[str]:
    """Run a service; give its address."""
    (folder / "service.yaml").write_text(CONFIG, encoding="utf-8")
    words = ["serve", "--port", "0", "--json", "--data", str(folder / "data"), "--config", str(folder / "service.yaml")]
    command = [sys.executable, "-m", "kivnun", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "KIVNUN_ADMIN_KEY": key}) as process:
        try:
            assert process.stdout is not None
            yield json.loads(first_object(process.stdout))["url"]
        finally:
            process.send_signal(signal.SIGTERM)


def first_object(lines: Any) -> bytes:
    """Return the JSON object that a stream begins with, however many lines it has."""
    text = b""
    for line in lines:
        text += line
        if line.rstrip() == b"}" or (text.startswith(b"{") and text.rstrip().endswith(b"}")):
            break
    return text


def write_rows(folder: Path) -> Rows:
    """Write dates, amounts and measures, English to Hebrew, as chats; and a draft of the file that has three lines wrong."""
    cldr.write(folder)
    good = (folder / "train.jsonl").rename(folder / "dates-he.jsonl")
    lines = good.read_text(encoding="utf-8").splitlines()[:ROWS]
    good.write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = lines[:40]
    lines[6] = lines[6].replace('"assistant"', '"bot"')
    lines[18] = lines[18][:-12]
    lines[22] = lines[22].replace('"content"', '"text"', 1)
    lines[30] = lines[29]
    broken = folder / "dates-he-draft.jsonl"
    broken.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Rows(good, (folder / "validation.jsonl").rename(folder / "dates-he-held-out.jsonl"), broken)


def tune(browser: Any, url: str, key: str, rows: Rows) -> dict[str, str]:
    """Go the way of a person from files to a tuned model; return the ids of what was made."""
    page = signed_in(browser, url, key, 1440, 1000, "light")
    page.set_default_timeout(1_800_000)  # a busy machine trains slowly
    ids: dict[str, str] = {}
    for name in ("broken", "held_out", "good"):
        path: Path = getattr(rows, name)
        page.goto(f"{url}/#/data")
        page.locator("#file-chosen").set_input_files(path)
        page.get_by_role("link", name=path.name, exact=True).click()
        page.locator(".notice.good, .notice.bad").wait_for()
        ids[name] = page.url.rpartition("/")[2]
    page.goto(f"{url}/#/tune?training_file={ids['good']}&validation_file={ids['held_out']}")
    for label, value in (("Epochs", "2"), ("Batch size", "16"), ("Learning-rate multiplier", "2"), ("Suffix", "dates-he")):
        page.get_by_label(label).fill(value)
    page.get_by_role("button", name="Check the plan").click()
    page.get_by_role("button", name="Start the job").click()
    page.locator(".outcome .notice").wait_for()
    ids["job"] = page.url.rpartition("/")[2]
    page.context.close()
    return ids


def signed_in(browser: Any, url: str, key: str, width: int, height: int, theme: str) -> Any:
    size = {"width": width, "height": height}
    context = browser.new_context(viewport=size, color_scheme=theme, is_mobile=width < 700, has_touch=width < 700)
    page = context.new_page()
    page.goto(url)
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Enter")
    page.locator(".frame").first.wait_for()
    return page


def settle(page: Any, name: str) -> None:
    """Wait until a page shows all that it will, and do what is to be seen on it."""
    page.locator("main h1").wait_for()
    page.locator("[aria-busy]").first.wait_for(state="detached")
    if name == "plan":
        page.get_by_label("Suffix").fill("dates-he")
        page.get_by_role("button", name="Check the plan").click()
        page.locator(".plan .notice").first.wait_for(timeout=120_000)
    if name.startswith("job"):
        page.locator(".curve path.plot").first.wait_for()
    if name.startswith("playground"):
        page.get_by_label("Your question").fill(QUESTION)
        page.keyboard.press("Enter")
        page.locator(".pane.tuned .hash").wait_for(timeout=120_000)
        page.locator(".pane.base .bubble.assistant .row").wait_for(timeout=120_000)
    page.wait_for_timeout(400)  # bars and curves have their last size


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/service_pictures.py FOLDER")
    sys.exit(main(Path(sys.argv[1])))
