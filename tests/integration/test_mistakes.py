"""The pages about mistakes: each shows exactly the message that its own commands print, and each is named by that message.

A page's commands run in this process, most of them to a refusal before a model is loaded. Where the mistake lies in the world
around (a full disk, a hub out of reach, a model under terms), it is made real: a file system, a server on this machine.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from disks import small_disk
from kivnun.cli.main import run
from kivnun.errors import path_of
from kivnun.model.families import BUILT_IN
from pages import ROOT, blocks, commands, prose, save_files

FOLDER = ROOT / "docs" / "mistakes"
MISTAKES = sorted(FOLDER.glob("[0-9]*.md"))
NAME = re.compile(r"\d\d-[a-z0-9-]+")
PARTS = ("## What you see", "## Why", "## What to do", "## Try it")
DISK_BYTES = 24 * 1024


class Gate(BaseHTTPRequestHandler):
    """A hub that knows one model, and gives it to nobody."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to this model is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what is on stderr is compared."""


@contextmanager
def gated_hub(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for where in ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.hf_api.constants.ENDPOINT"):
        patch.setattr(where, f"http://127.0.0.1:{server.server_port}")
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def no_hub(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
    yield


@contextmanager
def model_without_template(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    shutil.copytree(BUILT_IN["kivnun/tiny-phi"], folder / "my-model", ignore=shutil.ignore_patterns("chat_template.jinja"))
    yield


@contextmanager
def model_quantised_otherwise(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    config = shutil.copytree(BUILT_IN["kivnun/tiny-phi"], folder / "my-model") / "config.json"
    tree = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**tree, "quantization_config": {"quant_method": "gptq", "bits": 4}}), encoding="utf-8")
    yield


@contextmanager
def full_disk(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_disk(folder / "disk", DISK_BYTES):
        yield


@contextmanager
def no_gpu(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    patch.setattr("torch.cuda.is_available", lambda: False)
    yield


World = Callable[[Path, pytest.MonkeyPatch], Any]
WORLDS: dict[str, World] = {
    "09-no-chat-template": model_without_template,
    "12-base-not-found": no_hub,
    "13-gated-base": gated_hub,
    "14-quantised-otherwise": model_quantised_otherwise,
    "16-cuda-without-gpu": no_gpu,
    "20-disk-full": full_disk,
}


@contextmanager
def plain(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    yield


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("page", MISTAKES, ids=lambda page: page.stem)
def test_a_page_shows_exactly_the_message_that_its_commands_print(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused, last = "", ""
    with WORLDS.get(page.stem, plain)(tmp_path, monkeypatch):
        save_files(page, tmp_path)
        for line, status in commands(page):
            ended = run([*line[1:], *(("--set", "compute.threads=1") if line[1] == "tune" else ())])
            out, err = capsys.readouterr()
            assert ended == status, f"{line}\n{err}"
            assert "Traceback" not in err
            last = out + err
            refused += err.replace(str(tmp_path), "$PWD") if status else ""
    shown = [block.text for block in blocks(page) if block.language == "text" and block.name is None]
    assert shown, "a page shows a message"
    for text in shown:
        assert words(text) in words(refused), f"the page shows\n{text}\nthe commands print\n{refused}"
    assert f"more: {path_of(page.stem)}" in refused
    assert ended == 0 or page.stem in WORLDS, f"the page ends with what is right:\n{last}"


def test_a_page_has_its_parts_and_shows_the_message_first() -> None:
    for page in MISTAKES:
        text = page.read_text(encoding="utf-8")
        places = [text.find(part) for part in PARTS]
        assert min(places) > 0, page.name
        assert places == sorted(places), page.name


def test_there_are_twenty_and_the_list_has_each() -> None:
    assert [int(page.name[:2]) for page in MISTAKES] == list(range(1, 21))
    listed = re.findall(r"\]\((\d\d[^)]+)\)", prose(FOLDER / "README.md"))
    assert listed == [page.name for page in MISTAKES]


def test_every_page_is_named_by_an_error_and_every_page_that_is_named_is_there() -> None:
    named_in_code = {
        node.value
        for module in sorted((ROOT / "kivnun").rglob("*.py"))
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value)
    }
    assert named_in_code == {page.stem for page in MISTAKES}


def test_the_pages_of_several_problems_are_each_named_once_in_text_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(
        "version: 1\nbase: kivnun/tiny-phi\ndata: {train: rows.jsonl}\nadapter: {rnak: 8}\nschedule: {epochs: many, lr: 1}\n",
        encoding="utf-8",
    )
    assert run(["tune", "x.yaml", "--json"]) == 2
    out, err = capsys.readouterr()
    pages = [path_of("01-misspelt-key"), path_of("02-wrong-type")]
    assert sorted(json.loads(out)["error"]["pages"]) == pages
    assert [err.count(f"more: {page}") for page in pages] == [1, 1]
