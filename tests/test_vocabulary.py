"""Names and prose use the field's terms: see docs/conventions.md, "Vocabulary"."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
TESTS = sorted((ROOT / "tests").glob("*.py"))
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    if page.name not in ("log.md", "CHANGELOG.md")  # dated records
)

VAGUE_NAMES = frozenset(
    {
        *("found", "kept", "made", "said", "told", "wanted", "given", "hung"),
        *("mine", "theirs", "reckoned", "settled", "turned", "asked", "sunken", "heard"),
    }
)
"""They say that something happened, not what they hold."""

PRIVATE_WORDS = re.compile(
    r"\breckon|\brehears|\btrifle\b|\brefusal|\bstand-in\b|\bthe hosts?\b|\bnumbers of a head\b|\bbeside the stream\b"
    r"|\bhung on\b|\brows_per_step\b|\brows\.jsonl\b|\bof the measuring\b|\bfast_float32\b",
    re.IGNORECASE,
)
"""Words that only this project used for what has a standard term."""


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Each name that a module defines: variables, attributes, parameters, functions and classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield (node.id if isinstance(node, ast.Name) else node.attr), node.lineno


def private_words(page: Path) -> list[str]:
    lines = page.read_text(encoding="utf-8").splitlines()
    return [
        f"{page.relative_to(ROOT)}:{number}: {match[0]}"
        for number, line in enumerate(lines, start=1)
        for match in PRIVATE_WORDS.finditer(line)
    ]


def test_names_say_what_they_hold() -> None:
    vague = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in [*SOURCES, *TESTS]
        for name, line in names(ast.parse(file.read_text(encoding="utf-8")))
        if name.strip("_") in VAGUE_NAMES
    ]
    assert not vague, "\n".join(vague)


def test_code_and_pages_use_the_fields_words() -> None:
    private = [hit for page in [*SOURCES, *PAGES] for hit in private_words(page)]
    assert not private, "\n".join(private)


def test_both_lists_can_fail() -> None:
    defined = [name for name, _ in names(ast.parse("def f(kept): found = self.made = kept"))]
    assert sorted(defined) == ["f", "found", "kept", "made"]
    assert PRIVATE_WORDS.search("costs are reckoned in a trifle of time")
