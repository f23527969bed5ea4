"""A document and a question as a prompt that fits: what is cut is the middle of the document, never the question.

[beginning of the document ...] <the middle is cut> [... its end]  question
 '-------- half of what fits --'                    '- half ----'
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from zebra.data.qa import QAExample
from zebra.errors import ZebraError
from zebra.generation import encode_prompt

TEMPLATE = "{document}\n\nQuestion: {question}\nAnswer:"
WITHOUT_DOCUMENT = ""
_GAP = "\n...\n"
_JOINTS = 64
"""More tokens than a text may lose where it is joined to others."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens.

    Attributes:
        ids: its tokens.
        kept: the document's text that is in it.
        tokens: tokens of the whole document.
        cut: the document's tokens that are not in it, half-open; None where all are.
    """

    ids: tuple[int, ...]
    kept: str
    tokens: int
    cut: tuple[int, int] | None


class Prompts:
    """Items as prompts.

    Args:
        template: has `{document}` and `{question}` once each.
        chat: put it into the tokenizer's chat template, as one message of the user.

    Raises:
        ZebraError: a template without them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = TEMPLATE, *, chat: bool = False):
        if any(template.count(place) != 1 for place in ("{document}", "{question}")):
            raise ZebraError(
                f"a template has {{document}} and {{question}}, once each; got {template!r}. Write {TEMPLATE!r}."
            )
        self._tokenizer, self._chat = tokenizer, chat
        self._parts = re.split(r"(\{document\}|\{question\})", template)
        self._known: dict[str, list[tuple[int, int]]] = {}

    def ids(self, item: QAExample, document: str) -> tuple[int, ...]:
        """The prompt's tokens with this text in place of the document."""
        put = {"{document}": document, "{question}": item.question}
        text = "".join(put.get(part, part) for part in self._parts)
        return tuple(encode_prompt(text, self._tokenizer, self._chat)["input_ids"][0].tolist())

    def fitting(self, item: QAExample, length: int | None) -> Prompt:
        """The prompt in at most `length` tokens; whole where that is None.

        Raises:
            ZebraError: what stands around the document leaves no room for a token of it.
        """
        places = self._places(item.document)
        n, around = len(places), len(self.ids(item, WITHOUT_DOCUMENT))
        if length is None or n + around <= length + _JOINTS:
            ids = self.ids(item, item.document)
            if length is None or len(ids) <= length:
                return Prompt(ids, item.document, n, None)
        kept = min(n - 1, length - around)
        while kept >= 2:
            first, last = (kept + 1) // 2, kept // 2
            text = item.document[: places[first - 1][1]] + _GAP + item.document[places[n - last][0] :]
            ids = self.ids(item, text)
            if len(ids) <= length:
                return Prompt(ids, text, n, (first, n - last))
            kept -= len(ids) - length
        raise ZebraError(
            f"the question of {item.name} takes {around:,} tokens without its document, and there is room for "
            f"{length:,} in all. Take a longer --length, or fewer --answer-tokens."
        )

    def _places(self, document: str) -> list[tuple[int, int]]:
        """Where in the text each token of a document stands."""
        if document not in self._known:
            self._known.clear()  # items of one document come one after another
            found = self._tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            self._known[document] = found["offset_mapping"]
        return self._known[document]
