"""Perplexity by position: how well a model predicts a token, depending on how much context it has.

Each result names the convention by which the text was cut into windows (`zebra.evaluate.windows`).

A model may need its BOS token in front of every text, as Gemma does. By default each window begins with the tokens that
the tokenizer puts before every text. They count among the `length` tokens, and the task of the results then ends in
`-bos`. Without them, all windows but the first of a document begin in the middle of a text.

Intervals are 95 % bootstraps over documents, which are independent of each other.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from zebra.data.corpus import Corpus, read_corpus
from zebra.data.documents import Names
from zebra.data.encoding import Encoder, window_prefix
from zebra.errors import ZebraError
from zebra.evaluate.batches import batches
from zebra.evaluate.intervals import bootstrap_mean
from zebra.evaluate.target import EvalTarget
from zebra.evaluate.windows import ScoredWindow, scored_windows
from zebra.model.context import check_learned_positions
from zebra.model.finite import check_finite
from zebra.model.local import local_attention_of
from zebra.model.loss import head_of, read_states, token_losses
from zebra.model.self_extend import bounded_cache
from zebra.model.sequence_parallel import shard_for, whole_losses
from zebra.progress import bar
from zebra.results import Result

FIRST_EDGE = 256


@dataclass(frozen=True)
class Score:
    """Perplexity over the positions [position_from, position_to) of a context, with its 95 % interval."""

    position_from: int
    position_to: int
    perplexity: float
    low: float | None
    high: float | None
    tokens: int
    documents: int


def edges(length: int, start: int = 0, first: int = FIRST_EDGE) -> list[int]:
    """The bounds of position buckets from `start` to `length`: 0, 256, 512, 1024, ... (`first`, then doubled)."""
    bounds, edge = [start], first
    while edge < length:
        if edge > start:
            bounds.append(edge)
        edge *= 2
    return [*bounds, length]


def perplexity(
    model: PreTrainedModel,
    corpus: Corpus,
    *,
    length: int,
    convention: str = "disjoint",
    stride: int | None = None,
    prompt: int | None = None,
    first_bucket: int = FIRST_EDGE,
    prefix: tuple[int, ...] = (),
    seed: int = 0,
    batch_tokens: int = 8192,
) -> list[Score]:
    """The perplexity of a corpus at one context length: a score for each bucket of positions, then one for all.

        perplexity = exp(sum of token losses / number of tokens)

    Args:
        length: tokens of context.
        convention: how the text is cut, see `zebra.evaluate.windows`.
        stride: tokens that each window of the strided convention scores; None takes a quarter of the length.
        prompt: tokens of each window that are read as a prompt and not scored. The tokens after them count as decoded,
            teacher-forced, with the same losses as token by token. It matters for models with full decoding.
        first_bucket: the end of the first bucket of positions; each further bucket ends at twice the position.
        prefix: tokens that begin each window, see `zebra.data.encoding.window_prefix`.
        batch_tokens: tokens that are run at once; a window is never split.

    Raises:
        ZebraError: contradicting options, a text too short, or tokens that the model has no embedding for.
    """
    windows = scored_windows(corpus, length, convention, stride=stride, prompt=prompt, prefix=prefix)
    largest = int(corpus.tokens.max())
    if largest >= model.config.vocab_size:
        raise ZebraError(
            f"the text has token ID {largest}, but the model has {model.config.vocab_size} embeddings. "
            "Use the model's own tokenizer."
        )
    bounds = edges(length, prompt or 0, first_bucket)
    sums = np.zeros((len(bounds) - 1, len(corpus)))
    counts = np.zeros_like(sums)

    def fits(batch: list[ScoredWindow], window: ScoredWindow) -> bool:
        size = len(window.window)
        return len(batch[0].window) == size and (len(batch) + 1) * size <= batch_tokens

    with evaluating(model), bar("perplexity", sum(len(w.window) for w in windows), "tokens") as advance:
        for batch in batches(windows, fits):
            ids = torch.from_numpy(np.stack([w.tokens for w in batch]).astype(np.int64)).to(model.device)
            kwargs: dict[str, Any] = {}
            if prompt is not None:
                cache = bounded_cache(model)
                cache.set_prompt_length(prompt)
                kwargs = {"past_key_values": cache, "use_cache": True}
            losses = sequence_losses(model, ids, **kwargs)
            for window, token_loss in zip(batch, losses, strict=True):
                for i, (start, end) in enumerate(itertools.pairwise(bounds)):
                    inside = token_loss[max(start, window.scored_from) : end]
                    sums[i, window.document] += inside.sum()
                    counts[i, window.document] += len(inside)
            advance(ids.numel())
    return bucket_scores(bounds, sums, counts, seed)


def sequence_losses(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> NDArray[np.float64]:
    """The loss of each token of sequences, given the tokens before it, in nats; NaN for the first token.

    Args:
        ids: (B, T).
        kwargs: arguments of the model's forward, such as a cache.

    Returns:
        (B, T).

    Raises:
        ZebraError: as `Head.check` and `check_finite`.
    """
    inputs = shard_for(model, {"input_ids": ids, "labels": ids})
    shard, labels = inputs.pop("input_ids"), inputs.pop("labels")
    last = torch.tensor([shard.shape[1] - 1], device=model.device)  # one token's logits suffice to check the head
    states, logits = read_states(model, shard, logits_to_keep=last, **inputs, **kwargs)
    head = head_of(model)
    head.check(states[:, -1:], logits[:, -1:])
    losses = whole_losses(model, token_losses(states, head, labels), ids.shape[1])
    check_finite(losses[:, 1:], model)
    return losses.double().cpu().numpy()


def bucket_scores(
    bounds: Sequence[int], sums: NDArray[np.float64], counts: NDArray[np.float64], seed: int
) -> list[Score]:
    """A score for each bucket that has tokens, and one for all of them if there are several and the first begins at 0.

    Args:
        bounds: of the buckets, see `edges`.
        sums, counts: (buckets, documents), see `score_of`.
    """
    buckets = [*zip(bounds, bounds[1:], sums, counts, strict=False)]
    if len(buckets) > 1 and bounds[0] == 0:
        buckets.append((0, bounds[-1], sums.sum(axis=0), counts.sum(axis=0)))
    return [score_of(*bucket, seed) for bucket in buckets if bucket[3].any()]


def score_of(start: int, end: int, sums: NDArray[np.float64], counts: NDArray[np.float64], seed: int) -> Score:
    """The perplexity of a bucket from the sums of losses and the numbers of scored tokens, both (documents,)."""
    scored = counts > 0
    loss = bootstrap_mean(sums[scored], counts[scored], seed, bounds=(0, math.inf))
    low, high = (None if nats is None else float(np.exp(nats)) for nats in (loss.low, loss.high))
    return Score(start, end, float(np.exp(loss.value)), low, high, int(counts.sum()), int(scored.sum()))


def evaluate_perplexity(
    checkpoint: str | os.PathLike[str],
    text: Names,
    *,
    lengths: Sequence[int],
    convention: str = "disjoint",
    stride: int | None = None,
    separator: str | None = None,
    field: str | None = None,
    num_proc: int = 1,
    join: bool = False,
    prompt: int | None = None,
    bos: bool | None = None,
    check_only: bool = False,
    seed: int = 0,
    run: str = "evaluate",
    **loading: Any,
) -> list[Result]:
    """Load a checkpoint, tokenise texts, and measure: the results of `zebra evaluate perplexity`.

    Args:
        separator, field, num_proc: see `zebra.data.corpus.read_corpus`.
        join: join documents to at least each length, see `zebra.data.corpus.Corpus.joined`.
        prompt: see `perplexity`; the task of the results then ends in `-decoded`.
        bos: see `zebra.data.encoding.window_prefix`.
        check_only: load no model; the results are the numbers of tokens that it would read.
        loading: the fields of `zebra.model.load_options.LoadOptions`.

    Raises:
        ZebraError: as `EvalTarget`, `read_corpus` and `perplexity`; full decoding without a prompt.
    """
    if not lengths:
        raise ZebraError("perplexity requires at least one length; got none. Give one.")
    target = EvalTarget(checkpoint, purpose=None if prompt is None else "generating", **loading)
    check_learned_positions(target.config, max(lengths))
    corpus = read_corpus(text, Encoder.of(target.tokenizer), separator=separator, field=field, num_proc=num_proc)
    texts = {length: corpus.joined(length) if join else corpus for length in lengths}
    prefix = window_prefix(target.tokenizer, bos)
    settings: dict[str, Any] = {"convention": convention, "stride": stride, "prompt": prompt, "prefix": prefix}
    windows = {n: scored_windows(texts[n], n, **settings) for n in lengths}
    _warn_of_lengths(target, {n: max(len(one.window) for one in windows[n]) for n in lengths})
    task = task_name(convention, prefix) + "-decoded" * (prompt is not None)
    if check_only:
        columns = {"run": run, "task": task, "metric": "tokens"} | target.columns()
        return [Result(value=sum(len(one.window) for one in windows[n]), length=n, **columns) for n in windows]
    model = target.load()
    if local_attention_of(model).full_decode and prompt is None:
        raise ZebraError(
            "full decoding affects only decoded tokens, and without a prompt none are decoded. Set a prompt, such as "
            f"{min(lengths) // 2} (--prompt), or full_decode=False (--no-full-decode)."
        )
    columns = {"run": run, "seed": seed} | target.columns(model)
    results = []
    for n in lengths:
        scores = perplexity(model, texts[n], length=n, seed=seed, **settings)
        results += results_of(scores, n, task, **columns)
    return results


def unfilled(tokens: int, length: int) -> str | None:
    """A warning if the longest window, of `tokens`, does not fill a context of `length` tokens."""
    if tokens >= length:
        return None
    return (
        f"no document fills a context of {length:,} tokens; the longest window has {tokens:,}. Give longer documents, "
        "join them, or use a shorter length."
    )


def _warn_of_lengths(target: EvalTarget, longest: Mapping[int, int]) -> None:
    """Warn if no window is as long as its length, and of windows beyond the reach of the model."""
    for length, tokens in longest.items():
        if text := unfilled(tokens, length):
            warnings.warn(text, stacklevel=3)
    target.check_length(max(longest.values()), beyond=True)


def task_name(convention: str, prefix: tuple[int, ...]) -> str:
    """The name of the task of results that were measured by a convention, with a prefix or without."""
    return f"perplexity-{convention}" + "-bos" * bool(prefix)


def results_of(scores: Sequence[Score], length: int, task: str, **columns: Any) -> list[Result]:
    """Scores as results of a task; `columns` are the same for all of them."""
    return [
        Result(
            task=task,
            metric="perplexity",
            value=score.perplexity,
            length=length,
            position_from=score.position_from,
            position_to=score.position_to,
            n=score.tokens,
            low=score.low,
            high=score.high,
            **columns,
        )
        for score in scores
    ]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients; restore its mode at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
