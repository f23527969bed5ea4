"""Decode greedily with mlx-lm. A script for the engine's own environment, which needs neither zebra nor torch.

    python run_mlx.py < requests.json > answers.jsonl

Requests and answers are those of run_gguf.py, without `seconds`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    """Read requests from stdin and write answers to stdout; the engine's own output goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for request in json.load(sys.stdin):
        print(json.dumps(_answer(request)), file=out, flush=True)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from importlib.metadata import version

    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    try:
        model, tokenizer = load(request["model"])
        model.set_dtype(mx.float32)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    tokens: list[list[int]] = []
    logprobs: list[list[dict[int, float]]] = []
    for prompt in request["prompts"]:
        tokens.append([])
        logprobs.append([])
        for token, row in generate_step(mx.array(prompt), model, max_tokens=request["new_tokens"]):
            likeliest = mx.argsort(-row)[: request["top"]].tolist()
            tokens[-1].append(int(token))
            logprobs[-1].append({i: row[i].item() for i in likeliest})
    texts = [tokenizer.encode(text) for text in request["texts"]]
    engine = f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}"
    return {"engine": engine, "tokens": tokens, "logprobs": logprobs, "texts": texts}


if __name__ == "__main__":
    main()
