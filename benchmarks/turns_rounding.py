"""How far a cached answer in 16 bits is from one that reads everything anew, beside what 16 bits do in any case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zebra.decoding import Decoding
from zebra.generation import encode_messages
from zebra.model.checkpoint import load_tokenizer, read_config
from zebra.model.load import load
from zebra.model.prefix_cache import PrefixCache
from zebra.streaming import Step, answer


def rounding(checkpoint: Path, text: str, questions: Sequence[str], new: int) -> dict[str, tuple[float, int]]:
    """Of the tokens of all answers, in bfloat16: mean absolute differences of their log-probabilities, and counts.

    `cached_difference` is between the answer over the cache and one pass over the whole text; `dtype_difference`
    between that pass and one in float32; `likeliest_share` how many tokens are the likeliest of that pass too.
    """
    model, exact = (load(checkpoint, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    tokenizer, prefixes = load_tokenizer(str(checkpoint), read_config(str(checkpoint))), PrefixCache(model)
    messages: list[dict[str, str]] = []
    cached, whole, expected, same = list[float](), list[float](), list[float](), list[bool]()
    for question in questions:
        messages.append({"role": "user", "content": question if messages else f"{text}\n\n{question}"})
        prompt, steps = encode_messages(messages, tokenizer, remedy=""), list[Step]()
        on_step: Callable[[Step], Any] = steps.append
        result = answer(model, tokenizer, prompt, Decoding(max_new_tokens=new), prefixes, logprobs=0, on_step=on_step)
        messages.append({"role": "assistant", "content": result.text})
        tokens = torch.tensor(result.tokens)
        logprobs, exact_logprobs = (_logprobs(one, torch.cat([prompt, tokens]), len(tokens)) for one in (model, exact))
        cached += [step.logprob for step in steps if step.logprob is not None]
        whole += logprobs.gather(1, tokens[:, None])[:, 0].tolist()
        expected += exact_logprobs.gather(1, tokens[:, None])[:, 0].tolist()
        same += (logprobs.argmax(1) == tokens).tolist()
    return {
        "cached_difference": (_mean_difference(cached, whole), len(whole)),
        "dtype_difference": (_mean_difference(whole, expected), len(whole)),
        "likeliest_share": (sum(same) / len(same), len(same)),
    }


def _logprobs(model: PreTrainedModel, ids: Tensor, new: int) -> Tensor:
    """Of the last `new` tokens, read in one pass: (new, V)."""
    with torch.no_grad():
        return model(ids[None], logits_to_keep=new + 1).logits[0, :-1].float().log_softmax(-1)


def _mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
