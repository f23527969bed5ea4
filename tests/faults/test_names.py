"""Names of files, tensors and tokens are shown by real verbs and on real pages, and do nothing there."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import STORIES, Zebra
from safetensors.torch import load_file, save_file

from faults.commands import SEPARATOR, write_inputs
from zebra.errors import printable

NAME = "<img src=x onerror=alert(1)>[red]:smile:\x1b]0;title\x07\x1b[31m\x9b2J"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with a checkpoint and texts whose names are markup and commands to terminals."""
    write_inputs(tmp_path / "inputs")
    shutil.copytree(STORIES, tmp_path / NAME)
    shutil.copy(tmp_path / "inputs" / "few.txt", tmp_path / f"{NAME}.txt")
    (tmp_path / f"{NAME}.jsonl").write_text(json.dumps({"prompt": NAME, "completion": NAME}) + "\n")
    return tmp_path


class Page(HTMLParser):
    """The elements of a page, and the attributes that run code."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: set[str] = set()
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.add(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


COMMANDS: dict[str, tuple[str, ...]] = {
    "plan": ("plan", NAME, "--length", "128"),
    "convert": ("convert", NAME, f"{NAME}-striped", "--stripes", "GLLL:33"),
    "verify": ("verify", NAME, "--length", "64"),
    "generate": ("generate", NAME, "--prompt", NAME, "--max-new-tokens", "2", "--json"),
    "perplexity": (
        *("evaluate", "perplexity", NAME, f"{NAME}.txt", "--length", "64", "--separator", SEPARATOR, "--join"),
        *("--run", NAME, "--out", "results.jsonl"),
    ),
    "report": ("report", "results.jsonl", "-o", "page.html"),
    "data": ("data", "check", f"{NAME}.jsonl"),
    "adapt": ("adapt", "inputs/adapt.yaml", "--set", f"model={json.dumps(NAME)}", "--dry-run"),
    "unknown": ("evaluate", "perplexity", NAME, f"{NAME}.nothing", "--length", "64"),
}


@pytest.mark.full
def test_names_do_nothing_in_terminals_and_on_pages(hostile: Path, zebra: Zebra) -> None:
    for name, arguments in COMMANDS.items():
        done = zebra(*arguments, cwd=hostile)
        assert "Traceback" not in done.stderr, name
        for text in (done.stdout, done.stderr):
            assert printable(text) == text, name
    page = Page((hostile / "page.html").read_text())
    assert "img" not in page.elements
    assert not page.handlers
    assert "&lt;img src=x" in (hostile / "page.html").read_text()
    for file in hostile.glob("page*"):
        assert printable(file.read_text()) == file.read_text()


def test_names_of_tensors_do_nothing(hostile: Path, zebra: Zebra) -> None:
    file = hostile / NAME / "model.safetensors"
    save_file(load_file(file) | {NAME: load_file(file)["model.norm.weight"]}, file, metadata={"format": "pt"})
    done = zebra("generate", NAME, "--prompt", "a", cwd=hostile)
    assert done.returncode == 2
    assert printable(done.stderr) == done.stderr
    assert "title" in done.stderr
