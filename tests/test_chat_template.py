"""Chat templates are untrusted programs: whatever they do ends in one clear error, in bounded time."""

from __future__ import annotations

import ast
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, STORIES
from transformers import AutoTokenizer

from zebra.data import chat_template
from zebra.data.chat_template import apply_chat_template
from zebra.errors import ZebraError
from zebra.generation import encode_prompt
from zebra.train.chat import Chat

FAILING = {
    "{% for %}": "cannot be rendered: Expected an expression",
    "{{ x.y.z }}": "cannot be rendered: 'x' is undefined",
    "{{ 1 // 0 }}": "cannot be rendered: ZeroDivisionError: integer division or modulo by zero",
    "{{ messages[0].content + 1 }}": "cannot be rendered: TypeError: can only concatenate str",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "cannot be rendered: RecursionError: ",
    "{{ 'x' * 10**15 }}": "cannot be rendered: MemoryError. ",
    "{{ raise_exception('no user') }}": "cannot be rendered: no user. ",
    # What the sandbox of transformers forbids.
    "{{ ''.__class__.__mro__ }}": "cannot be rendered: access to attribute '__class__' of 'str' object is unsafe",
    "{% set _ = messages.append(1) %}": "cannot be rendered: access to attribute 'append' of 'list' object is unsafe",
    "{% for i in range(10**9) %}{% endfor %}": "cannot be rendered: OverflowError: Range too big",
}
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LONG_POWER = "{% set n = messages | length + 8 %}{{ (n ** (n ** n)) is none }}"
MESSAGES = [{"role": "user", "content": "Who ran?"}]


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(STORIES)


def render(tokenizer: Any, template: str | None) -> Any:
    tokenizer.chat_template = template
    return apply_chat_template(tokenizer, MESSAGES, source="here", remedy="Name another.", tokenize=False)


def message(tokenizer: Any, template: str | None) -> str:
    with pytest.raises(ZebraError) as error:
        render(tokenizer, template)
    return str(error.value)


@pytest.mark.parametrize("template", FAILING)
def test_whatever_a_template_raises_is_one_clear_line(tokenizer: Any, template: str) -> None:
    text = message(tokenizer, template)
    assert text.startswith(f"the chat template of here {FAILING[template]}")
    assert text.endswith(" Name another.")
    assert "\n" not in text


def test_no_template_at_all(tokenizer: Any) -> None:
    assert message(tokenizer, None) == "the tokenizer of here has no chat template. Name another."


@pytest.mark.parametrize("template", [ENDLESS, LONG_POWER])
def test_a_template_that_does_not_end_is_stopped(
    tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "_MAX_SECONDS", 0.2)
    handler = signal.getsignal(signal.SIGVTALRM)
    assert "did not finish within 0.2 s and was stopped. Name another." in message(tokenizer, template)
    assert signal.getsignal(signal.SIGVTALRM) == handler
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert render(tokenizer, "{{ messages[0].content }}") == "Who ran?"


def test_so_it_is_in_another_thread(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MAX_SECONDS", 0.2)
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(message(tokenizer, ENDLESS)), daemon=True)
    thread.start()
    thread.join(20)
    assert "did not finish" in texts[0]


def test_every_caller_has_the_bound(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MAX_SECONDS", 0.2)
    tokenizer.chat_template = ENDLESS
    with pytest.raises(ZebraError, match="did not finish"):
        encode_prompt("Who ran?", tokenizer, chat=True)
    with pytest.raises(ZebraError, match="did not finish"):
        Chat(tokenizer, None, "here")


def test_nothing_else_renders_a_template() -> None:
    """Not by the tokenizer's method, and not by functions of trl outside of `rendering`."""
    callers = [
        str(module.relative_to(ROOT / "src"))
        for module in sorted(Path(ROOT / "src").rglob("*.py"))
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "apply_chat_template"
    ]
    assert callers == ["zebra/data/chat_template.py"]
