"""Retrieval by length and depth: does a model find what stands at a known place of a long text?

Two scores, each a share from 0 to 1 for every sample:

    generate     the answers that the greedy continuation of the prompt has, as RULER counts (arXiv 2404.06654)
    likelihood   the answers whose tokens are likelier behind the prompt than those of every distractor,
                 for models that cannot follow a question; a guesser has 1 / (distractors + 1)

A cell is the mean over its samples with Wilson's 95 % interval, which is exact for one answer and wide for several.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zebra.data.haystack import says
from zebra.data.needles import Needles, Sample, check
from zebra.data.questions import IN_HAYSTACK, WITHOUT_DEPTH
from zebra.evaluate.perplexity import evaluating, read_text
from zebra.generation import continued
from zebra.model.checkpoint import load_tokenizer
from zebra.model.extend import bounded_cache
from zebra.model.hosts import device_name
from zebra.model.loading import Loading, described
from zebra.model.rope import as_rope, changes_with_length
from zebra.positions import SelfExtend
from zebra.progress import bar
from zebra.records import Row
from zebra.refusal import Refusal

SCORES = ("generate", "likelihood")
BATCH_TOKENS = 8192
"""Tokens of prompt that are run at once; a longer prompt is read in chunks of as many."""


def retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    score: str = "generate",
    batch_tokens: int = BATCH_TOKENS,
) -> list[float]:
    """The score of each sample: the share of its answers that the model finds.

    Args:
        samples: of one length, so that they run in batches without padding.
        batch_tokens: how many tokens are run at once.

    Raises:
        Refusal: no such score, samples of several lengths or none.
    """
    _check_score(score)
    lengths = sorted({len(sample.ids) for sample in samples})
    if len(lengths) != 1:
        raise Refusal(f"samples of one length are measured together; got the lengths {lengths}. Take length by length.")
    size = max(1, batch_tokens // lengths[0])
    found: list[float] = []
    with evaluating(model):
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            if score == "generate":
                found += _generated(model, tokenizer, batch, batch_tokens)
            else:
                found += _preferred(model, batch, batch_tokens)
    return found


def _generated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Sample], chunk: int
) -> list[float]:
    ids, room = _prompts(model, batch), max(sample.room for sample in batch)
    in_chunks = {"prefill_chunk": chunk} if ids.shape[1] > chunk else {}
    new = continued(model, tokenizer, ids, max_new_tokens=room, **in_chunks)
    texts = tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [
        sum(says(text, answer.text) for answer in sample.answers) / len(sample.answers)
        for sample, text in zip(batch, texts, strict=True)
    ]


def _preferred(model: PreTrainedModel, batch: Sequence[Sample], chunk: int) -> list[float]:
    table, answers = likelihoods(model, batch, chunk), len(batch[0].answers)
    best_wrong = table[:, answers:].amax(dim=1, keepdim=True)
    return (table[:, :answers] > best_wrong).double().mean(dim=1).tolist()


def likelihoods(model: PreTrainedModel, batch: Sequence[Sample], chunk: int = BATCH_TOKENS) -> Tensor:
    """The log-likelihood of each answer and then of each distractor behind its prompt, (B, answers + distractors).

    A prompt is read once, a chunk at a time, and each candidate behind a copy of its cache.
    """
    ids = _prompts(model, batch)
    before, cache = ids.shape[1] - 1, bounded_cache(model)
    cache.reads(ids.shape[1])
    for start in range(0, before, chunk):
        part = ids[:, start : min(start + chunk, before)]
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    found: list[Tensor] = []
    for written in zip(*((*sample.answers, *sample.distractors) for sample in batch), strict=True):
        candidate = torch.tensor([one.ids for one in written], device=ids.device)
        read = torch.cat([ids[:, -1:], candidate[:, :-1]], dim=1)
        logits = model(read, past_key_values=copy.deepcopy(cache), use_cache=True).logits
        chances = logits.float().log_softmax(-1).gather(-1, candidate[..., None])
        found.append(chances.sum(dim=(1, 2)))
    return torch.stack(found, dim=1)


def _prompts(model: PreTrainedModel, batch: Sequence[Sample]) -> Tensor:
    return torch.tensor([sample.ids for sample in batch], device=model.device)


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean of n values between 0 and 1.

        (m + z²/2n ± z √(m (1 - m) / n + z²/4n²)) / (1 + z²/n),   z = 1.96

    Exact in its variance for values of 0 and 1; values between vary less, so that it is too wide for them.
    """
    z = 1.959964
    middle = mean + z * z / (2 * n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    whole = 1 + z * z / n
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def rows_of(
    checkpoint: str | os.PathLike[str],
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 20,
    score: str = "generate",
    haystack: Sequence[str] = (),
    beyond: bool = False,
    seed: int = 0,
    run: str = "evaluate",
    **loading: Any,
) -> list[Row]:
    """Load a checkpoint, write the samples, and measure: the rows of `zebra evaluate retrieval`, one for each cell.

    Args:
        depths: not read by the tasks whose evidence is the whole text; they have one cell for each length.
        haystack: files of text to hide the evidence in; noise where there are none.
        beyond: measure lengths beyond the positions that the model was trained for, with a warning.
        loading: the fields of `zebra.model.loading.Loading`.

    Raises:
        Refusal: what `Needles.samples` and `load` refuse, a length beyond the model without `beyond`, a rope that
            changes with length.
    """
    _check_score(score)
    cells = _cells(tasks, lengths, depths, samples)
    loads = Loading(**loading)
    loads.check()
    config = loads.config(checkpoint)
    _check_rope(config)
    if as_rope(loads.rope).kind != "base":
        _check_reach(config, loads.extension(config), max(lengths), beyond)
    tokenizer = load_tokenizer(checkpoint, config)
    needles = Needles(tokenizer, _documents(haystack, tokenizer))
    for task, length, depth in cells:  # refuse before the model is loaded
        needles.check(task, length=length, depth=depth, count=samples, seed=seed)
        if length == max(lengths):
            needles.samples(task, length=length, depth=depth, seed=seed)
    model = loads.model(checkpoint)
    common: dict[str, Any] = {
        "run": run,
        "model": str(checkpoint),
        "layout": described(model, loads.rope),
        "seed": seed,
        "device": device_name(model.device),
    }
    rows: list[Row] = []
    with bar("retrieval", samples * sum(length for _, length, _ in cells), "tokens") as advance:
        for task, length, depth in cells:
            advance(note=task)
            drawn = needles.samples(task, length=length, depth=depth, count=samples, seed=seed)
            scores: list[float] = []
            size = max(1, BATCH_TOKENS // length)
            for start in range(0, samples, size):
                batch = drawn[start : start + size]
                scores += retrieval(model, tokenizer, batch, score=score)
                advance(length * len(batch))
            named = f"retrieval-{score}-{task}" + ("-in-text" if haystack and task in IN_HAYSTACK else "")
            rows.append(_row(named, scores, length, depth, **common))
    return rows


def _row(task: str, scores: Sequence[float], length: int, depth: float | None, **common: Any) -> Row:
    mean, n = sum(scores) / len(scores), len(scores)
    low, high = wilson(mean, n)
    return Row(task=task, metric="accuracy", value=mean, length=length, depth=depth, n=n, low=low, high=high, **common)


def _cells(
    tasks: Sequence[str], lengths: Sequence[int], depths: Sequence[float], samples: int
) -> list[tuple[str, int, float | None]]:
    """Task by task, and each task from the shortest length on."""
    cells: list[tuple[str, int, float | None]] = []
    for task in dict.fromkeys(tasks):
        for depth in depths:
            check(task, depth, samples)
        its: Sequence[float | None] = [None] if task in WITHOUT_DEPTH else sorted(set(depths))
        cells += [(task, length, depth) for length in sorted(set(lengths)) for depth in its]
    if not cells:
        raise Refusal("a grid has at least one task, one length and one depth; got none. Give one of each.")
    return cells


def _check_score(score: str) -> None:
    if score not in SCORES:
        raise Refusal(f"the scores are {' and '.join(SCORES)}; got {score!r}. Choose one.")


def _check_rope(config: PreTrainedConfig) -> None:
    kind = changes_with_length(config)
    if kind is not None:
        raise Refusal(
            f"a rope of type {kind} changes its frequencies with the text's length, so that cached keys would carry "
            "others than new ones, and an answer needs the cache of its prompt. Take yarn, linear, llama3 or base."
        )


def _check_reach(config: PreTrainedConfig, setting: SelfExtend | None, length: int, beyond: bool) -> None:
    trained = getattr(config.get_text_config(), "max_position_embeddings", None)
    reach = trained if setting is None or trained is None else setting.reach(trained)
    if reach is None or length <= reach:
        return
    passes = f"a length of {length:,} tokens passes the {reach:,} positions that this model "
    passes += "was trained for" if setting is None else f"reaches with Self-Extend {setting}"
    if not beyond:
        raise Refusal(
            f"{passes}. Take a shorter one, a rope such as yarn:8, Self-Extend or a checkpoint that was adapted, or "
            "say beyond (--beyond) to measure there all the same."
        )
    warnings.warn(f"{passes}: what is measured there is how it fails.", stacklevel=3)


def _documents(files: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Any:
    if not files:
        return None
    corpus = read_text(files, tokenizer)
    return [corpus[i] for i in range(len(corpus))]
