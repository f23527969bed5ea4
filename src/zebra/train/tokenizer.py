"""Train a tokenizer on a recipe's text: byte-level BPE, by the tokenizers library.

    "told 4321 times" -> "told" " 432" "1" " times"     with numbers in groups of up to three digits

Words keep the space before them. A group of digits is never merged with its neighbours, so a number has the same tokens
everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from zebra.data.documents import find_files, read_documents
from zebra.data.recall import RecallGenerator
from zebra.errors import ZebraError
from zebra.progress import console
from zebra.train.processes import is_first_process
from zebra.train.recipe import NewTokenizer, PretrainRecipe

END = "<|endoftext|>"
_MOST_CHARACTERS = 2_000_000
"""The most characters of generated text: enough for every group of digits to become a token."""


def train_tokenizer(texts: Iterable[str], settings: NewTokenizer) -> PreTrainedTokenizerBase:
    """Train a tokenizer of `settings.vocab_size` tokens; its end-of-text token is also its BOS token.

    Raises:
        ZebraError: texts that give fewer tokens; one text in place of several.
    """
    if isinstance(texts, str):
        raise ZebraError(f"texts must be a list of texts; got one text of {len(texts):,} characters. Pass a list.")
    tokenizer = Tokenizer(models.BPE())
    words = rf" ?\p{{N}}{{1,{settings.digits}}}| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (size := tokenizer.get_vocab_size()) < settings.vocab_size:
        raise ZebraError(
            f"the text yields only {size:,} tokens, but tokenizer.vocab_size is {settings.vocab_size:,}. "
            "Give more text, or lower tokenizer.vocab_size."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
    )


def tokenizer_texts(recipe: PretrainRecipe) -> Iterator[str]:
    """The documents that a recipe trains on, and generated ones in their share; the same for every seed.

    Training runs with different seeds can therefore be compared token by token.
    """
    data, characters = recipe.data, 0
    for source in data.by_source:
        for document in read_documents(find_files(source.files), source.separator, source.field):
            characters += len(document.text)
            yield document.text
    if data.recall is None:
        return
    share = data.recall.share
    count = _MOST_CHARACTERS if share == 1 else min(_MOST_CHARACTERS, int(characters * share / (1 - share)))
    if is_first_process():
        console.print(f"training the tokenizer on {characters:,} characters of text and {count:,} of recall documents")
    letters = Letters()
    generator, rng = RecallGenerator(letters), Random(0)
    for _ in range(0, count, _LETTERS):
        yield letters.decode(generator.document(_LETTERS, rng)[0])


_LETTERS = 4096


class Letters:
    """A substitute for a tokenizer that does not exist yet: each character is a token."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The code points of a text."""
        return [ord(letter) for letter in text]

    def decode(self, token_ids: list[int], **options: object) -> str:
        """The text of code points."""
        return "".join(map(chr, token_ids))
