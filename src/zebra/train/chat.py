"""Chat templates for training: the tokens of a conversation, and which of them are the assistant's.

    <s>User:\\nWho ran?\\n\\nAssistant:\\nThe dog.</s>\\n
                                   ^^^^^^^^^^^^^       trained: the answer and the token that ends it

The {% generation %} marks of a template, or of trl's copy of it, tell which tokens are an answer's. Without marks, an
answer is what the conversation up to and including it has beyond the prompt before it. A template that renders a prompt
differently once it is answered is an error.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from zebra.data.chat_template import apply_chat_template, rendering
from zebra.data.conversations import GAP, Conversation, Message, TokenizedConversation, without_middle
from zebra.data.encoding import token_spans
from zebra.errors import ZebraError

_REMEDY = "Fix or remove the conversation, or set chat_template to another template."
_MARK = r"\{%-?\s*(?:end)?generation\s*-?%\}"

NAMED = {name: Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8") for name in ("plain", "chatml")}
"""Templates for checkpoints without one: `plain` needs an end-of-text token, `chatml` <|im_start|> and <|im_end|>."""


class Chat:
    """A tokenizer and its chat template.

    Attributes:
        template: the template that a tuned checkpoint gets; `plain` and `chatml` without marks.
        stop: the special token that ends an answer; None where the template writes none.

    Raises:
        ZebraError: no template, and none named; a name that is neither known nor a file; tokens that the named template
            needs and the tokenizer lacks; a template in which answers cannot be located; trl is not installed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, named: str | None, source: str):
        self.tokenizer = tokenizer
        self._source = source
        template: Any = tokenizer.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        if named is None and not template:
            raise ZebraError(
                f"the tokenizer of {source} has no chat template. Set chat_template to "
                f"{', '.join(NAMED)} or the path of a .jinja file."
            )
        if named is not None:
            template = _named(named, tokenizer, source)
        self._marked = None
        if tokenizer.is_fast:  # only fast tokenizers know the characters of each token
            self._marked = template if re.search(_MARK, template) else _marked_by_trl(tokenizer, template, source)
        self.template = re.sub(_MARK, "", template) if named in NAMED else template
        self._template = template
        probe = Conversation((Message("user", "a"), Message("assistant", "b")), "a question and its answer")
        answer = [token for token, is_answer in zip(*self.encode(probe), strict=True) if is_answer]
        while answer and not tokenizer.decode([answer[-1]]).strip():
            answer.pop()
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        self.stop = answer[-1] if answer and answer[-1] in special else None

    def encode(self, conversation: Conversation) -> TokenizedConversation:
        """Tokenise a conversation, and mark the tokens of the assistant.

        Raises:
            ZebraError: a message that the template rejects, such as a system message; answers that cannot be told
                apart; tools that the template does not write.
        """
        where = conversation.where
        if self._marked:
            encoding = self._render(conversation, chat_template=self._marked, return_assistant_tokens_mask=True)
            mask = [bool(one) for one in encoding["assistant_masks"]]
            tokens = TokenizedConversation(list(encoding["input_ids"]), mask)
        else:
            tokens = self._by_prefixes(conversation)
        if names := conversation.tool_names:
            text = self._render(conversation, chat_template=self._template, tokenize=False)
            if absent := sorted(name for name in names if name not in text):
                raise ZebraError(
                    f"{where}: the chat template of {self._source} does not render the tools {', '.join(absent)}. "
                    "Set chat_template to one that supports tools, or remove the conversation."
                )
        spans = sum(answer for answer, _ in itertools.groupby(tokens.assistant_mask))
        answers = sum(message.role == "assistant" for message in conversation.messages)
        if spans != answers:
            raise ZebraError(
                f"{where}: the chat template of {self._source} marks {spans} separate answers instead of {answers}. "
                "Set chat_template to another template, or remove the conversation."
            )
        return tokens

    def fitted(self, conversation: Conversation, length: int) -> tuple[TokenizedConversation, int]:
        """The conversation in at most `length` tokens, and the number of tokens cut from the middle of its document.

        Raises:
            ZebraError: it is too long, and has no document to cut or is too long even without it.
        """
        if (shortened := self.shortened(conversation, length)) is not None:
            return shortened
        tokens = len(self.encode(conversation).input_ids)
        why = "has no document to cut" if conversation.document is None else "does not fit without its document either"
        raise ZebraError(
            f"{conversation.where} is too long: it has {tokens:,} tokens, train.length is {length:,}, and it {why}. "
            "Raise train.length, shorten it, or set data.too_long to drop."
        )

    def shortened(self, conversation: Conversation, length: int) -> tuple[TokenizedConversation, int] | None:
        """Like `fitted`, but None where no cut makes the conversation short enough."""
        tokens, document = self.encode(conversation), conversation.document
        over = len(tokens.input_ids) - length
        if over <= 0:
            return tokens, 0
        if document is None:
            return None
        spans = token_spans(self.tokenizer, document)
        keep = len(spans) - over - len(self.tokenizer(GAP, add_special_tokens=False)["input_ids"])
        while keep >= 2:
            tokens = self.encode(conversation.with_document(without_middle(document, spans, keep)))
            if len(tokens.input_ids) <= length:
                return tokens, len(spans) - keep
            keep -= len(tokens.input_ids) - length
        return None

    def _by_prefixes(self, conversation: Conversation) -> TokenizedConversation:
        ids = self._ids(conversation)
        answers = [False] * len(ids)
        for i, message in enumerate(conversation.messages):
            if message.role == "assistant":
                prompt, through = self._ids(conversation, i, prompt=True), self._ids(conversation, i + 1)
                if through[: len(prompt)] != prompt or ids[: len(through)] != through:
                    raise ZebraError(
                        f"{conversation.where}: the chat template of {self._source} has no {{% generation %}} marks, "
                        "and renders a prompt differently once it is answered, so answers cannot be located. Set "
                        "chat_template to another template, or to a .jinja file with the marks."
                    )
                answers[len(prompt) : len(through)] = [True] * (len(through) - len(prompt))
        return TokenizedConversation(ids, answers)

    def _ids(self, conversation: Conversation, count: int | None = None, *, prompt: bool = False) -> list[int]:
        encoding = self._render(conversation, count, chat_template=self._template, add_generation_prompt=prompt)
        return list(encoding["input_ids"])

    def _render(self, conversation: Conversation, count: int | None = None, **options: Any) -> Any:
        """Render the first `count` messages with a template; all of them if None."""
        return apply_chat_template(
            self.tokenizer,
            [message.for_template() for message in conversation.messages[:count]],
            source=self._source,
            remedy=_REMEDY,
            where=conversation.where,
            tools=list(conversation.tools) or None,
            return_dict=True,
            **options,
        )


