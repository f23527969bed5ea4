"""Decode greedily with llama.cpp. A script for the engine's own environment, which needs neither zebra nor torch.

    python run_gguf.py < requests.json > answers.jsonl

A request has `model`, `prompts` (lists of token IDs), `new_tokens`, `top` and `texts`. Its answer has `engine`, and for
each prompt `tokens`, `logprobs` (the `top` most likely tokens at each new token) and `seconds` (time of the prefill);
`texts` as token IDs; or only an `error`.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any


def main() -> None:
    """Read requests from stdin and write answers to stdout; the engine's own output goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for request in json.load(sys.stdin):
        print(json.dumps(_answer(request)), file=out, flush=True)
    os._exit(0)  # the servers' threads outlive main


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    try:
        server = xllamacpp.Server(_parameters(request, xllamacpp))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    greedy = {"n_predict": 1, "temperature": 0.0, "n_probs": request["top"], "ignore_eos": True}
    tokens: list[list[int]] = []
    logprobs: list[list[dict[int, float]]] = []
    seconds = []
    for prompt in request["prompts"]:
        tokens.append([])
        logprobs.append([])
        for step in range(request["new_tokens"]):  # a single request would withhold incomplete characters
            body = {"prompt": prompt + tokens[-1], "cache_prompt": step > 0, "return_tokens": True, **greedy}
            done = _post(server, "completions", body)
            tokens[-1].append(done["tokens"][0])
            likeliest = done["completion_probabilities"]
            logprobs[-1].append({top["id"]: top["logprob"] for each in likeliest for top in each["top_logprobs"]})
            if step == 0:
                seconds.append(done["timings"]["prompt_ms"] / 1000)
    texts = [_post(server, "tokenize", {"content": text, "add_special": True})["tokens"] for text in request["texts"]]
    engine = f"llama.cpp by xllamacpp {xllamacpp.__version__}"
    return {"engine": engine, "tokens": tokens, "logprobs": logprobs, "texts": texts, "seconds": seconds}


def _parameters(request: dict[str, Any], xllamacpp: Any) -> Any:
    longest = max(map(len, request["prompts"])) + request["new_tokens"]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = request["model"]
    parameters.n_ctx = (longest // 256 + 1) * 256
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.verbosity = 0
    # The default KV cache is float16, whose rounding would hide small differences between two models.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    for cpu in (parameters.cpuparams, parameters.cpuparams_batch):
        cpu.n_threads = len(os.sched_getaffinity(0))
    return parameters


def _post(server: Any, route: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{server.listening_address}/{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return dict(json.load(response))


if __name__ == "__main__":
    main()
