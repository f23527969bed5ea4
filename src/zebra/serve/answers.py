"""Format answers for the API: as one JSON object, or as a stream of server-sent events.

The types are those of the openai package. The events of `/v1/responses` are built by transformers' own server code.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol
from uuid import uuid4

from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.responses import ResponseIncompleteEvent
from transformers.cli.serving.response import _ResponseStreamBuilder, compute_usage
from transformers.cli.serving.utils import BaseHandler

from zebra.serve.errors import ApiError
from zebra.serve.events import Finish, Piece, TokenLogprob

event = BaseHandler.chunk_to_sse
"""Format a JSON string or a pydantic model as one server-sent event."""
DONE = event("[DONE]")


class AnswerFormat(Protocol):
    """How one endpoint formats an answer."""

    def start(self) -> str:
        """The events before the first token."""

    def piece(self, piece: Piece) -> str:
        """The events of one piece."""

    def end(self, finish: Finish) -> str:
        """The events after the last token."""

    def error(self, error: ApiError) -> str:
        """The events of an error that occurs during the stream."""

    def whole(self, pieces: Sequence[Piece], finish: Finish) -> dict[str, Any]:
        """The answer as one object."""


class _Chunks:
    """The common part of chat and completion streams.

    Chunks are plain dicts: the types of openai would drop or reject a `finish_reason` of null.
    """

    _object: ClassVar[str]

    def __init__(self, kind: str, model: str, include_usage: bool) -> None:
        self._head = {"id": f"{kind}-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._include_usage = include_usage

    def error(self, error: ApiError) -> str:
        """The error in the form that OpenAI's clients expect."""
        return event(json.dumps(error.body()))

    def _last(self, choice: dict[str, Any], finish: Finish) -> str:
        """The last events: a choice with the timings, then the usage if the client requested it."""
        timings = finish.timings()
        parts = [self._chunk([choice], timings=timings)]
        if self._include_usage:
            parts.append(self._chunk([], usage=_usage(finish), timings=timings))
        return "".join([*parts, DONE])

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        choices = [{"index": 0, "finish_reason": None, "logprobs": None, **choice} for choice in choices]
        usage = {"usage": None} if self._include_usage else {}  # null in all chunks but the last, as OpenAI specifies
        return event(json.dumps({**self._head, "object": self._object, "choices": choices, **usage, **more}))


class ChatFormat(_Chunks):
    """Answers of `/v1/chat/completions`."""

    _object = "chat.completion.chunk"

    def __init__(self, model: str, *, include_usage: bool) -> None:
        super().__init__("chatcmpl", model, include_usage)
        self._calls = 0

    def start(self) -> str:
        """A chunk with the role, before the first token."""
        return self._chunk([{"delta": {"role": "assistant", "content": ""}}])

    def piece(self, piece: Piece) -> str:
        """A chunk with text, reasoning, a tool call or the prefill progress."""
        delta: dict[str, Any] = {}
        if piece.text:
            delta["content"] = piece.text
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.tool is not None:
            delta["tool_calls"] = [{"index": self._calls, **self._call(piece, self._calls)}]
            self._calls += 1
        return self._chunk([{"delta": delta, "logprobs": _chat_logprobs(piece.tokens)}], **_progress(piece))

    def end(self, finish: Finish) -> str:
        """The finish reason (`tool_calls` if there are any), the timings, and the usage if the client requested it."""
        return self._last({"delta": {}, "finish_reason": "tool_calls" if self._calls else finish.reason}, finish)

    def whole(self, pieces: Sequence[Piece], finish: Finish) -> dict[str, Any]:
        """The answer as a `ChatCompletion`."""
        tools = [piece for piece in pieces if piece.tool is not None]
        calls = [self._call(piece, number) for number, piece in enumerate(tools)]
        text, reasoning = ("".join(getattr(piece, name) for piece in pieces) for name in ("text", "reasoning"))
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
        message |= {"reasoning_content": reasoning} if reasoning else {}
        message |= {"tool_calls": calls} if calls else {}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": "tool_calls" if calls else finish.reason,
            "logprobs": _chat_logprobs([token for piece in pieces for token in piece.tokens]),
        }
        body = {"object": "chat.completion", "choices": [choice], "usage": _usage(finish), "timings": finish.timings()}
        return ChatCompletion.model_validate(self._head | body).model_dump(exclude_unset=True)

    def _call(self, piece: Piece, number: int) -> dict[str, Any]:
        assert piece.tool is not None
        function = {"name": piece.tool.name, "arguments": piece.tool.arguments}
        return {"id": f"call_{self._head['id']}_{number}", "type": "function", "function": function}


