"""The request bodies of the API: which fields are supported, which are ignored, and which are rejected.

OpenAI's API has many fields. An unsupported field that would change the answer is an error; it is never ignored.
"""

from __future__ import annotations

import inspect
import json
import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers import PreTrainedTokenizerBase

from zebra.data.chat_template import apply_chat_template
from zebra.generation import encode_messages
from zebra.serve.errors import ApiError

IGNORED = frozenset({
    "metadata", "moderation", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
})  # fmt: skip
"""Fields that are accepted and ignored, because they do not change the answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "access_programs": ([],),
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "include": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "text": ({"format": {"type": "text"}}, {}),
    "tool_choice": ("auto",),
    "truncation": ("disabled",),
}
"""Unsupported fields, each with the values that have no effect and are therefore accepted."""

_MAX_STOPS, _MAX_STOP, _MAX_TOP_LOGPROBS = 16, 1000, 20
Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP)]
_RENDERING = (PreTrainedTokenizerBase.apply_chat_template, apply_chat_template, encode_messages)
_OF_RENDERING = {name for function in _RENDERING for name in inspect.signature(function).parameters}


def _unicode(text: str) -> str:
    """Reject unpaired surrogates, which JSON can express and no tokenizer accepts."""
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("it has an unpaired surrogate, which is not a valid character")
    return text


def _variables(names: dict[str, Any]) -> dict[str, Any]:
    """Reject names that are parameters of the functions that render the template."""
    if reserved := sorted(_OF_RENDERING & names.keys()):
        raise ValueError(f"variables of the chat template cannot be named {', '.join(reserved)}, which the server uses")
    return names


Unicode = Annotated[str, AfterValidator(_unicode)]
TemplateVariables = Annotated[dict[str, Any], AfterValidator(_variables)]


def _json_object(text: Any, name: str) -> dict[str, Any]:
    """Parse a JSON object, which clients send as a string."""
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, as a string")
    return value


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`: whether a last chunk has the token counts."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Sampling(BaseModel):
    """The fields that all requests share. A field that is null counts as absent."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    PROMPT: ClassVar[str]
    """The field that holds the prompt."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Stop] = Field([], max_length=_MAX_STOPS)

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        fields = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
        served = set(cls.model_fields)
        fields = {n: value for n, value in fields.items() if n in served or value not in NEUTRAL.get(n, ())}
        return _with_generation_config(fields, served)

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    def decoding(self) -> dict[str, Any]:
        """The corresponding fields of `zebra.decoding.Decoding`.

        - Without a temperature decoding is greedy. With top_p, top_k or min_p, but no temperature, it is 1.
        - Without a seed, or with -1 (which clients of llama.cpp send), each answer gets a random seed.
        - A top_k of 0 or -1 filters nothing, as in llama.cpp and vLLM.
        """
        top_p, top_k = None if self.top_p == 1 else self.top_p, None if self.top_k in (0, -1) else self.top_k
        filters = {"top_p": top_p, "top_k": top_k, "min_p": self.min_p}
        filters = {name: value for name, value in filters.items() if value is not None}
        temperature = (1.0 if filters else 0.0) if self.temperature is None else self.temperature
        drawn = {"temperature": temperature} | (filters if temperature else {})
        seed = secrets.randbits(63) if self.seed in (None, -1) else self.seed % 2**64
        return {**drawn, "repetition_penalty": self.repetition_penalty, "seed": seed}


def _with_generation_config(fields: dict[str, Any], served: set[str]) -> dict[str, Any]:
    """Fill absent fields from `generation_config`, the JSON that `transformers chat` sends."""
    text = fields.pop("generation_config", None)
    if text is None:
        return fields
    config = {n: value for n, value in _json_object(text, "generation_config").items() if value is not None}
    draws = config.pop("do_sample", False)
    config.pop("transformers_version", None)
    if "max_new_tokens" in config:
        config["max_tokens" if "max_tokens" in served else "max_output_tokens"] = config.pop("max_new_tokens")
    config.setdefault("temperature", 1.0 if draws else 0.0)
    if not draws:
        config["temperature"] = 0.0
    return config | fields


class Message(BaseModel):
    """One message, whose content is a text or a list of text parts."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Unicode | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _only_text(self) -> Message:
        for part in self.content if isinstance(self.content, list) else ():
            kind, text = part.get("type"), part.get("text")
            if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
                raise ValueError(f"each part of a message must be text; got one of type {kind!r}")
            _unicode(text)
        for call in self.tool_calls or ():
            function = call.get("function")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise ValueError("a tool call must have a function with a name")
            function["arguments"] = _json_object(function.get("arguments") or "{}", "arguments")
        if self.content is None and not self.tool_calls:
            raise ValueError("a message must have content or tool_calls")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message for a chat template: its parts joined by line breaks, and the client's other fields."""
        role = "system" if self.role == "developer" else self.role
        parts = self.content if isinstance(self.content, list) else [{"text": self.content or ""}]
        message = self.model_dump(exclude_none=True, exclude=None if self.tool_calls else {"tool_calls"})
        return message | {"role": role, "content": "\n".join(part["text"] for part in parts)}


class ChatRequest(Sampling):
    """The body of `/v1/chat/completions`."""

    PROMPT = "messages"

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    return_progress: bool = False
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=_MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] = []
    chat_template_kwargs: TemplateVariables = {}

    def new_tokens(self) -> int | None:
        """The maximum number of new tokens; None if the client sets none."""
        return self.max_completion_tokens or self.max_tokens

    def scores(self) -> int | None:
        """Number of top tokens to list with each token's log-probability; None for no log-probabilities.

        Raises:
            ApiError: 400 for `top_logprobs` without `logprobs`.
        """
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs requires logprobs: true.", param="top_logprobs")
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Sampling):
    """The body of `/v1/completions`."""

    PROMPT = "prompt"

    prompt: Unicode | list[int]
    max_tokens: int | None = Field(None, ge=1)
    return_progress: bool = False
    logprobs: int | None = Field(None, ge=0, le=_MAX_TOP_LOGPROBS)

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, list) and any(not isinstance(token, int) or isinstance(token, bool) for token in prompt):
            raise ValueError("it must be one prompt per request: a string, or a list of token IDs")
        return prompt


class ResponsesRequest(Sampling):
    """The body of `/v1/responses`."""

    PROMPT = "input"

    input: Unicode | list[dict[str, Any]]
    instructions: Unicode | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] = []
    chat_template_kwargs: TemplateVariables = {}

    @field_validator("input", mode="before")
    @classmethod
    def _items(cls, items: Any) -> Any:
        if not isinstance(items, str | list):
            raise ValueError("it must be a string, or a list of messages, tool calls and their outputs")
        for at, item in enumerate(items if isinstance(items, list) else ()):
            if not isinstance(item, dict):
                raise ValueError(f"item {at} must be an object")
            if "role" in item:
                try:
                    Message.model_validate(item)
                except ValidationError as error:
                    first = error.errors()[0]
                    where = "".join(f".{part}" for part in first["loc"] if part in Message.model_fields)
                    raise ValueError(f"item {at}{where}: {first['msg'].removeprefix('Value error, ')}") from None
        return items

    @model_validator(mode="after")
    def _one_system_message(self) -> ResponsesRequest:
        if self.instructions and isinstance(self.input, list) and self.input and self.input[0].get("role") == "system":
            raise ValueError(
                "instructions cannot be combined with an input that begins with a system message; send one of them"
            )
        return self
