"""Perplexity by position: how well a model predicts a token, by how much context stands before it.

Three conventions, which give different numbers and are named in every row:

    disjoint    [-------][-------][---]   windows side by side; every token but each window's first is scored once
    strided     [-------]                 windows of `length`, moved by `stride`; the first scores all its tokens, every
                  [-----==]               other one its last `stride`: nearly a full context before each token
    truncated   [-------].......          the first `length` tokens of each document that has as many

Intervals are 95 % bootstraps over documents, the unit that is independent.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zebra.data.corpus import Corpus, tokenise
from zebra.data.encoding import Encoder
from zebra.model.checkpoint import fingerprint, load_tokenizer, read_config
from zebra.model.extend import setting_of
from zebra.model.families import layout
from zebra.model.hosts import device_name, load, read_device, read_dtype
from zebra.model.loss import head_of, token_losses, without_logits
from zebra.positions import SelfExtend
from zebra.progress import bar
from zebra.records import Row
from zebra.refusal import Refusal

CONVENTIONS = ("disjoint", "strided", "truncated")
FIRST_EDGE = 256
_RESAMPLES = 1000


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


@dataclass(frozen=True)
class _Window:
    document: int
    tokens: NDArray[np.integer]
    scored_from: int


def edges(length: int) -> list[int]:
    """The bounds of the position buckets: 0, 256, 512, 1024, ... up to `length`."""
    bounds = [0]
    edge = FIRST_EDGE
    while edge < length:
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
    seed: int = 0,
    batch_tokens: int = 8192,
) -> list[Score]:
    """The perplexity of a corpus at one context length: a score for each bucket of positions, then one for all.

        perplexity = exp(sum of token losses / number of tokens)

    Args:
        length: tokens of context.
        stride: tokens that each window of the strided convention scores; a quarter of the length where None.
        batch_tokens: how many tokens are run at once; a window is never split.

    Raises:
        Refusal: a contradiction between the options, a text too short, tokens the model has no embedding for.
    """
    windows = _windows(corpus, length, convention, stride)
    largest = int(corpus.tokens.max())
    if largest >= model.config.vocab_size:
        raise Refusal(
            f"the text has token {largest}, but the model has {model.config.vocab_size} embeddings. "
            "Use the model's own tokenizer."
        )
    bounds = edges(length)
    sums = np.zeros((len(bounds) - 1, len(corpus)))
    counts = np.zeros_like(sums)
    head = head_of(model)
    with evaluating(model), bar("perplexity", sum(len(w.tokens) for w in windows), "tokens") as advance:
        for batch in _batches(windows, batch_tokens):
            ids = torch.from_numpy(np.stack([w.tokens for w in batch]).astype(np.int64)).to(model.device)
            hidden = model(ids, **without_logits(model.device)).hidden_states[-1]
            losses = token_losses(hidden, head, ids).double().cpu().numpy()
            for window, row in zip(batch, losses, strict=True):
                for i, (start, end) in enumerate(itertools.pairwise(bounds)):
                    inside = row[max(start, window.scored_from) : end]
                    sums[i, window.document] += inside.sum()
                    counts[i, window.document] += len(inside)
            advance(ids.numel())
    spans = [(bounds[i], bounds[i + 1], sums[i], counts[i]) for i in range(len(bounds) - 1)]
    if len(spans) > 1:
        spans.append((0, length, sums.sum(axis=0), counts.sum(axis=0)))
    return [_score(*span, seed) for span in spans if span[3].any()]


def rows_of(
    checkpoint: str | os.PathLike[str],
    text: Sequence[str],
    *,
    lengths: Sequence[int],
    convention: str = "disjoint",
    stride: int | None = None,
    separator: str | None = None,
    field: str = "text",
    workers: int = 1,
    join: bool = False,
    stripes: str | None = None,
    rope: str | None = None,
    self_extend: SelfExtend | str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    seed: int = 0,
    run: str = "evaluate",
) -> list[Row]:
    """Load a checkpoint, tokenise texts, and measure: the rows of `zebra evaluate perplexity`."""
    place = read_device(device)
    placed: dict[str, Any] = {} if dtype is None else {"dtype": read_dtype(dtype)}
    config = read_config(checkpoint, routed=self_extend is None or stripes is not None)
    corpus = read_text(text, load_tokenizer(checkpoint, config), separator=separator, field=field, workers=workers)
    texts = {length: corpus.joined(length) if join else corpus for length in lengths}
    for length in lengths:
        _windows(texts[length], length, convention, stride)  # refuse before the model is loaded
    model = load(checkpoint, stripes=stripes, rope=rope, self_extend=self_extend, **placed).to(place)
    setting = setting_of(model)
    named = " ".join(filter(None, (layout(model.config), rope))) + (f", self-extend {setting}" if setting else "")
    rows: list[Row] = []
    for length in lengths:
        scores = perplexity(model, texts[length], length=length, convention=convention, stride=stride, seed=seed)
        rows += as_rows(
            scores,
            length,
            convention,
            run=run,
            model=str(checkpoint),
            layout=named,
            seed=seed,
            device=device_name(model.device),
        )
    return rows


def as_rows(scores: Sequence[Score], length: int, convention: str, **common: Any) -> list[Row]:
    """Scores as rows of the task `perplexity-<convention>`; `common` holds the columns that all share."""
    return [
        Row(
            task=f"perplexity-{convention}",
            metric="perplexity",
            value=score.perplexity,
            length=length,
            position_from=score.position_from,
            position_to=score.position_to,
            n=score.tokens,
            low=score.low,
            high=score.high,
            **common,
        )
        for score in scores
    ]


def read_text(
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    separator: str | None = None,
    field: str = "text",
    append_eos: bool = False,
    workers: int = 1,
    cache: str | None = None,
) -> Corpus:
    """Texts as a corpus under a checkpoint's tokenizer, from the cache where they are in it."""
    encode = Encoder(tokenizer.backend_tokenizer.to_str(), specials_as_text=tokenizer.split_special_tokens)
    return tokenise(
        files,
        encode,
        tokenizer=f"{fingerprint(tokenizer)} {encode.specials_as_text}",
        separator=separator,
        field=field,
        append=tokenizer.eos_token_id if append_eos else None,
        workers=workers,
        cache=cache,
    )


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """In the model's evaluation mode and without gradients; its mode comes back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _windows(corpus: Corpus, length: int, convention: str, stride: int | None) -> list[_Window]:
    if convention not in CONVENTIONS:
        raise Refusal(f"the conventions are {', '.join(CONVENTIONS)}; got {convention!r}. Choose one.")
    if length < 2:
        raise Refusal(f"a context has at least 2 tokens, one to see and one to predict; got a length of {length}.")
    if stride is not None and (convention != "strided" or not 1 <= stride < length):
        raise Refusal(
            f"a stride belongs to the strided convention and lies between 1 and length - 1; got {stride} "
            f"with the {convention} convention and length {length}. Change one of them."
        )
    windows = []
    for i in range(len(corpus)):
        tokens = corpus[i]
        if convention == "truncated":
            spans = [(0, length, 1)] if len(tokens) >= length else []
        elif convention == "disjoint":
            spans = [(start, min(start + length, len(tokens)), 1) for start in range(0, len(tokens), length)]
        else:
            step = stride or max(1, length // 4)
            spans = [(0, min(length, len(tokens)), 1)]
            for end in range(length + step, len(tokens) + step, step):
                stop = min(end, len(tokens))
                spans.append((stop - length, stop, length - (stop - (end - step))))
        windows += [_Window(i, tokens[a:b], scored) for a, b, scored in spans if b - a > scored]
    if not windows:
        raise Refusal(
            f"no document has enough tokens for the {convention} convention at length {length:,}; the longest has "
            f"{int(corpus.lengths.max(initial=0)):,}. Give longer documents, join them, or take a shorter length."
        )
    return windows


def _batches(windows: Sequence[_Window], batch_tokens: int) -> list[list[_Window]]:
    """Windows of one length together, in order."""
    batches: list[list[_Window]] = []
    for window in windows:
        size = len(window.tokens)
        if batches and len(batches[-1][0].tokens) == size and (len(batches[-1]) + 1) * size <= batch_tokens:
            batches[-1].append(window)
        else:
            batches.append([window])
    return batches


def _score(start: int, end: int, sums: NDArray[np.float64], counts: NDArray[np.float64], seed: int) -> Score:
    seen = counts > 0
    sums, counts = sums[seen], counts[seen]
    low, high = (None if bound is None else float(np.exp(bound)) for bound in bootstrap(sums, counts, seed))
    return Score(start, end, float(np.exp(sums.sum() / counts.sum())), low, high, int(counts.sum()), len(sums))


def bootstrap(
    sums: NDArray[np.float64], counts: NDArray[np.floating | np.integer], seed: int
) -> tuple[float | None, float | None]:
    """The 95 % interval of `sum(sums) / sum(counts)` when what is independent is drawn again; none of one alone."""
    if len(sums) < 2:
        return None, None
    draws = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), _RESAMPLES)
    low, high = np.quantile((draws @ sums) / (draws @ counts), [0.025, 0.975]).tolist()
    return low, high
