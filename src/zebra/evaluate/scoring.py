"""What a model answers to prompts, and how likely given answers are.

Short prompts of similar length are read in batches. Long ones are read one by one, and a shared beginning, such as one
document with several questions, is read only once:

    prompts, padded on the left          answers, padded on the right
    [.. .. p0 p1 p2]  ─► cache ─► copy   [p2 a0 a1 ..]
    [p0 p1 p2 p3 p4]             copy    [p4 a0 a1 a2]      for each answer a copy of the cache

    [ document | question 1 ]  ─► cache, cut where question 1 begins
               [ question 2 ]  ─► the rest of the cache
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zebra.data.documents import Names, names_of
from zebra.data.encoding import decode
from zebra.decoding import Decoding
from zebra.errors import ZebraError
from zebra.evaluate.batches import batches
from zebra.evaluate.perplexity import evaluating
from zebra.generation import generate_with
from zebra.model.cache import StripedCache
from zebra.model.finite import checking_logits
from zebra.model.self_extend import bounded_cache

SCORES = ("generate", "likelihood")
BATCH_TOKENS = 8192
"""Tokens of prompts that run at once; a longer prompt is read in chunks of this size."""
_LOGITS = 1024
"""Answer tokens whose logits are computed at once: 192 MiB with a vocabulary of 49,152, and twice that to normalise."""
_SHARED = 256
"""The shortest shared beginning that is not read again, in tokens."""

Ids = Sequence[int]


def check_score(score: str) -> None:
    """Check that a score is in `SCORES`.

    Raises:
        ZebraError: it is not.
    """
    if score not in SCORES:
        raise ZebraError(f"score must be {' or '.join(SCORES)}; got {score!r}. Choose one.")


def no_progress(tokens: float) -> None:
    """Do nothing, in place of a progress bar."""


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: Sequence[int],
    stop: Names = (),
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[float], None] = no_progress,
) -> list[str]:
    """The greedy answer to each prompt, up to the first stop string.

    Args:
        max_new_tokens: for each prompt; a batch generates up to the largest among its prompts.
        batch_tokens: tokens that are run at once.
        advance: called with the number of prompt tokens that are done.
    """
    answers, strings = [""] * len(prompts), tuple(names_of(stop))
    for batch in _read(model, prompts, batch_tokens):
        room = max(max_new_tokens[i] for i in batch.indices)
        decoding = Decoding(max_new_tokens=room, stop=strings)
        with evaluating(model):
            output = generate_with(
                model, tokenizer, batch.ids, decoding, attention_mask=batch.mask, past_key_values=batch.cache
            )
        new = output.sequences[:, batch.ids.shape[1] :].tolist()
        for i, text in zip(batch.indices, (decode(tokenizer, tokens) for tokens in new), strict=True):
            answers[i] = min((text.partition(string)[0] for string in strings), key=len, default=text).strip()
        advance(int(batch.mask.sum()))
    return answers


def log_likelihoods(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    answers: Sequence[Sequence[Ids]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[float], None] = no_progress,
) -> list[list[float]]:
    """The log-likelihood, in nats, of each answer after its prompt.

        log p(answer | prompt) = sum over its tokens of log p(token | prompt and the tokens before it)

    Args:
        prompts: each has at least one token.
        answers: one or more for each prompt, each with at least one token.
        batch_tokens: tokens that are run at once.
        advance: called with the number of prompt tokens that are done.
    """
    sums: list[list[float]] = [[] for _ in prompts]
    longest = max((len(answer) for some in answers for answer in some), default=1)
    for batch in _read(model, prompts, batch_tokens, max(1, _LOGITS // longest)):
        with evaluating(model), checking_logits(model):
            of_batch = _of_batch(model, batch, [answers[i] for i in batch.indices])
        for i, of_prompt in zip(batch.indices, of_batch, strict=True):
            sums[i] = of_prompt
        advance(int(batch.mask.sum()))
    return sums


@dataclass(frozen=True)
class _Batch:
    """Prompts that have been read except for their last token.

    Attributes:
        indices: which of the prompts these are.
        ids, mask: (B, T), padded on the left.
        cache: holds the first T - 1 tokens.
    """

    indices: list[int]
    ids: Tensor
    mask: Tensor
    cache: StripedCache

    @property
    def positions(self) -> Tensor:
        """(B, T), 0 at padding."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)


