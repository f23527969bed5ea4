"""What `zebra serve` uses of transformers' serving parts, uvicorn and openai, none of which is a public API."""

from __future__ import annotations

import asyncio
import inspect
import json
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import STORIES
from transformers import AutoTokenizer

pytest.importorskip("openai", reason="the extra serve is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from transformers.cli.serving.chat_completion import TransformersCompletionCreateParamsStreaming
from transformers.cli.serving.completion import TransformersTextCompletionCreateParams
from transformers.cli.serving.response import (
    ResponseHandler,
    TransformersResponseCreateParamsStreaming,
    _ResponseStreamBuilder,
)
from transformers.cli.serving.utils import (
    BaseHandler,
    ReasoningText,
    ToolCall,
    build_response_parser,
    response_events_to_chunks,
)
from uvicorn.protocols.http.h11_impl import H11Protocol

from zebra.errors import ZebraError
from zebra.serve.answering import _Pieces
from zebra.serve.answers import ChatFormat, ResponsesFormat
from zebra.serve.engine import Engine
from zebra.serve.errors import ApiError
from zebra.serve.events import Finish, Piece
from zebra.serve.jobs import Prompts
from zebra.serve.metrics import Metrics
from zebra.serve.requests import IGNORED, NEUTRAL, ChatRequest, CompletionRequest, Message, ResponsesRequest, Sampling
from zebra.serve.stops import StopFilter
from zebra.streaming import Step

QWEN = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*<\|im_end\|>", "content": "text"},
    },
}
FINISH = Finish("stop", 7, 3, 5, 0.5, 1.0)


@pytest.mark.parametrize(
    ("params", "body"),
    [
        (TransformersCompletionCreateParamsStreaming, ChatRequest),
        (TransformersTextCompletionCreateParams, CompletionRequest),
        (TransformersResponseCreateParamsStreaming, ResponsesRequest),
    ],
)
def test_every_field_of_the_api_is_served_ignored_or_rejected(params: type, body: type[Sampling]) -> None:
    """A field that OpenAI adds is rejected until somebody has looked at it; this test lists those of today."""
    fields = set(params.__mutable_keys__)  # type: ignore[attr-defined]
    rejected = fields - set(body.model_fields) - IGNORED - set(NEUTRAL) - {"generation_config"}
    known = {
        *("audio", "function_call", "functions", "reasoning_effort", "verbosity", "web_search_options"),
        *("background_options", "context_management", "conversation", "image", "max_tool_calls"),
        *("previous_response_id", "prompt", "reasoning", "top_logprobs"),
    }
    assert rejected <= known


def test_a_message_reaches_the_template_whole() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain(role="developer", content=parts) == {"role": "system", "content": "a\nb"}
    assert plain(role="assistant", content="c", tool_calls=[], refusal=None) == {"role": "assistant", "content": "c"}
    call = {"id": "1", "function": {"name": "f", "arguments": '{"x": null}'}}
    message = {"role": "assistant", "content": "Let me look.", "reasoning_content": "hm", "tool_calls": [call]}
    read = {"id": "1", "function": {"name": "f", "arguments": {"x": None}}}
    assert plain(**message) == message | {"tool_calls": [read]}
    assert plain(role="tool", content="5", name="f") == {"role": "tool", "content": "5", "name": "f"}


def plain(**message: Any) -> dict[str, Any]:
    return Message.model_validate(message).for_template()


def test_an_input_of_responses_becomes_messages() -> None:
    body = {"input": "a", "instructions": "b"}
    expected = [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}]
    assert ResponseHandler._normalize_input(body) == expected
    tools = ResponseHandler._normalize_tools([{"type": "function", "name": "f", "parameters": {}}])
    assert tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_an_event_is_one_line_of_data() -> None:
    assert BaseHandler.chunk_to_sse("[DONE]") == "data: [DONE]\n\n"


def test_the_parser_finds_reasoning_calls_and_text() -> None:
    tokenizer = SimpleNamespace(response_template=QWEN, decode=lambda ids: "<|im_start|>assistant\n")
    parser = build_response_parser(tokenizer, None, [1, 2])
    events = [*parser.initial_events]
    text = '<think>hm</think>yes\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>'
    for character in text:
        events += parser.feed(character)
    chunks = response_events_to_chunks([*events, *parser.finalize()[1]])
    assert "".join(one for one in chunks if isinstance(one, ReasoningText)) == "hm"
    assert "".join(one for one in chunks if type(one) is str).strip() == "yes"
    assert [one for one in chunks if isinstance(one, ToolCall)] == [ToolCall("f", '{"x": 1}')]


def test_a_call_that_the_parser_cannot_read_stays_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.response_template = QWEN
    ids = tokenizer("<|im_start|>assistant\n").input_ids
    sent: list[Piece] = []
    job = SimpleNamespace(ids=ids, stop=(), parser=build_response_parser(tokenizer, None, ids))
    pieces = _Pieces(SimpleNamespace(job=job, send=sent.append), tokenizer)  # type: ignore[arg-type]
    text = "yes<tool_call>{no</tool_call> and on"
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        pieces.put(Step(token, tokenizer.convert_ids_to_tokens(token).replace("\u2581", " ")))
    pieces.end()
    assert "".join(piece.text for piece in sent).strip() == text