def _named(named: str, tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    if named not in NAMED:
        if not named.endswith((".jinja", ".j2")) or not Path(named).is_file():
            raise ZebraError(
                f"chat_template must be {', '.join(NAMED)} or the path of a .jinja file; got {named!r}. Change it."
            )
        try:
            return Path(named).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ZebraError(f"the chat template {named} is not UTF-8: {error.reason}. Convert it.") from None
    needs = ["<|im_start|>", "<|im_end|>"] if named == "chatml" else []
    absent = [token for token in needs if token not in tokenizer.get_vocab()]
    if absent or (named == "plain" and tokenizer.eos_token is None):
        raise ZebraError(
            f"the chat template {named} requires {' and '.join(absent) or 'an end-of-text token'}, which the tokenizer "
            f"of {source} does not have. Use another template."
        )
    return NAMED[named]


def _marked_by_trl(tokenizer: PreTrainedTokenizerBase, template: str, source: str) -> str | None:
    """trl's copy of a template with marks; None for a template that it does not know."""
    if tokenizer.chat_template != template:  # trl looks at the tokenizer's own template
        return None
    from trl.chat_template_utils import get_training_chat_template

    with rendering(source, _REMEDY):  # trl renders the template to try it
        try:
            return get_training_chat_template(tokenizer)
        except ValueError:
            return None
