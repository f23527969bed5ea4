"""Fit a document and a question into a prompt: the middle of the document is cut, the question never.

[beginning of the document ...] <the middle is cut> [... its end]  question
 '-------- half of what fits --'                    '- half ----'
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from zebra.data.encoding import token_spans
from zebra.data.haystack import PromptTokenizer
from zebra.data.qa import QAExample
from zebra.errors import ZebraError
from zebra.generation import encode_prompt

TEMPLATE = "{document}\n\nQuestion: {question}\nAnswer:"
WITHOUT_DOCUMENT = ""
_GAP = "\n...\n"
_JOINTS = 64
"""An upper bound of the tokens that may merge away where the parts of a prompt are joined."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens.

    Attributes:
        ids: its tokens.
        document: the document as the prompt has it, perhaps cut.
        document_tokens: tokens of the whole document.
        cut: the half-open range of the document's tokens that are left out; None if nothing is.
    """

    ids: tuple[int, ...]
    document: str
    document_tokens: int
    cut: tuple[int, int] | None


class Prompts:
    """Builds prompts from examples.

    Args:
        template: has `{document}` and `{question}` once each.
        chat: put the text into the tokenizer's chat template, as one user message.

    Raises:
        ZebraError: another template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = TEMPLATE, *, chat: bool = False):
        if any(template.count(field) != 1 for field in ("{document}", "{question}")):
            raise ZebraError(
                f"a template must have {{document}} and {{question}} once each; got {template!r}. Use {TEMPLATE!r}."
            )
        self.tokenizer, self._chat = tokenizer, chat
        self._pieces = PromptTokenizer(tokenizer)
        self._parts = re.split(r"(\{document\}|\{question\})", template)
        # Examples of one document come one after another.
        self._spans = functools.lru_cache(maxsize=1)(functools.partial(token_spans, tokenizer))

    def ids(self, example: QAExample, document: str) -> tuple[int, ...]:
        """The prompt's tokens with this text in place of the document."""
        fields = {"{document}": document, "{question}": example.question}
        text = "".join(fields.get(part, part) for part in self._parts)
        return tuple(encode_prompt(text, self.tokenizer, self._chat).tolist())

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """The tokens of an answer after the prompt, with the space between them unless in a chat template."""
        return self._pieces.encode_first(answer) if self._chat else self._pieces.encode(answer)

    def fitting(self, example: QAExample, length: int | None) -> Prompt:
        """The prompt with the document cut to fit into `length` tokens; None cuts nothing.

        Raises:
            ZebraError: the template and the question leave no room for the document.
        """
        spans = self._spans(example.document)
        n, around = len(spans), len(self.ids(example, WITHOUT_DOCUMENT))
        if length is None or n + around <= length + _JOINTS:
            ids = self.ids(example, example.document)
            if length is None or len(ids) <= length:
                return Prompt(ids, example.document, n, None)
        room = min(n - 1, length - around)
        while room >= 2:
            first, last = (room + 1) // 2, room // 2
            text = example.document[: spans[first - 1][1]] + _GAP + example.document[spans[n - last][0] :]
            ids = self.ids(example, text)
            if len(ids) <= length:
                return Prompt(ids, text, n, (first, n - last))
            room -= len(ids) - length
        raise ZebraError(
            f"the prompt of {example.name} takes {around:,} tokens without its document, but only {length:,} are "
            "available. Use a longer length, or fewer answer tokens."
        )
