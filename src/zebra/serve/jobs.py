"""Bodies to jobs of the engine: the conversation in the model's template, as tokens, within the model's reach."""

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
from zebra.model.context import longest_text
from zebra.model.self_extend import self_extend_of
from zebra.serve.errors import ApiError
from zebra.serve.requests import ChatRequest, CompletionRequest, Message, ResponsesRequest, Sampling
from zebra.streaming import ContextLengthError, context_room


@dataclass(frozen=True)
class Job:
    """What the engine answers.

    Attributes:
        ids: tokens of the prompt.
        stop: strings that end the answer and are left out of it.
        scores: likeliest tokens that are listed beside each token with their log-probabilities; None for no scores.
        parser: finds reasoning and calls of tools in the text, where the model's family has a grammar for them.
        progress: whether the client is told how far the prompt is read.
    """

    ids: list[int]
    decoding: Decoding
    stop: tuple[str, ...]
    scores: int | None = None
    parser: Any = None
    progress: bool = False


class Prompts:
    """Makes jobs for one model.

    Args:
        name: of the model in the API.
        model: read for its family and its reach.
        tokenizer: used by this object alone: a tokenizer cannot serve two threads at once.
        layout: of its layers, as results name it.
        max_tokens: tokens of an answer whose request names no number.
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
        """The model as `/v1/models` lists it: its layout, and its reach by vLLM's name for it."""
        reach = longest_text(self._model.config, self_extend_of(self._model))
        return {"id": self.name, "layout": self._layout, "max_model_len": reach}

    def check_model(self, name: str | None) -> None:
        """Reject another model.

        Raises:
            ApiError: 404.
        """
        if name not in (None, self.name):
            raise ApiError(
                404,
                f"this server has the model {self.name!r} alone; the request names {name!r}.",
                code="model_not_found",
                param="model",
            )

    async def chat(self, body: ChatRequest) -> Job:
        """A job of `/v1/chat/completions`."""
        self.check_model(body.model)
        scores = body.scores()
        ids, parser = await self._in_thread(self._templated, body.messages, body.tools, body.chat_template_kwargs)
        return self._job(ids, body, body.new_tokens(), scores=scores, parser=parser, progress=body.return_progress)

    async def completion(self, body: CompletionRequest) -> Job:
        """A job of `/v1/completions`."""
        self.check_model(body.model)
        prompt = body.prompt
        if isinstance(prompt, list):
            size = len(self._tokenizer)
            if any(not 0 <= token < size for token in prompt):
                raise ApiError(400, f"a token of the prompt is from 0 to {size - 1}.", param="prompt")
            ids = prompt
        else:
            ids = await self._in_thread(prompt_tokens, self._tokenizer, prompt)
        return self._job(ids, body, body.max_tokens, scores=body.logprobs, progress=body.return_progress)

    async def responses(self, body: ResponsesRequest) -> Job:
        """A job of `/v1/responses`."""
        self.check_model(body.model)
        try:
            items = ResponseHandler._normalize_input(body.model_dump(exclude_none=True))
            tools = ResponseHandler._normalize_tools(body.tools) or []
            messages = [Message.model_validate(item) for item in items]
        except HTTPException as error:
            raise ApiError(400, f"input: {error.detail}.", param="input") from None
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            text = f"an item of it is neither a text nor a call nor the output of one ({type(error).__name__})"
            raise ApiError(400, f"input: {text}. Give messages with a role and content.", param="input") from None
        ids, parser = await self._in_thread(self._templated, messages, tools, body.chat_template_kwargs)
        return self._job(ids, body, body.max_output_tokens, parser=parser)

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        """Tokens of a long document take seconds, in which the event loop goes on."""
        async with self._lock:
            try:
                return await asyncio.to_thread(function, *arguments)
            except ZebraError as error:
                raise ApiError(400, str(error)) from None
            except BaseException as error:  # a tokenizer that gives up on a text raises no Exception
                if isinstance(error, Exception) or (fault := machine_fault(error)) is None:
                    raise
                raise ApiError(400, fault) from None

    def _templated(self, messages: list[Message], tools: list[Any], kwargs: dict[str, Any]) -> tuple[list[int], Any]:
        """The tokens of a conversation, and the parser of its answer."""
        inputs = [message.for_template() for message in messages]

        def encoded(**options: Any) -> list[int]:
            remedy = "Send messages that it takes, or a whole prompt to /v1/completions."
            ids = encode_messages(inputs, self._tokenizer, remedy=remedy, source=self.name, **options, **kwargs)
            return list(ids.tolist())

        ids = encoded(tools=tools or None)
        if tools and ids == encoded():
            raise ApiError(
                400, f"the chat template of {self.name!r} has no place for tools. Leave them out.", param="tools"
            )
        return ids, self._parser(ids, tools)

    def _parser(self, ids: list[int], tools: list[Any]) -> Any:
        # Transformers 5.17 has no tools here: arguments in XML are texts there, and typed by the tools' schemas later.
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