def test_events_of_a_response_come_in_order() -> None:
    pieces = [Piece(reasoning="hm"), Piece("yes"), Piece(tool=ToolCall("f", "{}"))]
    form = ResponsesFormat("m")
    stream = form.start() + "".join(form.piece(piece) for piece in pieces) + form.end(FINISH)
    events = [json.loads(line.removeprefix("data: ")) for line in stream.split("\n\n") if line]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "response.completed"
    response = events[-1]["response"]
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call"]
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == 3
    assert response["timings"]["predicted_n"] == 5
    whole = ResponsesFormat("m").whole(pieces, FINISH)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    assert callable(_ResponseStreamBuilder.error)
    (item,) = ResponsesFormat("m").whole([Piece("a\u2028b\x85c")], FINISH)["output"]
    assert item["content"][0]["text"] == "a\u2028b\x85c"


def test_a_chat_has_reasoning_and_calls_whole_and_streamed() -> None:
    pieces = [Piece(reasoning="hm"), Piece("yes"), Piece(tool=ToolCall("f", "{}")), Piece(tool=ToolCall("g", "{}"))]
    whole = ChatFormat("m", include_usage=True).whole(pieces, FINISH)["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["reasoning_content"] == "hm"
    assert [call["function"]["name"] for call in whole["message"]["tool_calls"]] == ["f", "g"]
    form = ChatFormat("m", include_usage=True)
    stream = "".join([form.start(), *map(form.piece, pieces), form.end(FINISH)])
    *chunks, last, done = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    assert done == "[DONE]"
    assert json.loads(last)["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert all(json.loads(chunk)["usage"] is None for chunk in chunks)
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
    deltas = [choice["delta"] for choice in choices]
    assert [call["index"] for delta in deltas for call in delta.get("tool_calls", ())] == [0, 1]


@pytest.mark.parametrize("top_k", [0, -1])
def test_a_top_k_that_filters_nothing_is_none(top_k: int) -> None:
    """As llama.cpp and vLLM take it."""
    assert CompletionRequest(prompt="x", top_k=top_k).decoding()["temperature"] == 0
    assert "top_k" not in CompletionRequest(prompt="x", top_k=top_k, temperature=1).decoding()
    assert CompletionRequest(prompt="x", top_k=5).decoding()["top_k"] == 5


def test_a_call_without_text_has_null_content() -> None:
    whole = ChatFormat("m", include_usage=True).whole([Piece(tool=ToolCall("f", "{}"))], FINISH)["choices"][0]
    assert whole["message"].keys() == {"role", "content", "tool_calls"}
    assert (whole["message"]["content"], whole["logprobs"]) == (None, None)
    assert ChatFormat("m", include_usage=True).whole([], FINISH)["choices"][0]["message"]["content"] == ""


def test_any_seed_is_taken_and_one_of_llama_cpps_clients_draws() -> None:
    def seed(number: int) -> int:
        return int(CompletionRequest(prompt="x", seed=number).decoding()["seed"])

    assert [seed(5), seed(-5), seed(-(2**63))] == [5, 2**64 - 5, 2**63]
    assert seed(-1) != seed(-1)


def test_an_error_of_the_template_names_the_model_and_not_its_folder() -> None:
    prompts = Prompts("m", None, AutoTokenizer.from_pretrained(STORIES), layout="full", max_tokens=1)
    with pytest.raises(ZebraError, match="tokenizer of m has no chat template"):
        prompts._templated([Message(role="user", content="x")], [], {})


class GaveUp(BaseException):
    """Like a panic of the tokenizers library, which is no Exception."""


GaveUp.__module__ = "pyo3_runtime"


def test_a_tokenizer_that_gives_up_ends_its_request_alone() -> None:
    def give_up(*_: Any) -> Any:
        raise GaveUp("stack overflow")

    async def ask() -> None:
        engine = Engine[str](lambda ticket: give_up() if ticket.job else FINISH, Metrics(), max_queue=9, max_seconds=20)
        with pytest.raises(ApiError, match="stack overflow"):
            [item async for item in engine.submit("x").items()]
        assert [item async for item in engine.submit("").items()] == [FINISH]
        prompts = Prompts("m", None, None, layout="full", max_tokens=1)
        with pytest.raises(ApiError, match="stack overflow"):
            await prompts._in_thread(give_up)

    asyncio.run(ask())


def test_uvicorn_has_what_the_clock_of_slow_clients_needs() -> None:
    for method in ("connection_made", "on_response_complete"):
        assert callable(getattr(H11Protocol, method))
    assert "self.cycle" in inspect.getsource(H11Protocol)


@pytest.mark.parametrize("pieces", [["abSTOPcd"], list("abSTOPcd"), ["abS", "TO", "Pcd"], ["a", "bST", "OPcd"]])
def test_a_stop_string_is_cut_however_it_comes(pieces: list[str]) -> None:
    stops = StopFilter(("STOP", "STILL"))
    assert "".join(map(stops.put, pieces)) == "ab"
    assert stops.stopped


def test_what_only_looked_like_a_stop_string_comes_later() -> None:
    stops = StopFilter(("STOP",))
    assert [stops.put("a ST"), stops.put("AND"), stops.put(" S"), stops.end()] == ["a ", "STAND", " ", "S"]
    assert not stops.stopped
