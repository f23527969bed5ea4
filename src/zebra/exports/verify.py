"""Compare an export with its source: the engine decodes greedily, and zebra scores the same tokens.

The engine runs in a separate process, in an environment that need not have zebra. It reads a prompt shorter and one
longer than the window, and decodes with its KV cache. A model of `zebra.load` then scores the same tokens.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from zebra.engines import TARGETS
from zebra.errors import ZebraError
from zebra.gguf import is_gguf
from zebra.model.checkpoint import load_tokenizer, read_config
from zebra.model.checkpoint_files import check_gguf_package, read_json_object
from zebra.model.families import stripes_of
from zebra.model.load import load
from zebra.model.verify import Check
from zebra.stripes import Stripes

ENGINES = tuple(name for name in TARGETS if name != "sglang")
"""The engines that `verify_export` can run."""
NEW_TOKENS, TOP = 8, 10
TOLERANCE = {"F32": 5e-3, "F16": 5e-2, "BF16": 5e-2}
"""Tolerance of log-probabilities in nats, by type of the matrices. Gemma differs most: engines approximate its GELU."""
TOLERANCE_OF_BLOCKS = 0.5
"""Tolerance for block-quantised weights, with which llama.cpp rounds the activations too."""
_NAME_IT = "Pass what `zebra export` wrote for the engine."
_SAMPLES = ["Once upon a time, there was a little girl.", "In 1984 there were 12 pages;\n  and (some) code: x = y[0]!"]


def verify_export(
    target: str | os.PathLike[str],
    against: str | os.PathLike[str],
    engine: str,
    *,
    python: str = sys.executable,
    length: int | None = None,
    seed: int = 0,
) -> list[Check]:
    """Run an export in its engine and compare it with its source, on random tokens.

    1. short, long: the largest difference of log-probabilities in nats, over the top tokens of each decoding step. One
       prompt is shorter than the window, the other longer: an engine that ignores the window fails the second check.
       The check's name has the window, and its count is the number of prompt tokens.
    2. greedy: the largest gap in nats between zebra's most likely token and the token that the engine chose.
    3. tokenizer: the number of sample texts whose tokens differ.

    Args:
        target: what `zebra.export` wrote for the engine.
        against: the source of the export: a folder or a GGUF file, with or without stripes.
        engine: gguf, mlx or vllm.
        python: the interpreter of an environment with the engine: xllamacpp, mlx-lm or vllm.
        length: tokens of the long prompt; None means one and a half windows and 16 tokens.
        seed: of the random prompts.

    Raises:
        ZebraError: an unknown engine, or one that is not installed or fails; a target that was not written for it; no
            stripes; a length within the window.
    """
    if engine not in ENGINES:
        raise ZebraError(f"the engine must be one of {', '.join(ENGINES)}; got {engine!r}. Choose one.")
    layout, kind = _written(target, against, engine)
    n = length or layout.window + layout.window // 2 + 16
    if n <= layout.window:
        raise ZebraError(f"the length must be larger than the window of {layout.window}; got {n}. Raise the length.")
    model = load(against, stripes=layout, dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    short = max(2, min(layout.window, 512) - NEW_TOKENS)
    prompts = [torch.randint(model.config.vocab_size, (size,), generator=generator).tolist() for size in (short, n)]
    request = {"model": str(target), "prompts": prompts, "new_tokens": NEW_TOKENS, "top": TOP, "texts": _SAMPLES}
    (answer,) = run_engine(engine, python, [request | {"arguments": _arguments(target, engine)}])
    if "error" in answer:
        raise ZebraError(f"{engine} cannot run {target}: {' '.join(answer['error'].split())}")
    own = load_tokenizer(against)
    texts = [own(text).input_ids for text in _SAMPLES]
    wrong = sum(one != other for one, other in zip(texts, answer["texts"], strict=True))
    tolerance = TOLERANCE.get(kind, TOLERANCE_OF_BLOCKS)
    checks, engine_name = [], answer["engine"]
    outputs = zip(("short", "long"), prompts, answer["tokens"], answer["logprobs"], strict=True)
    for name, prompt, tokens, logprobs in outputs:
        difference, behind = compare(model, prompt, tokens, logprobs)
        window = f"{name}, window {layout.window:,}"
        checks.append(Check(window, engine_name, difference, tolerance, len(prompt)))
        checks.append(Check(f"{name}, greedy", engine_name, behind, tolerance, len(tokens)))
    return [*checks, Check("tokenizer", engine_name, wrong, 0, sum(map(len, texts)))]


def _written(target: str | os.PathLike[str], against: str | os.PathLike[str], engine: str) -> tuple[Stripes, str]:
    """The layout of an export, and the most frequent type of its matrices."""
    if is_gguf(target) != (engine == "gguf"):
        kind = "a file that ends in .gguf" if engine == "gguf" else "a folder"
        raise ZebraError(f"{engine} requires {kind}; got {target}. {_NAME_IT}")
    if not Path(target).exists():
        raise ZebraError(f"{target} does not exist. {_NAME_IT}")
    if is_gguf(target):
        check_gguf_package(target)
        from zebra.exports.gguf_file import layout_of
        from zebra.exports.gguf_model import read_model

        model = read_model(target)
        layout = layout_of(model)
        kinds = [tensor.kind.name for tensor in model.tensors.values() if len(tensor.shape) > 1]
        kind = max(kinds, key=kinds.count, default="F32")
    else:
        fields = read_json_object(Path(target) / "zebra.json", _NAME_IT)
        if (written := fields.get("engine", engine)) != engine:
            raise ZebraError(f"{target} was written for {written}, not for {engine}. {_NAME_IT}")
        layout, kind = Stripes.parse(str(fields.get("layout"))) if fields.get("window") else None, "F32"
    layout = layout or stripes_of(read_config(against))
    if layout is None:
        raise ZebraError(f"neither {target} nor {against} has stripes. {_NAME_IT}")
    return layout, kind


def _arguments(target: str | os.PathLike[str], engine: str) -> dict[str, Any]:
    """Arguments for vLLM's `LLM`: the flags of the command in the folder's README, by their Python names."""
    if engine != "vllm":
        return {}
    from zebra.exports.folders import command_of

    command = shlex.split(command_of("vllm", read_config(target), Path(target)))[3:]
    return {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in zip(command[::2], command[1::2], strict=True)
    }


def run_engine(engine: str, python: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Send requests to an engine in a process of its environment. run_gguf.py describes requests and answers.

    Raises:
        ZebraError: there is no such Python, the engine is not installed there, or the process fails or gives no answer.
    """
    script = Path(__file__).with_name(f"run_{engine}.py")
    try:
        done = subprocess.run([python, script], input=json.dumps(requests), capture_output=True, text=True, check=False)
    except OSError as error:
        raise ZebraError(
            f"there is no Python at {python}: {error.strerror}. Pass the Python of the engine's environment."
        ) from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise ZebraError(f"{engine} cannot be run by {python}: {reason}. See docs/engines.md for its environment.")
    try:
        answers = [dict(json.loads(line)) for line in done.stdout.splitlines()]
    except (ValueError, TypeError):
        answers = []
    if len(answers) != len(requests):
        raise ZebraError(f"{engine} gave no answer from {python}. Pass the Python of the engine's environment.")
    return answers


@torch.no_grad()
def compare(
    model: PreTrainedModel, prompt: list[int], tokens: list[int], logprobs: list[dict[str, float]]
) -> tuple[float, float]:
    """Compare an engine's answer with a model.

    Returns:
        in nats, the largest difference of log-probabilities (NaN if any value is), and the largest gap between the
        model's most likely token and the engine's token.
    """
    ids = torch.tensor([prompt + tokens], device=model.device)
    own = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    differences = [
        abs(own[i, int(token)].item() - value) for i, row in enumerate(logprobs) for token, value in row.items()
    ]
    behind = own.max(-1).values - own.gather(-1, torch.tensor(tokens, device=own.device)[:, None])[:, 0]
    return torch.tensor(differences).max().item(), behind.max().item()  # unlike Python's max, keeps NaN
