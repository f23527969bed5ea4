"""Decode greedily with vLLM. A script for the engine's own environment, which does not need zebra.

    python run_vllm.py < requests.json > answers.jsonl

Requests and answers are those of run_gguf.py, without `seconds`; a request also has `arguments` for vLLM's `LLM`.
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
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # compiling its sampler takes longer than running a small model
    for request in json.load(sys.stdin):
        print(json.dumps(_answer(request)), file=out, flush=True)
    os._exit(0)  # its workers would outlive main


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import vllm

    prompts, new = request["prompts"], request["new_tokens"]
    longest = max(map(len, prompts)) + new
    sizes = {"max_model_len": longest, "max_num_batched_tokens": longest, "max_num_seqs": 1}
    exact = {"dtype": "float32", "enforce_eager": True, "max_logprobs": request["top"]}
    try:
        llm = vllm.LLM(request["model"], **sizes, **exact, **request["arguments"])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=new, logprobs=request["top"], ignore_eos=True, detokenize=False
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [each.outputs[0] for each in llm.generate(inputs, sampling, use_tqdm=False)]
    return {
        "engine": f"vLLM {vllm.__version__}",
        "tokens": [list(each.token_ids) for each in outputs],
        "logprobs": [[{i: top.logprob for i, top in step.items()} for step in each.logprobs] for each in outputs],
        "texts": [llm.get_tokenizer().encode(text) for text in request["texts"]],
    }


if __name__ == "__main__":
    main()
