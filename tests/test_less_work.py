"""Nothing unneeded is computed: logits of a prompt, gradients and optimizer moments of frozen weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, TEXT
from transformers import AutoTokenizer, Trainer, TrainingArguments

import zebra
from zebra.evaluate.scoring import greedy_answers, log_likelihoods
from zebra.train import lora
from zebra.train.recipe import Lora

PROMPT = (TEXT / "tinystories_test.txt").read_text()[:900]


@pytest.fixture(scope="module")
def model() -> Any:
    return zebra.load(STORIES)


@contextmanager
def head_inputs(model: Any) -> Iterator[list[int]]:
    """Within this context, record the number of tokens of each call of the head."""
    tokens: list[int] = []
    with model.lm_head.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0].shape[1])):
        yield tokens


@pytest.mark.parametrize("chunk", [64, 4096])
def test_a_prompt_gets_the_logits_of_its_last_token_alone(model: Any, chunk: int) -> None:
    with head_inputs(model) as tokens:
        zebra.generate(model, PROMPT, max_new_tokens=2, prefill_chunk=chunk)
    assert len(tokens) >= 2
    assert set(tokens) == {1}


def test_a_conversation_and_retrieval_read_without_logits(model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    ids = tokenizer(PROMPT).input_ids
    with head_inputs(model) as tokens:
        greedy_answers(model, tokenizer, [ids, [*ids, 5]], max_new_tokens=[2, 2], batch_tokens=64)
    assert set(tokens) == {1}
    with head_inputs(model) as tokens:
        log_likelihoods(model, [ids], [[[5, 6], [7]]], batch_tokens=64)
    assert sum(tokens) < len(ids) / 4


def test_the_optimizer_has_what_is_trained_alone(tmp_path: Path) -> None:
    """transformers' own, under low-rank updates."""
    model = lora.wrap(zebra.load(STORIES), Lora.model_validate({"r": 2, "modules_to_save": ["norms"]}), seed=0)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    assert held == {id(one) for one in model.parameters() if one.requires_grad}
    assert len(held) < sum(1 for _ in model.parameters())
    loss = model(torch.tensor([[1, 5, 6, 7]]), labels=torch.tensor([[1, 5, 6, 7]])).loss
    loss.backward()
    optimizer.step()
    frozen = [one for one in model.parameters() if not one.requires_grad]
    assert all(one.grad is None and one not in optimizer.state for one in frozen)
