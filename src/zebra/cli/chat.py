"""The command `chat`: a conversation in the terminal, or line by line from stdin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from zebra.cli import options, show
from zebra.data.documents import document_text
from zebra.files import make_folder, user_cache_dir
from zebra.model.checkpoint_files import check_checkpoint


def chat(
    checkpoint: options.Checkpoint,
    file: Annotated[
        list[Path] | None, typer.Option(help="Document to talk about: text, Markdown or PDF; repeatable.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="INT", help="Maximum tokens of an answer.")] = 1024,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: options.Stop = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(min=1, metavar="INT", help="Tokens per prefill chunk. Default: 1,024."),
    ] = None,
    seed: options.Seed = 0,
    stripes: options.StripesNotation = None,
    rope: options.RopeNotation = None,
    self_extend: options.SelfExtendNotation = None,
    window: options.Window = None,
    full_decode: options.FullDecode = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Chat with a checkpoint in its chat template. If stdin is not a terminal, each of its lines is a message."""
    arguments = options.call_arguments(locals(), "checkpoint", "file", "system")
    check_checkpoint(checkpoint)
    texts = [(path.name, document_text(path)) for path in file or []]
    with show.working():
        from zebra.cli.chat_session import ChatSession
        from zebra.conversation import Conversation

        is_terminal = sys.stdin.isatty()
        session = ChatSession(Conversation(checkpoint, **arguments), is_terminal=is_terminal)
        session.chat.system = system
        for name, text in texts:
            session.add_document(name, text)
        session.run(_messages(_prompt()) if is_terminal else _lines())


def _lines() -> Iterator[str]:
    """The lines of stdin that are not blank."""
    for raw in sys.stdin.buffer:
        if line := raw.decode("utf-8", errors="replace").strip():
            yield line


def _messages(prompt: Callable[[], str]) -> Iterator[str]:
    """Messages from the terminal until Ctrl-D; Ctrl-C drops the one that is being written."""
    while True:
        try:
            if message := prompt().strip():
                yield message
        except EOFError:
            return
        except KeyboardInterrupt:
            show.note("/exit or Ctrl-D leaves, /help lists the commands.")


def _prompt() -> Callable[[], str]:
    """Reads a message of one or several lines; by prompt_toolkit, and without it by Python's own `input`."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError:
        return _plain_prompt

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: object) -> None:
        event.current_buffer.insert_text("\n")  # type: ignore[attr-defined]

    @keys.add("enter")
    def _(event: object) -> None:
        event.current_buffer.validate_and_handle()  # type: ignore[attr-defined]

    history = user_cache_dir("chat") / "history"
    make_folder(history.parent)
    history.touch(mode=0o600)
    session: PromptSession[str] = PromptSession("> ", history=FileHistory(history), key_bindings=keys, multiline=True)
    return session.prompt


def _plain_prompt() -> str:
    """A line that ends in a backslash goes on in the next."""
    import readline  # noqa: F401  # lines can be edited and come back by the arrow keys

    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("  "))
    return "\n".join(lines)
