"""`zebra chat`: in a terminal by real keys and signals, without one line by line; documents of every kind."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Zebra, refused

from zebra.data.documents import document_text
from zebra.errors import ZebraError

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def checkpoint(stories: Path) -> Path:
    (stories / "chat_template.jinja").write_text(TEMPLATE)
    return stories


class Terminal:
    """A process in its own pseudo-terminal: tests write keys and read the screen."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self._screen, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (24, 100))
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zebra", *map(str, arguments)],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"} | environment,
            preexec_fn=lambda: os.login_tty(terminal),
            pass_fds=[terminal],
        )
        os.close(terminal)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """The screen's text up to what is expected, without the colours."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"{pattern!r} is not in {self.text!r}"
            if select.select([self._screen], [], [], 1)[0]:
                try:
                    raw = os.read(self._screen, 65536)
                except OSError:  # the process has ended
                    raw = b""
                assert raw, f"it ended before {pattern!r}: {self.text!r}"
                if b"\x1b[6n" in raw:
                    self.type("\x1b[1;1R")  # where the cursor is, as a terminal answers
                self.text += re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])", "", raw.decode(errors="replace"))
        before, self.text = self.text[: match.end()], self.text[match.end() :]
        return before


@pytest.mark.parametrize("prompt", ["prompt_toolkit", pytest.param("input", marks=pytest.mark.full)])
def test_ctrl_c_ends_the_answer_and_not_the_session(checkpoint: Path, tmp_path: Path, prompt: str) -> None:
    if prompt == "prompt_toolkit":
        pytest.importorskip("prompt_toolkit")
    else:
        (tmp_path / "without" / "prompt_toolkit").mkdir(parents=True)
        (tmp_path / "without" / "prompt_toolkit" / "__init__.py").write_text("raise ImportError")
    path = f"{tmp_path / 'without'}:{os.environ.get('PYTHONPATH', '')}"
    with Terminal(
        "chat", checkpoint, "--self-extend", "auto:16384", "--max-new-tokens", 16000, PYTHONPATH=path
    ) as terminal:
        terminal.wait_for(">")
        terminal.type("Hello\r")
        terminal.wait_for("friend")  # a word of the greedy answer alone: it has begun
        terminal.type("\x03")
        assert "first token" in terminal.wait_for(r"stopped")
        terminal.wait_for(">")
        terminal.type("\x03")
        terminal.wait_for("/exit or Ctrl-D leaves")
        terminal.type("/nothing\r")
        terminal.wait_for("there is no command /nothing")
        terminal.type("/undo\r")
        terminal.wait_for("removed: Hello")
        terminal.wait_for(">")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0


def test_without_a_terminal_each_line_is_a_message(checkpoint: Path, tmp_path: Path, zebra: Zebra) -> None:
    (tmp_path / "story.md").write_text("# A story\n\nTom had a red ball.")
    lines = "Who had a ball?\n\n/stats\n/regenerate\n/system Be kind.\nAnd then?\n/save talk.jsonl\n/exit\nNever read\n"
    done = zebra("chat", checkpoint, "--file", "story.md", "--max-new-tokens", 9, cwd=tmp_path, input=lines)
    assert done.returncode == 0, done.stderr
    (saved,) = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    roles = [message["role"] for message in saved["messages"]]
    assert roles == ["system", *["user", "assistant"] * 2]
    assert saved["messages"][1]["content"] == "# A story\n\nTom had a red ball.\n\nWho had a ball?"
    first, second = saved["messages"][2]["content"], saved["messages"][4]["content"]
    assert done.stdout == f"{first}\n{first}\n{second}\n"
    assert "story.md is read: context" in done.stderr
    assert (
        len(re.findall(r"context \d+ of 512 · cache [\d.]+ MiB · first token [\d.]+ s · [\d.]+ tokens/s", done.stderr))
        == 4
    )
    assert "\x1b" not in done.stdout + done.stderr


def test_files_of_one_name_in_two_folders_are_both_read(checkpoint: Path, tmp_path: Path, zebra: Zebra) -> None:
    for name, text in (("a", "Tom had a red ball."), ("b", "Lily had a cat.")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "story.txt").write_text(text)
    files = "--file", "a/story.txt", "--file", "b/story.txt"
    lines = "Who?\n/save talk.jsonl\n"
    done = zebra("chat", checkpoint, *files, "--max-new-tokens", 3, cwd=tmp_path, input=lines)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "talk.jsonl").read_text())
    assert saved["messages"][0]["content"] == "Tom had a red ball.\n\nLily had a cat.\n\nWho?"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("/nothing\n", "there is no command /nothing"),
        ("/file\n", "/file requires a path"),
        ("/file none.txt\n", "no file matches none.txt"),
        ("/regenerate\n", "no message to answer again"),
        ("/save x.jsonl\n", "at least one answer before it"),
        ("word " * 600 + "\n", "this model reads 512"),
    ],
    ids=lambda part: part[:12],
)
def test_without_a_terminal_the_first_error_ends_it(checkpoint: Path, zebra: Zebra, lines: str, says: str) -> None:
    refused(zebra("chat", checkpoint, input=lines), says)


def test_a_checkpoint_without_a_template_is_refused_before_it_is_loaded(
    stories: Path, zebra: Zebra, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zebra.model.load_options.load", None)
    refused(zebra("chat", stories, input="Hello\n"), "no chat template", "tuned for chat")


def pdf(text: str) -> bytes:
    """A minimal PDF with one page that shows a text."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]
    file, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(file))
        file += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    end = b"trailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(file)
    return file + b"xref\n0 5\n0000000000 65535 f \n" + table + end


def test_documents_are_text_markdown_and_pdf(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    assert document_text(tmp_path / "a.txt") == "one\ntwo"
    (tmp_path / "b[1].PDF").write_bytes(pdf("Tom had a ball"))
    assert document_text(tmp_path / "b[1].PDF") == "Tom had a ball"
    for content, says in ((b"no pdf", "cannot be read as a PDF"), (pdf(""), "has no text")):
        (tmp_path / "c.pdf").write_bytes(content)
        with pytest.raises(ZebraError, match=says):
            document_text(tmp_path / "c.pdf")


def test_a_terminal_obeys_nothing_that_a_model_or_a_document_says(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zebra.cli.chat_session import ChatSession
    from zebra.conversation import Conversation

    chat = Conversation(checkpoint)
    session = ChatSession(chat, is_terminal=True)
    monkeypatch.setattr(chat, "reply", lambda message: (piece for piece in ["\x1b]0;title\x07 ", "a\x9b31mb"]))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    session.run(["Hi"])
    session.add_document("\x1b[31mred.txt", "Tom had a ball.")
    written: Any = capsys.readouterr()
    assert "␛]0;title␇ a�31mb" in written.out
    assert "\x1b]" not in written.out
    assert "\x1b[31m" not in written.out + written.err