def _read(
    model: PreTrainedModel, prompts: Sequence[Ids], batch_tokens: int, most: int | None = None
) -> Iterator[_Batch]:
    """Read all prompts, in batches of at most `batch_tokens` with padding; a longer one is read in chunks of this size.

    Args:
        most: the most prompts in a batch.
    """

    def fits(batch: list[int], _: int) -> bool:
        return len(batch) != most and (len(batch) + 1) * len(prompts[batch[0]]) <= batch_tokens

    short = [i for i, prompt in enumerate(prompts) if 2 * len(prompt) <= batch_tokens]
    longest_first = sorted(short, key=lambda i: -len(prompts[i]))
    for indices in batches(longest_first, fits):
        batch = _Batch(indices, *padded([prompts[i] for i in indices], model.device, side="left"), bounded_cache(model))
        _extend(model, batch, batch.ids.shape[1] - 1, batch_tokens)
        yield batch
    long = sorted({*range(len(prompts))} - {*short}, key=lambda i: list(prompts[i]))
    shared = [_shared(prompts[i], prompts[j]) for i, j in pairwise(long)]
    beginnings: list[StripedCache] = []  # of the previous prompt, each longer than the one before
    for at, i in enumerate(long):
        while beginnings and beginnings[-1].get_seq_length() > shared[at - 1]:
            beginnings.pop()
        cache = (beginnings and beginnings[-1].cut(beginnings[-1].get_seq_length())) or bounded_cache(model)
        batch = _Batch([i], *padded([prompts[i]], model.device, side="left"), cache)
        for end in sorted({one for one in accumulate(shared[at:], min) if one > cache.get_seq_length()}):
            _extend(model, batch, end, batch_tokens)
            if (beginning := cache.cut(end)) is not None:
                beginnings.append(beginning)
        _extend(model, batch, len(prompts[i]) - 1, batch_tokens)
        yield batch


def _shared(one: Ids, other: Ids) -> int:
    """How many first tokens two prompts share, without the last token of each; 0 if fewer than `_SHARED`."""
    shorter = min(len(one), len(other)) - 1
    common = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    return common if common >= _SHARED else 0


def _extend(model: PreTrainedModel, batch: _Batch, end: int, chunk: int) -> None:
    """Read the tokens before `end` that the cache does not hold yet."""
    batch.cache.set_prompt_length(batch.ids.shape[1])
    for start in range(batch.cache.get_seq_length(), end, chunk):
        stop = min(start + chunk, end)
        with evaluating(model), checking_logits(model):
            model(
                batch.ids[:, start:stop],
                attention_mask=batch.mask[:, :stop],
                position_ids=batch.positions[:, start:stop],
                past_key_values=batch.cache,
                use_cache=True,
                logits_to_keep=1,
            )


def _of_batch(model: PreTrainedModel, batch: _Batch, answers: Sequence[Sequence[Ids]]) -> list[list[float]]:
    sums: list[list[float]] = [[] for _ in answers]
    for i in range(max(map(len, answers))):
        # the i-th answer of each prompt; a prompt with fewer answers repeats its last one, which is not counted
        answer, real = padded([some[min(i, len(some) - 1)] for some in answers], model.device, side="right")
        steps = torch.arange(answer.shape[1], device=model.device)
        logits = model(
            torch.cat([batch.ids[:, -1:], answer[:, :-1]], dim=1),
            attention_mask=torch.cat([batch.mask, real[:, :-1]], dim=1),
            position_ids=batch.positions[:, -1:] + steps,
            past_key_values=copy.deepcopy(batch.cache),
            use_cache=True,
        ).logits
        of_tokens = logits.float().log_softmax(-1).gather(-1, answer[..., None])[..., 0]
        for some, of_prompt, total in zip(answers, sums, (of_tokens * real).sum(dim=1).tolist(), strict=True):
            if i < len(some):
                of_prompt.append(total)
    return sums


def padded(sequences: Sequence[Ids], device: torch.device, *, side: str) -> tuple[Tensor, Tensor]:
    """Pad sequences on one side, "left" or "right"; returns the tokens and their mask, both (B, T)."""
    ids = [torch.tensor(sequence) for sequence in sequences]
    padded, mask = (
        pad_sequence(tensors, batch_first=True, padding_side=side)
        for tensors in (ids, [torch.ones_like(one) for one in ids])
    )
    return padded.to(device), mask.to(device)