class CompletionFormat(_Chunks):
    """Answers of `/v1/completions`."""

    _object = "text_completion"

    def __init__(self, model: str, *, include_usage: bool) -> None:
        super().__init__("cmpl", model, include_usage)
        self._offset = 0

    def start(self) -> str:
        """No event."""
        return ""

    def piece(self, piece: Piece) -> str:
        """A chunk with text or the prefill progress."""
        return self._chunk([self._choice([piece])], **_progress(piece))

    def end(self, finish: Finish) -> str:
        """The finish reason, the timings, and the usage if the client requested it."""
        return self._last({"text": "", "finish_reason": finish.reason}, finish)

    def whole(self, pieces: Sequence[Piece], finish: Finish) -> dict[str, Any]:
        """The answer as a `Completion`."""
        choice = self._choice(pieces) | {"index": 0, "finish_reason": finish.reason}
        body = {"object": "text_completion", "choices": [choice], "usage": _usage(finish), "timings": finish.timings()}
        return Completion.model_validate(self._head | body).model_dump(exclude_unset=True)

    def _choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = [token for piece in pieces for token in piece.tokens]
        text = "".join(piece.text for piece in pieces)
        if not tokens:
            return {"text": text, "logprobs": None}
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        logprobs = {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{one.text: one.logprob for one in token.top} for token in tokens],
            "text_offset": offsets,
        }
        return {"text": text, "logprobs": logprobs}


class _ResponseEvents(_ResponseStreamBuilder):
    """transformers' event builder, extended by answers that stop at the token limit."""

    def ended(self, finish: Finish) -> list[str]:
        """The last event: `response.completed`, or `response.incomplete` if the token limit was reached."""
        usage = compute_usage(finish.prompt_tokens, finish.new_tokens)
        usage.input_tokens_details.cached_tokens = finish.cached_tokens
        self._response_defaults |= {"timings": finish.timings()}
        if finish.reason != "length":
            return self.completed(usage)
        items = [item for item in (self.reasoning_item, self.message_item, *self.tool_calls) if item is not None]
        response = self._response(
            "incomplete", output=items, usage=usage, incomplete_details={"reason": "max_output_tokens"}
        )
        last = ResponseIncompleteEvent(type="response.incomplete", sequence_number=self.seq, response=response)
        return [self._emit(last)]


class ResponsesFormat:
    """Answers of `/v1/responses`."""

    def __init__(self, model: str) -> None:
        request = uuid4().hex
        defaults = {
            "id": f"resp_{request}",
            "created_at": time.time(),
            "model": model,
            "object": "response",
            "tools": [],
            "parallel_tool_calls": False,
            "tool_choice": "auto",
        }
        self._events, self._request = _ResponseEvents(request_id=request, response_defaults=defaults), request

    def start(self) -> str:
        """The events that open the response."""
        return "".join(self._events.start_response())

    def piece(self, piece: Piece) -> str:
        """The events of text, reasoning or a tool call, which open and close output items as needed."""
        events, parts = self._events, list[str]()
        if piece.reasoning:
            parts += [] if events.reasoning_open else events.start_reasoning()
            parts += events.reasoning_delta(piece.reasoning)
        if (piece.text or piece.tool) and events.reasoning_open:
            parts += events.finish_reasoning()
        if piece.text:
            parts += [] if events.message_open else events.start_message()
            parts += events.text_delta(piece.text)
        if piece.tool is not None:
            parts += events.finish_message() if events.message_open else []
            name = f"call_{self._request}_{len(events.tool_calls)}"
            parts += events.tool_call(name, piece.tool.name, piece.tool.arguments)
        return "".join(parts)

    def end(self, finish: Finish) -> str:
        """Close the open items, then send the complete response."""
        events = self._events
        parts = events.finish_reasoning() if events.reasoning_open else []
        if not events.message_open and events.message_item is None:
            parts += events.start_message()
        parts += events.finish_message() if events.message_open else []
        return "".join(parts + events.ended(finish))

    def error(self, error: ApiError) -> str:
        """The event of a failed response."""
        return "".join(self._events.error(error.message))

    def whole(self, pieces: Sequence[Piece], finish: Finish) -> dict[str, Any]:
        """The answer as a `Response`, taken from the last event of the stream."""
        for piece in pieces:
            self.piece(piece)
        last = self.end(finish).strip().split("\n")[-1]  # not splitlines: the text may contain other line breaks
        whole: dict[str, Any] = json.loads(last.removeprefix("data: "))["response"]
        return whole


def _progress(piece: Piece) -> dict[str, Any]:
    return {} if piece.progress is None else {"prompt_progress": piece.progress.fields()}


def _usage(finish: Finish) -> dict[str, Any]:
    return {
        "prompt_tokens": finish.prompt_tokens,
        "completion_tokens": finish.new_tokens,
        "total_tokens": finish.prompt_tokens + finish.new_tokens,
        "prompt_tokens_details": {"cached_tokens": finish.cached_tokens},
    }


def _chat_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any] | None:
    content = [_scored(token) | {"top_logprobs": [_scored(one) for one in token.top]} for token in tokens]
    return {"content": content} if content else None


def _scored(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": None if token.bytes is None else list(token.bytes)}
