"""Training from scratch: what a run leaves, resume, the tokenizer, Muon, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, STORIES, TEXT, changed, losses, tiny_model
from test_adapt import RUN_FILES, names
from transformers import AutoModelForCausalLM, AutoTokenizer

import zebra
import zebra.study.model  # registers the decoder of the study
from zebra import ZebraError
from zebra.data.needles import SampleGenerator
from zebra.evaluate.retrieval import retrieval
from zebra.model.attention import NAME
from zebra.model.checkpoint import read_local_attention
from zebra.model.local import LocalAttention
from zebra.results import Result, read_results
from zebra.train import saves, texts, trainer
from zebra.train.dry_run import dry_run
from zebra.train.muon import MuonWithAdamW
from zebra.train.pretrain import config_of, pretrain, random_model
from zebra.train.recipe import NewTokenizer, PretrainRecipe
from zebra.train.tokenizer import END, tokenizer_texts, train_tokenizer

STEPS = 6
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("text") / "few.txt"
    where.write_text(END.join((TEXT / "tinystories_test.txt").read_text().split(END)[:30]))
    return where


def recipe(run: Path, text: Path, **changes: Any) -> PretrainRecipe:
    tree: dict[str, Any] = {
        "run": str(run),
        "model": {"model_type": "llama", **TINY},
        "tokenizer": {"vocab_size": 400, "digits": 2},
        "data": {
            "files": [str(text)],
            "separator": END,
            "join": True,
            "held_out": 0.2,
            "recall": {"share": 0.5, "first": 192},
        },
        "train": {"length": 256, "max_steps": STEPS, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2},
        "evaluate": {"length": 256, "join": True},
    }
    return PretrainRecipe.model_validate(changed(tree, changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, few: Path) -> tuple[Path, list[Result]]:
    run = tmp_path_factory.mktemp("pretrain") / "run"
    return run, pretrain(recipe(run, few))


def test_a_run_leaves_a_checkpoint_for_plain_transformers(finished: tuple[Path, list[Result]]) -> None:
    run, rows = finished
    assert names(run) == RUN_FILES - {"before.jsonl"} | {"tokenizer"}
    plain, ours = AutoModelForCausalLM.from_pretrained(run / "model"), zebra.load(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("Once upon a time there was a key, 12345.", return_tensors="pt").input_ids
    torch.testing.assert_close(plain(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)
    config = plain.config
    assert (config.vocab_size, config.max_position_embeddings, config.use_cache) == (400, 256, True)
    assert config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(END)
    card = json.loads((run / "model" / "zebra.json").read_text())
    assert (card["source"], card["steps"], card["tokens"]) == (None, STEPS, STEPS * 256)
    assert read_results(run / "results.jsonl") == rows
    assert len(losses(rows)) == STEPS
    assert losses(rows)[-1] < losses(rows)[0]
    assert {row.model for row in rows if row.metric == "perplexity"} == {str(run / "model")}


def test_a_finished_run_is_not_run_again(
    finished: tuple[Path, list[Result]], few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rows = finished
    monkeypatch.setattr("zebra.train.run.run_trainer", lambda *_: pytest.fail("trained again"))
    assert pretrain(recipe(run, few)) == rows
    with pytest.raises(ZebraError, match=r"another recipe: data\.recall\.share differ"):
        pretrain(recipe(run, few, data__recall={"share": 0.25, "first": 192}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_resumes_to_the_same_weights(
    optimizer: str, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def training_recipe(name: str, **changes: Any) -> PretrainRecipe:
        return recipe(tmp_path / name, few, train__optimizer=optimizer, evaluate=None, data__held_out=None, **changes)

    whole = pretrain(training_recipe("whole"))
    shown = trainer._ShowProgress.on_log

    def interrupt(self: Any, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        shown(self, args, state, control, logs, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer._ShowProgress, "on_log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain(training_recipe("cut"))
    assert not (tmp_path / "cut" / "model").exists()
    resumed = pretrain(training_recipe("cut", train__save_steps=3, train__save_total_limit=3))
    assert {path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()} == {
        f"checkpoint-{step}" for step in (2, 3, 6)
    }
    assert losses(resumed) == losses(whole)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_stripes_a_given_tokenizer_and_a_narrow_dtype(few: Path, tmp_path: Path) -> None:
    training_recipe = recipe(
        tmp_path / "run",
        few,
        model={"model_type": "qwen3", "head_dim": 16, **TINY},
        stripes="GL:33",
        tokenizer=str(STORIES),
        dtype="bfloat16",
        train__max_steps=2,
        data__recall=None,
        data__held_out=None,
        evaluate=None,
    )
    rows = pretrain(training_recipe)
    assert {row.layout for row in rows if row.task == "train"} == {"GL:33"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.config.vocab_size == 512
    assert model.dtype == torch.bfloat16
    assert (tmp_path / "run" / "model" / "tokenizer.json").exists()


def test_the_first_weights_follow_from_the_seed(few: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    config = config_of(recipe(tmp_path, few, tokenizer=str(STORIES)), tokenizer)
    one, same, other = (random_model(config, seed=seed).state_dict() for seed in (1, 1, 2))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert one[name].std().item() == pytest.approx(config.initializer_range, rel=0.1)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model_type": ({"model": {"model_type": "llamma"}}, r"no model_type 'llamma'; did you mean llama\?"),
    "field": (
        {"model": {"model_type": "llama", "hiden_size": 8}},
        r"llama has no field hiden_size; did you mean hidden_size\?",
    ),
    "family": ({"model": {"model_type": "bert"}}, "bert"),
    "sizes": ({"model": {"model_type": "llama", **TINY, "num_attention_heads": 5}}, "not a valid llama"),
    "positions": (
        {"model": {"model_type": "llama", **TINY, "max_position_embeddings": 64}},
        "max_position_embeddings must be at least train.length, 256; got 64",
    ),
    "vocabulary": (
        {"model": {"model_type": "llama", **TINY, "vocab_size": 500}},
        "vocab_size must be that of the tokenizer, 400; got 500",
    ),
    "tokenizer": ({"tokenizer": "nowhere/at/all"}, "tokenizer of nowhere/at/all cannot be read"),
    "merges": ({"tokenizer": {"vocab_size": 50_000}}, "the text yields only .* but tokenizer.vocab_size is"),
    "batch": ({"train__per_device_train_batch_size": 500}, "fewer than the 500 of one step"),
    "row": ({"train__length": 200_000}, "fewer than one sequence of 200,000"),
    "first": ({"data__recall": {"share": 0.5, "first": 20}}, "recall.first must be at least .* got 20"),
    "question": ({"evaluate__length": 40, "evaluate__recall": 1}, "with one question requires .* got 40"),
    "stripes": ({"stripes": "GL:0"}, "window"),
    "group": ({"stripes": "GLL:32"}, "groups of 3 layers, but the model has only 2"),
    "window": ({"stripes": "GL:300"}, "window of 300 tokens is longer than train.length, 256"),
    "kinds twice": (
        {"model": {"model_type": "zebra_study", **TINY, "attention_kinds": ["global"] * 2}, "stripes": "GL:32"},
        "attention_kinds and stripes cannot both be set",
    ),
    "heads": (
        {"model": {"model_type": "zebra_study", **TINY, "num_key_value_heads": 3}},
        "num_key_value_heads must divide num_attention_heads; got 3 and",
    ),
    "no heads": (
        {"model": {"model_type": "zebra_study", **TINY, "num_attention_heads": 0}},
        "num_attention_heads must be from 1 to 100,000; got 0",
    ),
}


def test_a_mixture_that_repeats_a_text_shorter_than_a_step_is_refused(few: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(few.read_text()[:4000])
    sources = [{"name": "short", "files": [str(text)], "share": 1.0}]
    changes = {
        "data": {"sources": sources},
        "train__per_device_train_batch_size": 20,
        "tokenizer": str(STORIES),
        "evaluate": None,
    }
    with pytest.raises(ZebraError, match="fewer than the 20 of one step"):
        pretrain(recipe(tmp_path / "run", few, **changes))


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_trained_is_refused_and_nothing_is_left(what: str, few: Path, tmp_path: Path) -> None:
    changes, message = REFUSED[what]
    with pytest.raises((ZebraError, ValueError), match=message):
        pretrain(recipe(tmp_path / "run", few, **changes))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_with_step_and_rate(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = texts.summed_loss
    calls: list[int] = []

    def spoilt(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*arguments, **options) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(texts, "summed_loss", spoilt)
    with pytest.raises(
        ZebraError, match=r"not finite at step 4, at a learning rate of .*finite checkpoint is .*step 2"
    ):
        pretrain(recipe(tmp_path / "run", few, evaluate=None, data__held_out=None))
    assert not (tmp_path / "run" / "model").exists()


def test_weights_that_are_not_finite_are_not_saved_as_good_and_the_rate_is_that_of_their_step(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    mark, state = saves.Saves(2), SimpleNamespace(global_step=3)
    mark.on_pre_optimizer_step(None, state, None, optimizer=optimizer)  # type: ignore[arg-type]
    optimizer.param_groups[0]["lr"] = 0.125  # the schedule goes on before the save
    with torch.no_grad():
        model.weight[0, 0] = float("inf")
    with pytest.raises(
        ZebraError, match=r"the weights are not finite at step 3, at a learning rate of 0\.25\. No check"
    ):
        mark.on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None, model=model)  # type: ignore[arg-type]


def test_the_example_finds_what_it_was_taught_to_find() -> None:
    example = ROOT / "examples" / "retrieval-2.2M"
    model, tokenizer = zebra.load(example, dtype=torch.float32), AutoTokenizer.from_pretrained(example)
    for task in ("passkey", "multikey", "lookup"):
        samples = SampleGenerator(tokenizer).samples(task, length=256, depth=0.5, count=10, seed=1)
        assert sum(retrieval(model, tokenizer, samples)) >= 9


# The tokenizer


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_a_tokenizer_writes_equal_numbers_equally(digits: int, few: Path, tmp_path: Path) -> None:
    training_recipe = recipe(tmp_path, few, tokenizer={"vocab_size": 600, "digits": digits})
    assert isinstance(training_recipe.tokenizer, NewTokenizer)
    tokenizer = train_tokenizer(tokenizer_texts(training_recipe), training_recipe.tokenizer)
    assert len(tokenizer) == 600
    text = "The key 12345 is 98765: 12345.\n\n  Naïve “quotes”, 7 tabs\tand € too."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    pieces = [tokenizer.tokenize(f"{before} 12345{behind}") for before in ("A", "word:") for behind in (".", ", 1", "")]
    numbers = [[piece for piece in one if piece.strip("Ġ").isdigit()][:3] for one in pieces]
    assert numbers[1:] == numbers[:-1]
    assert max(len(piece.strip("Ġ")) for one in numbers for piece in one) <= digits


def test_a_tokenizer_is_not_trained_on_the_letters_of_one_text() -> None:
    with pytest.raises(ZebraError, match="a list of texts; got one text of 3 characters"):
        train_tokenizer("abc", NewTokenizer(vocab_size=600))


def test_a_tokenizer_is_the_same_for_every_seed(few: Path, tmp_path: Path) -> None:
    """In a grid the first cell's recipe trains it for all."""
    settings = {"tokenizer": {"vocab_size": 600}, "data__recall": {"share": 0.5, "first": 200}}
    texts = [[*tokenizer_texts(recipe(tmp_path, few, train__seed=seed, **settings))] for seed in (0, 1)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 1


# Muon


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    model = tiny_model("llama")
    optimizer = MuonWithAdamW(model, lr=0.01, betas=(0.9, 0.95), weight_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, tables, vectors = (
        {names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups
    )
    assert matrices | tables | vectors == set(names.values())
    assert all("proj" in name for name in matrices)
    assert all("embed" in name or "lm_head" in name for name in tables)
    assert all("norm" in name for name in vectors)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 1.0 if name in vectors else 1 - 0.01 * 0.5  # as under the Trainer's AdamW
        assert torch.allclose(parameter, decay * before[name])


def test_steps_of_muon_are_its_formula() -> None:
    """0.2 sqrt(max(rows, columns)) U Vᵀ of the momentum, as far as torch's five iterations come."""
    model = tiny_model("llama", attn_implementation=NAME)
    optimizer = MuonWithAdamW(model, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    weight = dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"]
    momentum = torch.zeros_like(weight)
    for seed in range(2):
        ids = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert weight.grad is not None
        momentum = 0.95 * momentum + 0.05 * weight.grad
        before = weight.detach().clone()
        optimizer.step()
    u, _, v = torch.linalg.svd(0.95 * momentum + 0.05 * weight.grad, full_matrices=False)
    moved = (before - weight.detach()) / (0.01 * 0.2 * max(weight.shape) ** 0.5)
    along = (u.T @ moved @ v.T).diagonal()
    assert along.min() > 0.3  # the formula's 1, between 0.7 and 1.2 by five iterations in bfloat16
    assert along.max() < 1.4
    assert (moved - u @ along.diag() @ v).abs().max() < 0.1


def test_a_dry_run_counts_what_is_trained(finished: tuple[Path, list[Result]], few: Path) -> None:
    run, _ = finished
    plain = AutoModelForCausalLM.from_pretrained(run / "model")
    estimate = dry_run(recipe(run, few))
    assert estimate.memory["weights"] == 4 * sum(p.numel() for p in plain.parameters())
    assert estimate.memory["AdamW"] == 2 * estimate.memory["weights"]
    state = MuonWithAdamW(plain, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    plain(torch.arange(40)[None], labels=torch.arange(40)[None]).loss.backward()
    state.step()
    moments = [moment for part in state.parts for one in part.state.values() for moment in one.values() if moment.ndim]
    with_muon = dry_run(recipe(run, few, train__optimizer="muon"))
    assert with_muon.memory["Muon and AdamW"] == sum(moment.numel() * 4 for moment in moments)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_model_of_the_study_is_trained(optimizer: str, few: Path, tmp_path: Path) -> None:
    """Its kinds and positions are in the recipe's `model`, in the rows, and in the checkpoint that is left."""
    study = {
        "model_type": "zebra_study",
        **TINY,
        "attention_kinds": ["global", "summary"],
        "position_embedding": "absolute",
        "sliding_window": 32,
        "summary_block": 16,
    }
    train = {"max_steps": 2, "optimizer": optimizer}
    training_recipe = recipe(tmp_path / "run", few, **{f"train__{name}": value for name, value in train.items()})
    training_recipe = training_recipe.model_copy(update={"model": study})
    rows = pretrain(training_recipe)
    assert {row.layout for row in rows} == {"GS:32/16 absolute", "full"}
    pairs = {row.layout: row.value for row in rows if row.metric == "attention_pairs"}
    seen = sum(min(i + 1, 32) + max(0, i + 1 - 32) // 16 for i in range(256))
    assert pairs == {"full": 256 * 257, "GS:32/16 absolute": 256 * 257 // 2 + seen}
    model = zebra.load(tmp_path / "run" / "model")
    assert model.config.attention_kinds == study["attention_kinds"]
    first = random_model(model.config, seed=training_recipe.train.seed).state_dict()
    assert all(not torch.equal(first[name], tensor) for name, tensor in model.state_dict().items() if "proj" in name)
    estimate = dry_run(training_recipe).facts
    assert estimate["positions"] == "absolute"
    assert estimate["layout"] == "GS:32/16 absolute, 1 global, 0 local and 1 summary layers"


def test_sinks_are_trained_with_from_the_first_step(few: Path, tmp_path: Path) -> None:
    train = {"train__max_steps": 2, "data__recall": None, "evaluate": None}
    rows = pretrain(recipe(tmp_path / "sinks", few, stripes="GL:33+2", **train))
    assert {row.layout for row in rows} == {"GL:33+2", "full"}
    assert read_local_attention(tmp_path / "sinks" / "model") == LocalAttention(2)
    assert losses(rows) != losses(pretrain(recipe(tmp_path / "without", few, stripes="GL:33", **train)))
