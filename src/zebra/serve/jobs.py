"""Convert request bodies to jobs: render the chat template, tokenize, and check the length against the context."""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import build_response_parser

from zebra.data.encoding import prompt_tokens
from zebra.decoding import Decoding
from zebra.errors import ZebraError, machine_fault
from zebra.generation import encode_messages
from zebra.model.context import context_length
from zebra.model.self_extend import self_extend_of
from zebra.serve.errors import ApiError
from zebra.serve.requests import ChatRequest, CompletionRequest, Message, ResponsesRequest, Sampling
from zebra.streaming import ContextLengthError, context_room


@dataclass(frozen=True)
class Job:
    """A prompt to answer, and how.

    Attributes:
        ids: token IDs of the prompt.
        stop: strings that end the answer and are not part of it.
        scores: number of top tokens to list with each token's log-probability; None for no log-probabilities.
        parser: transformers' parser of reasoning and tool calls; None if there is none for the model family.
        progress: whether to send the prefill progress to the client.
    """

    ids: list[int]
    decoding: Decoding
    stop: tuple[str, ...]
    scores: int | None = None
    parser: Any = None
    progress: bool = False


class Prompts:
    """Creates jobs for one model.

    Args:
        name: the model's name in the API.
        model: used for its config and family only, never run.
        tokenizer: only this object may use it, because tokenizers are not thread-safe.
        layout: the model's layout, as in results.
        max_tokens: limit of new tokens for requests that set none.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layout: str,
        max_tokens: int,
    ) -> None:
        self.name, self._model, self._tokenizer = name, model, tokenizer
        self._layout, self._max_tokens = layout, max_tokens
        self._lock = asyncio.Lock()

    def card(self) -> dict[str, Any]:
        """The model's entry in `/v1/models`: its layout, and its context length under vLLM's name `max_model_len`."""
        reach = context_length(self._model.config, self_extend_of(self._model))
        return {"id": self.name, "layout": self._layout, "max_model_len": reach}

    def check_model(self, name: str | None) -> None:
        """Check that a request names this model or none.

        Raises:
            ApiError: 404 for another name.
        """
        if name not in (None, self.name):
            raise ApiError(
                404,
                f"this server has only the model {self.name!r}; the request names {name!r}.",
                code="model_not_found",
                param="model",
            )

    async def chat(self, body: ChatRequest) -> Job:
        """Create the job of a `/v1/chat/completions` request."""
        self.check_model(body.model)
        scores = body.scores()
        ids, parser = await self._in_thread(self._templated, body.messages, body.tools, body.chat_template_kwargs)
        return self._job(ids, body, body.new_tokens(), scores=scores, parser=parser, progress=body.return_progress)

    async def completion(self, body: CompletionRequest) -> Job:
        """Create the job of a `/v1/completions` request."""
        self.check_model(body.model)
        prompt = body.prompt
        if isinstance(prompt, list):
            size = len(self._tokenizer)
            if any(not 0 <= token < size for token in prompt):
                raise ApiError(400, f"the token IDs of the prompt must be from 0 to {size - 1}.", param="prompt")
            ids = prompt
        else:
            ids = await self._in_thread(prompt_tokens, self._tokenizer, prompt)
        return self._job(ids, body, body.max_tokens, scores=body.logprobs, progress=body.return_progress)

    async def responses(self, body: ResponsesRequest) -> Job:
        """Create the job of a `/v1/responses` request."""
        self.check_model(body.model)
        try:
            items = ResponseHandler._normalize_input(body.model_dump(exclude_none=True))
            tools = ResponseHandler._normalize_tools(body.tools) or []
            messages = [Message.model_validate(item) for item in items]
        except HTTPException as error:
            raise ApiError(400, f"input: {error.detail}.", param="input") from None
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            text = f"an item is neither a message nor a tool call nor the output of one ({type(error).__name__})"
            raise ApiError(400, f"input: {text}. Give messages with a role and content.", param="input") from None
        ids, parser = await self._in_thread(self._templated, messages, tools, body.chat_template_kwargs)
        return self._job(ids, body, body.max_output_tokens, parser=parser)

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        """Run a function without blocking the event loop: tokenizing a long document takes seconds."""
        async with self._lock:
            try:
                return await asyncio.to_thread(function, *arguments)
            except ZebraError as error:
                raise ApiError(400, str(error)) from None
            except BaseException as error:  # a panic in a tokenizer is no Exception
                if isinstance(error, Exception) or (fault := machine_fault(error)) is None:
                    raise
                raise ApiError(400, fault) from None

    def _templated(self, messages: list[Message], tools: list[Any], kwargs: dict[str, Any]) -> tuple[list[int], Any]:
        """The token IDs of a conversation, and the parser of its answer."""
        inputs = [message.for_template() for message in messages]

        def encoded(**options: Any) -> list[int]:
            remedy = "Send messages that it supports, or a whole prompt to /v1/completions."
            ids = encode_messages(inputs, self._tokenizer, remedy=remedy, source=self.name, **options, **kwargs)
            return list(ids.tolist())

        ids = encoded(tools=tools or None)
        if tools and ids == encoded():
            raise ApiError(
                400, f"the chat template of {self.name!r} does not support tools. Leave them out.", param="tools"
            )
        return ids, self._parser(ids, tools)

    def _parser(self, ids: list[int], tools: list[Any]) -> Any:
        # transformers 5.17 has no such parameter; it returns all arguments in XML as strings, untyped.
        takes_tools = "tools" in inspect.signature(build_response_parser).parameters
        options = {"tools": tools} if tools and takes_tools else {}
        return build_response_parser(self._tokenizer, self._model, ids, **options)

    def _job(self, ids: list[int], body: Sampling, new_tokens: int | None, **more: Any) -> Job:
        if not ids:
            raise ApiError(400, "the prompt has no tokens. Send at least one character.", param="prompt")
        try:
            context_room(self._model, len(ids))
        except ContextLengthError as error:
            raise ApiError(400, str(error), code="context_length_exceeded", param=body.PROMPT) from None
        try:
            decoding = Decoding(max_new_tokens=new_tokens or self._max_tokens, **body.decoding())
        except ZebraError as error:
            raise ApiError(400, str(error)) from None
        return Job(ids, decoding, tuple(body.stop), **more)
