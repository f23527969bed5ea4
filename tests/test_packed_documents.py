"""Packed documents as the collators of others pass them: each is read as if it stood alone, or rejected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_MEMBER, FEW_STORIES, STORIES, fitting, tiny_model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening

import zebra
from zebra import ZebraError
from zebra.model.cache import StripedCache
from zebra.model.documents import documents_of

LENGTHS = (9, 1, 14, 6)
WINDOW = 5


def examples(seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 97, (n,), generator=generator).tolist()} for n in LENGTHS]


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{"stripes": "GL:5+2"}, {"stripes": "GL:5", "self_extend": "3:4"}])
def test_named_documents_reach_attention_overrides(options: dict[str, str], checkpoints: Callable[..., Path]) -> None:
    model = zebra.load(checkpoints("llama"), **options)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=False)(examples())
    del batch["labels"]
    with torch.no_grad():
        alone = [model(torch.tensor([one["input_ids"]]), use_cache=False).logits[0] for one in examples()]
        logits = model(**batch, use_cache=False).logits[0]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=[pytest.mark.full] * (one != "llama")) for one in EVERY_MEMBER]
)
def test_a_flattened_batch_equals_its_documents_one_by_one(family: str, checkpoints: Callable[..., Path]) -> None:
    """By all that the collator of transformers can return: with positions, and without, where they run on."""
    path = checkpoints(family)
    model = zebra.load(path, stripes=fitting(family, f"GL:{WINDOW}"), dtype=torch.float32)
    alone: list[Tensor] = [model(torch.tensor([one["input_ids"]]), use_cache=False).logits[0] for one in examples()]
    expected = torch.cat(alone)
    expected.pow(2).sum().backward()
    expected_gradients = gradients(model)
    for options in (
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
        {"return_seq_idx": True, "position_ids_start": 2},
    ):
        batch = DataCollatorWithFlattening(**options)(examples())
        del batch["labels"]
        model.zero_grad()
        logits = model(**batch, use_cache=False).logits[0]
        torch.testing.assert_close(logits, expected, rtol=2e-4, atol=2e-4)
        logits.pow(2).sum().backward()
        for name, gradient in gradients(model).items():
            scale = expected_gradients[name].abs().max().item()
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4 * scale, msg=name)


def offsets(*ends: int) -> Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32)


def test_documents_of_a_batch_by_each_argument() -> None:
    expected = [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    sequence_index = torch.tensor([[0, 0, 0, 1, 1], [7, 7, 7, 7, 7]])
    for arguments in (
        {"cu_seq_lens_q": offsets(3, 5, 10), "cu_seq_lens_k": offsets(3, 5, 10), "max_length_q": 5, "max_length_k": 9},
        {"cu_seq_lens_k": offsets(3, 3, 5, 10)},  # one document is empty
        {"seq_idx": sequence_index},
        {"seq_idx": sequence_index, "cu_seq_lens_q": offsets(3, 5, 10)},
    ):
        for positions in (None, torch.arange(5)[None], torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])):
            documents = documents_of(positions, None, (2, 5), **arguments)
            assert documents is not None
            assert documents.tolist() == expected
    assert documents_of(torch.arange(5)[None], None, (2, 5), cu_seq_lens_q=offsets(5, 10)) is None


PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cu_seq_lens_q": offsets(3, 9)}, "2 x 5 tokens; got cu_seq_lens_q of"),
        ({"cu_seq_lens_q": offsets(3, 12)}, "cu_seq_lens_q of"),
        ({"cu_seq_lens_q": offsets(3, 10)}, "cu_seq_lens_q of"),  # a document in two sequences
        ({"cu_seq_lens_q": offsets(5, 3, 10)}, "cu_seq_lens_q of"),
        ({"cu_seq_lens_q": torch.tensor([3, 5, 10])}, "cu_seq_lens_q of"),
        ({"cu_seq_lens_q": offsets(5, 10)[None]}, r"cu_seq_lens_q of shape \(1, 3\)"),
        ({"cu_seq_lens_q": offsets(5, 10), "cu_seq_lens_k": offsets(3, 5, 10)}, "cu_seq_lens_k that differs"),
        ({"cu_seq_lens_q": offsets(5, 10), "max_length_k": 4}, "a document of 5 tokens and a smaller max_length"),
        ({"max_length_q": 5}, "max_length_k without cu_seq_lens_q"),
        ({"cu_seq_lens_q": offsets(5, 10), "seq_idx": torch.tensor([[0, 0, 0, 1, 1]])}, "seq_idx that differs"),
        ({"seq_idx": torch.zeros(1, 4)}, "seq_idx of 4 tokens"),
        (
            {"cu_seq_lens_q": offsets(5, 10), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
            "restart inside a document",
        ),
    ],
)
def test_arguments_that_contradict_each_other_are_rejected(arguments: dict[str, Any], words: str) -> None:
    positions = arguments.pop("position_ids", None)
    with pytest.raises(ZebraError, match=words):
        documents_of(positions, None, (2, 5), **arguments)


def test_positions_of_padding_contradict_nothing() -> None:
    positions = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    assert documents_of(positions, PADDED, (2, 5), cu_seq_lens_q=offsets(5, 10)) is None
    assert documents_of(positions[:, 1:], PADDED, (2, 4), past=1) is None  # a chunk, with padding on the left


def test_padding_between_tokens_starts_no_document() -> None:
    """The second turn of a batched chat: behind a shorter answer stands padding, which `generate` does not count."""
    keys = torch.tensor([[0, 1, 1, 0, 0, 1, 1]], dtype=torch.bool)
    for positions in ([0, 0, 1, 0, 0, 2, 3], [1, 0, 1, 1, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]):
        assert documents_of(torch.tensor([positions]), keys, (1, 7)) is None
    packed = documents_of(torch.tensor([[0, 0, 1, 0, 0, 0, 1]]), keys, (1, 7))
    assert packed is not None
    assert packed[keys].tolist() == [0, 0, 1, 1]


def test_a_batch_with_padding_between_tokens_equals_its_tokens_alone() -> None:
    model, ids = tiny_model("llama"), tokens(1, 12)
    model.set_attn_implementation("zebra")
    mask = torch.ones_like(ids)
    mask[:, 5:8] = 0
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 0)  # as `generate` counts them
    with torch.no_grad():
        expected = model(ids[mask.bool()][None], use_cache=False).logits[0]
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
    torch.testing.assert_close(logits, expected, rtol=2e-4, atol=2e-4)


def test_documents_behind_cached_tokens_are_rejected() -> None:
    """They used to be read as one text together with the cached tokens."""
    model = tiny_model("llama")
    model.set_attn_implementation("zebra")
    ids = tokens(1, 12)
    cache = StripedCache(model.config)
    model(ids[:, :6], past_key_values=cache, use_cache=True)
    with pytest.raises(ZebraError, match="a document that starts after 6 of them"):
        model(ids[:, 6:], position_ids=torch.tensor([[6, 7, 0, 1, 2, 3]]), past_key_values=cache, use_cache=True)


# The trainers of trl


def trained(kind: str, model: Any, tokenizer: Any, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of two steps of a trainer of trl, and what they add to the weights."""
    import datasets
    import trl

    texts = [story.strip()[:300] for story in FEW_STORIES.read_text().split("<|endoftext|>")[:8]]
    steps = {"max_steps": 2, "logging_steps": 1, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant"}
    common = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    common |= {"per_device_train_batch_size": 2, "save_strategy": "no", **steps}
    columns: dict[str, list[str]] = {"text": texts}
    if kind == "dpo":
        config: Any = trl.DPOConfig(**common, max_length=128)
        columns = {"prompt": ["Once upon a time"] * 4, "chosen": texts[:4], "rejected": texts[4:]}
        cls: Any = trl.DPOTrainer
    elif kind == "grpo":
        config = trl.GRPOConfig(**common, num_generations=2, max_completion_length=12)
        columns, cls = {"prompt": [text[:40] for text in texts]}, trl.GRPOTrainer
    else:
        options = {
            "bfd": {"packing": True, "max_length": 128},
            "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
            "padding_free": {"padding_free": True, "max_length": None},
            "padded": {"max_length": 128},
        }[kind]
        config, cls = trl.SFTConfig(**common, **options), trl.SFTTrainer
    more = {"reward_funcs": lambda completions, **_: [float(len(one)) for one in completions]} if kind == "grpo" else {}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = cls(
        model=model, args=config, train_dataset=datasets.Dataset.from_dict(columns), processing_class=tokenizer, **more
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")  # a default of trl's own
@pytest.mark.parametrize("kind", ["bfd", "wrapped", "padding_free", "padded", "dpo", "grpo"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # of trl's own call
def test_a_trainer_of_trl_trains_as_under_sdpa(kind: str, tmp_path: Path) -> None:
    """A reference model is one of a checkpoint: trl reads it by its path, without what `zebra.load` was told."""
    zebra.convert(STORIES, tmp_path / "striped", "GL:33")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "striped", attn_implementation="sdpa", dtype=torch.float32)
    expected_losses, expected = trained(kind, stock, tokenizer, tmp_path / "stock")
    losses, changes = trained(kind, zebra.load(tmp_path / "striped"), tokenizer, tmp_path / "ours")
    assert len(losses) == 2
    assert losses == pytest.approx(expected_losses, rel=1e-4, abs=1e-6)
    for name, change in changes.items():
        scale = expected[name].abs().max()
        assert scale > 0
        assert (change - expected[name]).abs().max() <= 1e-3 * scale, name
