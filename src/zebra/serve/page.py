"""The chat page: gradio's chat as a client of this server's HTTP API.

Documents and answers are shown as plain text, without Markdown or HTML. Nothing is loaded from other sites.
"""

from __future__ import annotations

import asyncio
import html
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio
import openai
from fastapi.responses import RedirectResponse

from zebra.data.documents import document_text
from zebra.errors import ZebraError
from zebra.serve.settings import ServeSettings

_KINDS = [".txt", ".md", ".pdf", "text"]
_CSS = """
footer { display: none !important; }
.zebra-facts { font-size: 0.85rem; }
.zebra-facts b { font-weight: 600; }
.zebra-facts[role=alert] { color: #b00020; }
.dark .zebra-facts[role=alert] { color: #ff8a80; }
.zebra-stripes { font-family: ui-monospace, monospace; letter-spacing: 0.05em; overflow-wrap: anywhere; }
.message .md { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 600px) { .gradio-container main { padding: 8px !important; } }
"""
_HINT = "Ask a question. Attach a document with the clip, or paste it."
Messages = list[dict[str, str]]


def add_page(
    app: Any, path: str, *, address: Callable[[], str], card: dict[str, Any], layers: str, settings: ServeSettings
) -> Any:
    """Mount the chat page on an application, and redirect `/` to it.

    Args:
        address: returns this server's URL, which is known once it listens.
        card: the model's entry in `/v1/models`.
        layers: one letter per layer: G global, L local.
    """
    page = _Page(address, card, settings.api_key)
    app.add_api_route("/", lambda: RedirectResponse(f"{path}/"), include_in_schema=False)
    return gradio.mount_gradio_app(
        app,
        _blocks(page, card, layers),
        path,
        footer_links=[],
        run_history=False,
        max_file_size=settings.max_body,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
    )


def _blocks(page: _Page, card: dict[str, Any], layers: str) -> Any:
    """The components of the page and their events."""
    with gradio.Blocks(analytics_enabled=False, title=f"zebra: {card['id']}", fill_height=True) as blocks:
        messages = gradio.State([])
        gradio.HTML(_facts(card, layers))
        chat = gradio.Chatbot(
            label=card["id"],
            show_label=False,
            render_markdown=False,
            feedback_options=None,
            buttons=[],
            scale=1,
            min_height=240,
            placeholder="No messages yet",
        )
        box = gradio.MultimodalTextbox(
            label="Message",
            placeholder="Message, or a long text to paste",
            show_label=False,
            file_types=_KINDS,
            file_count="multiple",
            sources=["upload"],
            max_plain_text_length=4000,
            max_lines=6,
            autofocus=True,
        )
        status = gradio.HTML(_status(_HINT))
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        asking = box.submit(page.answer, [box, chat, messages], [box, chat, messages, status], **private)
        stopping = box.stop(None, None, None, cancels=[asking], **private)
        stopping.then(page.stopped, None, [box, status], **private)  # runs after the last piece
        chat.clear(lambda: ([], _status(_HINT)), None, [messages, status], **private)
    return blocks


class _Page:
    """The event handlers of the chat."""

    def __init__(self, address: Callable[[], str], card: dict[str, Any], api_key: str | None) -> None:
        self._address, self._card, self._key = address, card, api_key

    def stopped(self) -> tuple[Any, str]:
        """Make the box ready for the next message."""
        return _ready(), _status("Stopped")

    async def answer(
        self, message: dict[str, Any], shown: list[Any], messages: Messages
    ) -> AsyncIterator[tuple[Any, list[Any], Messages, str]]:
        """With each piece, yield the box, the messages to show, the messages for the API, and the status line."""
        text, files = message["text"], [Path(file) for file in message["files"]]
        if not text.strip() and not files:
            yield _ready(), shown, messages, _status(_HINT)
            return
        try:
            documents = [await asyncio.to_thread(document_text, file) for file in files]
        except ZebraError as error:
            name = str(error).replace(f"{files[0].parent}{os.sep}", "")
            yield _ready(text, files), shown, messages, _status(name, "alert")
            return
        titles = [f"{file.name}, {len(one):,} characters" for file, one in zip(files, documents, strict=True)]
        texts = [text] if text else []
        question = {"role": "user", "content": "\n\n".join([*documents, *texts])}
        before, shown = shown, [*shown, *(_entry("user", line) for line in [*titles, *texts])]
        busy = gradio.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
        yield busy, shown, messages, _status("Reading")
        try:
            async for piece, line in self._pieces([*messages, question]):
                if not piece:
                    yield gradio.skip(), gradio.skip(), gradio.skip(), _status(line)
                    continue
                so_far = [*messages, question, {"role": "assistant", "content": piece}]
                yield gradio.skip(), [*shown, _entry("assistant", piece)], so_far, _status(line)
        except openai.APIError as error:
            body = error.body if isinstance(error.body, dict) else {}
            yield _ready(text, files), before, messages, _status(str(body.get("message", error)), "alert")
        else:
            yield _ready(), gradio.skip(), gradio.skip(), gradio.skip()

    async def _pieces(self, messages: Messages) -> AsyncIterator[tuple[str, str]]:
        """Yield the answer so far and a status line."""
        text, usage, timings = "", None, None
        base = f"{self._address()}/v1"
        async with (
            openai.AsyncOpenAI(base_url=base, api_key=self._key or "none", max_retries=0, timeout=None) as client,
            await client.chat.completions.create(
                model=self._card["id"],
                messages=messages,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"return_progress": True},
            ) as stream,
        ):
            async for chunk in stream:
                usage, timings = chunk.usage or usage, getattr(chunk, "timings", timings)
                if (progress := getattr(chunk, "prompt_progress", None)) is not None:
                    yield text, f"Reading {progress['processed']:,} of {progress['total']:,} tokens"
                if chunk.choices and (piece := chunk.choices[0].delta.content):
                    text += piece
                    yield text, "Answering"
        if usage is not None and timings is not None:
            yield text, _numbers(usage, timings, self._card["max_model_len"])


def _ready(text: str = "", files: Sequence[Path] = ()) -> Any:
    value = {"text": text, "files": [str(file) for file in files]}
    return gradio.MultimodalTextbox(value=value, submit_btn=True, stop_btn=False)


def _entry(role: str, text: str) -> dict[str, str]:
    """A message to show, with HTML escaped: gradio would render it."""
    return {"role": role, "content": html.escape(text, quote=False)}


def _facts(card: dict[str, Any], layers: str) -> str:
    reach = f", reaches {card['max_model_len']:,} tokens" if card["max_model_len"] else ""
    return (
        f'<div class="zebra-facts"><b>{html.escape(card["id"])}</b> {html.escape(card["layout"])}{reach}<br>'
        f'<span class="zebra-stripes" title="G: a global layer, L: a local one">{html.escape(layers)}</span></div>'
    )


def _status(text: str, role: str = "status") -> str:
    return f'<div class="zebra-facts" role="{role}">{html.escape(text)}</div>'


def _numbers(usage: Any, timings: dict[str, Any], reach: int | None) -> str:
    total, cached = usage.total_tokens, usage.prompt_tokens_details.cached_tokens
    of = f" of {reach:,} ({total / reach:.0%})" if reach else ""
    rate = timings["predicted_per_second"]
    parts = [
        f"context {total:,}{of} tokens",
        f"{cached:,} of {usage.prompt_tokens:,} tokens of the prompt cached",
        f"first token after {timings['prompt_ms'] / 1000:.2f} s",
        *([f"{rate:.1f} tokens/s"] if rate else []),
    ]
    return " · ".join(parts)
