"""The session of `zebra chat`: answers as they come, commands, a bar while a prompt is read, a line of numbers."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from rich.text import Text

from zebra.cli import show
from zebra.conversation import Conversation
from zebra.data.documents import document_text
from zebra.errors import ZebraError, machine_fault
from zebra.files import atomic_write
from zebra.model.load_options import loaded_layout_name
from zebra.progress import bar, console

_SMALL = 256
"""Tokens of a prompt that need no bar."""


class ChatSession:
    """A conversation, and what the user does with it.

    Args:
        is_terminal: an error is shown and the session goes on; else it is raised.
    """

    def __init__(self, chat: Conversation, *, is_terminal: bool) -> None:
        self.chat, self._is_terminal = chat, is_terminal
        self._bar = _PromptBar()
        self._saved: set[Path] = set()
        chat.on_prefill = self._bar
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/file": (self._file, "PATH: add a document before the next message"),
            "/undo": (self._undo, "remove the last message and its answer"),
            "/regenerate": (self._regenerate, "answer the last message again"),
            "/system": (self._system, "[TEXT]: show or set the system message"),
            "/save": (self._save, "PATH: write the conversation as JSON Lines, which zebra tune reads"),
            "/stats": (self._stats, "show the model and statistics of the last answer"),
            "/help": (self._help, "show this list"),
            "/exit": (self._help, "leave, like Ctrl-D"),
        }

    def run(self, messages: Iterable[str]) -> None:
        """Answer messages and perform commands until there are no more, or `/exit`.

        Raises:
            ZebraError: without a terminal, the first error.
        """
        if self._is_terminal:
            show.note("/help lists the commands. Alt-Enter starts a new line. Ctrl-C stops an answer.")
        for message in messages:
            if message.split()[0] == "/exit":
                return
            try:
                self._perform(message)
            except Exception as error:
                fault = str(error) if isinstance(error, ZebraError) else machine_fault(error)
                if fault is None or not self._is_terminal:
                    raise
                show.note(f"zebra: {' '.join(fault.split())}")

    def add_document(self, name: str, text: str) -> None:
        """Read a document; Ctrl-C ends that, and the conversation stays without it."""
        with _interrupts() as interrupted, self._bar:
            tokens = self.chat.add_document(text, interrupted.is_set)
        if tokens is None:
            self._note(f"{name} was not added; the part that was read stays in the cache.")
        else:
            self._note(f"{name} is read: context {self._of_reach(tokens)}. Ask about it.")

    def _perform(self, message: str) -> None:
        name, _, argument = message.partition(" ")
        if not name.startswith("/"):
            self._answer(self.chat.reply(message))
        elif name in self._commands:
            self._commands[name][0](argument.strip())
        else:
            raise ZebraError(
                f"there is no command {name}. /help lists them; to begin a message with /, put a word before it."
            )

    def _answer(self, pieces: Generator[str, None, None]) -> None:
        if self._is_terminal:  # a shell's background job inherits that it is ignored
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # An interrupt may come between two pieces, where the answer would not see it.
        with closing(pieces), show.writing(True) as write, self._bar:
            assert write is not None
            try:
                for piece in pieces:
                    write(piece)
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
        if not sys.stdout.isatty():
            print(flush=True)
        self._note(self._numbers())

    def _file(self, path: str) -> None:
        if not path:
            raise ZebraError("/file requires a path. Use for example /file book.txt.")
        file = Path(path.strip("'\"")).expanduser()
        self.add_document(file.name, document_text(file))

    def _undo(self, _: str) -> None:
        content = self.chat.undo()
        self._note("there is nothing to undo." if content is None else f"removed: {content}")

    def _regenerate(self, _: str) -> None:
        pieces = self.chat.regenerate()
        if self.chat.decoding.temperature == 0:
            self._note("temperature 0 gives the same answer again; use --temperature 0.8 for another.")
        self._answer(pieces)

    def _system(self, text: str) -> None:
        if text:
            self.chat.system = text
        self._note(self.chat.system or "there is no system message.")

    def _save(self, path: str) -> None:
        if not path or not self.chat.messages:
            raise ZebraError(
                "/save requires a path, and at least one answer before it. Use for example /save chat.jsonl."
            )
        file = Path(path.strip("'\"")).expanduser().absolute()
        if file.exists() and file not in self._saved:
            raise ZebraError(f"{file} exists already. Name another file.")
        atomic_write(file, json.dumps({"messages": self.chat.transcript()}, ensure_ascii=False) + "\n")
        self._saved.add(file)
        self._note(f"{len(self.chat.messages)} messages in {file}")

    def _stats(self, _: str) -> None:
        model, last = self.chat.model, self.chat.last
        dtype = str(model.dtype).removeprefix("torch.")
        self._note(f"{model.name_or_path}: {loaded_layout_name(model)}, {dtype} on {model.device}")
        self._note(f"{len(self.chat.messages)} messages, {len(self.chat.documents)} documents before the next")
        if last is not None:
            new = last.prompt_tokens - last.cached_tokens
            self._note(f"last prompt {last.prompt_tokens:,} tokens: {last.cached_tokens:,} cached, {new:,} read")
            self._note(f"last answer {len(last.tokens):,} tokens in {last.seconds:.2f} s, ended by {last.ended}")
            self._note(self._numbers())

    def _help(self, _: str) -> None:
        for name, (_command, text) in self._commands.items():
            self._note(f"{name:12} {text}")

    def _numbers(self) -> str:
        """Context used, bytes of the cache, seconds to the first token, tokens per second."""
        last = self.chat.last
        if last is None:
            return "stopped before any token was read."
        parts = [f"context {self._of_reach(self.chat.context_used)}", f"cache {self.chat.cache_bytes / 2**20:,.1f} MiB"]
        if not math.isnan(last.seconds_to_first_token):
            parts.append(f"first token {last.seconds_to_first_token:.2f} s")
        if last.tokens_per_second:
            parts.append(f"{last.tokens_per_second:,.1f} tokens/s")
        ends = {"cancel": "stopped", "length": "cut at --max-new-tokens", "context": "the context is full"}
        return " · ".join([*parts, ends[last.ended]] if last.ended in ends else parts)

    def _of_reach(self, tokens: int) -> str:
        return f"{tokens:,}" + (f" of {self.chat.context_length:,}" if self.chat.context_length else "")

    def _note(self, text: str) -> None:
        console.print(Text(text, style="dim"), soft_wrap=True)


class _PromptBar(ExitStack):
    """A bar while a long prompt is read, called as `Conversation.on_prefill`; used again for each prompt."""

    def __init__(self) -> None:
        super().__init__()
        self._advance: Callable[..., None] | None = None
        self._read = 0

    def __call__(self, read: int, total: int) -> None:
        """Called with the tokens that have been read, and with all that must be."""
        if read == 0 and total > _SMALL:
            self._advance, self._read = self.enter_context(bar("reading", total, "tokens")), 0
        if self._advance is not None:
            self._advance(read - self._read)
            self._read = read
        if read == total:
            self.close()
            self._advance = None


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Within this context Ctrl-C sets the event, and interrupts nothing."""
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
