"""Weights and activations that are not finite: one line in every verb, never a number or a text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FEW_STORIES, STORIES, adapt_recipe, some
from safetensors.torch import load_file, save_file

import zebra
from zebra import ZebraError
from zebra.compare.run import compare
from zebra.data.conversations import TokenizedConversation
from zebra.evaluate.answers import answer_losses
from zebra.evaluate.documents import evaluate_documents
from zebra.evaluate.harness import evaluate_tasks
from zebra.evaluate.perplexity import evaluate_perplexity
from zebra.evaluate.retrieval import evaluate_retrieval
from zebra.evaluate.selection import select
from zebra.model.finite import check_finite
from zebra.train.adapt import adapt

BAD = "model.layers.3.mlp.up_proj.weight"
GRID: dict[str, Any] = {"tasks": ["passkey"], "lengths": [150], "depths": [0.5], "samples": 1}


def answers(path: Path, folder: Path) -> Any:
    one = TokenizedConversation([1, 403, 407, 9], [False, False, True, True])
    return answer_losses(zebra.load(path), [one])


def documents(path: Path, folder: Path) -> Any:
    file = folder / "questions.jsonl"
    file.write_text(json.dumps({"document": "Tom ran home.", "question": "Who ran?", "answers": ["Tom"]}) + "\n")
    return evaluate_documents(path, file, answer_tokens=4, score="likelihood")


def by_plain_transformers(path: Path, folder: Path) -> Any:
    return zebra.verify(zebra.convert(path, folder / "striped", "GLLL:16"), against=path)


VERBS: dict[str, Callable[[Path, Path], Any]] = {
    "perplexity": lambda path, folder: evaluate_perplexity(path, [str(FEW_STORIES)], lengths=[128]),
    "decoded": lambda path, folder: evaluate_perplexity(path, [str(FEW_STORIES)], lengths=[128], prompt=64),
    "retrieval": lambda path, folder: evaluate_retrieval(path, **GRID),
    "retrieval by likelihood": lambda path, folder: evaluate_retrieval(path, score="likelihood", **GRID),
    "documents": documents,
    "tasks": lambda path, folder: evaluate_tasks(path, tasks=["zebra-passkey"], lengths=[300], limit=1),
    "answers": answers,
    "compare": lambda path, folder: compare(
        str(path), [str(FEW_STORIES)], length=128, methods=["unchanged"], tasks=(), budget_minutes=0, out=folder / "out"
    ),
    "generate": lambda path, folder: zebra.generate(path, "Once", max_new_tokens=2),
    "generate, drawn": lambda path, folder: zebra.generate(path, "Once", max_new_tokens=2, temperature=1.0),
    "generate by beams": lambda path, folder: zebra.generate(path, "Once", max_new_tokens=2, num_beams=2),
    "select by a text": lambda path, folder: select(
        path, 2, window=16, length=100, text=[str(FEW_STORIES)], samples=4, separator="<|endoftext|>"
    ),
    "select by a task": lambda path, folder: select(path, 2, window=16, length=150, tasks=["passkey"], samples=4),
    "verify": by_plain_transformers,
    "verify Self-Extend": lambda path, folder: zebra.verify(path, self_extend="4:16"),
    "adapt, measured": lambda path, folder: adapt(adapt_recipe(folder / "run", model=str(path))),
    "adapt": lambda path, folder: adapt(adapt_recipe(folder / "run", model=str(path), evaluate=None)),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    folders: dict[str, Path] = {}

    def make(value: float) -> Path:
        if str(value) not in folders:
            folder = tmp_path_factory.mktemp(f"weight-is-{value}")
            for file in STORIES.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
            weights = load_file(folder / "model.safetensors")
            weights[BAD][5, 7] = value
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
            folders[str(value)] = folder
        return folders[str(value)]

    return make


@pytest.mark.parametrize("value", some([math.nan, math.inf], math.nan), ids=str)
@pytest.mark.parametrize("verb", VERBS)
def test_weights_that_are_not_finite_are_named(
    verb: str, value: float, broken: Callable[[float], Path], tmp_path: Path
) -> None:
    path = broken(value)
    with pytest.raises(ZebraError, match=rf"weights of .* are not finite: 1 of the [0-9,]+ values of {BAD}") as error:
        VERBS[verb](path, tmp_path)
    assert str(path) in str(error.value) or str(tmp_path) in str(error.value)
    assert not (tmp_path / "run" / "model").exists()


def test_activations_that_overflow_are_no_weights() -> None:
    model = zebra.load(STORIES, dtype=torch.float16)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e4)
    with pytest.raises(ZebraError, match=r"its weights are: its activations overflow in torch\.float16\. .* float32"):
        zebra.generate(model, "Once upon a time", max_new_tokens=1)
    check_finite(torch.zeros(2), model)
