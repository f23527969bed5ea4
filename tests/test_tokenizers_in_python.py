"""Tokenizers without a fast backend: ByT5, one token for each byte, and sentencepiece alone. Every verb serves them."""

from __future__ import annotations

import functools
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FEW_STORIES, ROOT, Zebra, refused, tiny_model
from transformers import AutoTokenizer, ByT5Tokenizer

from zebra.data.conversations import Conversation, Message
from zebra.data.encoding import Encoder, decode, encode_batches, prompt_tokens, token_spans, tokenizer_digest
from zebra.train.chat import Chat

SHORT, LONG = "Once upon a time, there was a dog.", "naïve 文字\n\n  two  spaces </s> 31061 "


def sentencepiece_tokenizer(folder: Path) -> Any:
    """One whose class exists in Python alone."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import BertGenerationTokenizer

    lines = FEW_STORIES.read_text().splitlines() + [str(n) for n in range(1000, 1300)]
    options = {"vocab_size": 350, "byte_fallback": True, "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:400]), model_prefix=str(folder / "m"), num_threads=1, **options
    )
    return BertGenerationTokenizer(str(folder / "m.model"), pad_token="<unk>")


@pytest.fixture(scope="module", params=["byt5", "sentencepiece"])
def checkpoint(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with more embeddings than its tokenizer has tokens, as padded ones have."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = ByT5Tokenizer() if request.param == "byt5" else sentencepiece_tokenizer(folder)
    path = folder / "model"
    tiny_model("llama", vocab_size=480, eos_token_id=tokenizer.eos_token_id).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_documents_are_encoded_as_the_tokenizer_does_here_and_in_workers(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert not tokenizer.is_fast
    encoder, texts = Encoder.of(tokenizer), [SHORT, LONG, "x"]
    expected = [tokenizer.encode(text) for text in texts]
    assert encoder.encode(texts) == expected
    (batch,) = encode_batches([texts], pickle.loads(pickle.dumps(encoder)), 1)
    assert batch.tokens.tolist() == [token for ids in expected for token in ids]
    assert tokenizer.eos_token_id not in prompt_tokens(tokenizer, SHORT)


def test_the_digest_is_of_what_decides_the_tokens(checkpoint: Path) -> None:
    load = functools.partial(AutoTokenizer.from_pretrained, checkpoint)
    assert tokenizer_digest(load()) == tokenizer_digest(load())
    other = load()
    other.add_tokens(["upon a time"])
    assert tokenizer_digest(other) != tokenizer_digest(load())


def test_token_spans_cover_the_text_in_order(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for text in (SHORT, LONG):
        spans = token_spans(tokenizer, text)
        assert spans[0][0] == 0
        assert len(text.rstrip()) <= spans[-1][1] <= len(text)
        assert all(one[1] == following[0] for one, following in itertools.pairwise(spans))
    assert len(token_spans(tokenizer, SHORT)) == len(tokenizer.encode(SHORT, add_special_tokens=False))
    assert token_spans(tokenizer, "") == []


def test_ids_without_a_text_are_left_out(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer.encode("Once upon", add_special_tokens=False)
    assert decode(tokenizer, [*ids, 479]) == decode(tokenizer, ids) == "Once upon"


def test_answers_are_told_apart_without_offsets(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    document = SHORT * 20
    messages = Message("user", f"{document}\nWho was there?"), Message("assistant", "The dog.")
    chat = Chat(tokenizer, "plain", "tiny")
    tokens, cut = chat.fitted(Conversation(messages, "line 1", document=document), 150)
    answer = [token for token, trained in zip(*tokens, strict=True) if trained]
    assert decode(tokenizer, answer).strip() == "The dog."
    assert answer[-1] == tokenizer.eos_token_id
    assert len(tokens.input_ids) <= 150
    assert cut > 0


@pytest.mark.parametrize("checkpoint", ["byt5", pytest.param("sentencepiece", marks=pytest.mark.full)], indirect=True)
def test_every_verb_serves_them(zebra: Zebra, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "few.txt"
    text.write_text(FEW_STORIES.read_text()[:6000])
    few = tmp_path / "questions.jsonl"
    few.write_text((ROOT / "examples" / "questions.jsonl").read_text().splitlines()[0] + "\n")
    train = {"length": 128, "max_steps": 1, "learning_rate": 1e-3}
    recipes: dict[str, Any] = {
        "adapt": {"stripes": "GLLLL:16", "data": {"files": [str(text)], "append_eos": True}},
        "tune": {"chat_template": "plain", "data": {"files": [str(tmp_path / "talk.jsonl")]}},
    }
    messages = [{"role": "user", "content": SHORT * 9}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    for verb, recipe in recipes.items():
        file = tmp_path / f"{verb}.yaml"
        file.write_text(
            yaml.safe_dump(recipe | {"run": str(tmp_path / verb), "model": str(checkpoint), "train": train})
        )
    lines = [
        f"generate {checkpoint} --prompt Once --max-new-tokens 12 --temperature 1 --seed 3",
        f"evaluate perplexity {checkpoint} {text} --length 64",
        f"evaluate retrieval {checkpoint} --task frequent-words --length 400 --samples 1 --depth 1 --haystack {text}",
        f"evaluate documents {checkpoint} {few} --length 300 --answer-tokens 8",
        f"adapt {tmp_path / 'adapt.yaml'}",
        f"tune {tmp_path / 'tune.yaml'} --set train.length=512",
        f"generate {tmp_path / 'tune' / 'model'} --chat --prompt Once --max-new-tokens 8",
    ]
    for line in lines:
        done = zebra(*line.split())
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_a_package_that_a_tokenizer_needs_is_named(
    zebra: Zebra, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise ImportError("\nXTokenizer requires the X library but it was not found. Check out the\npage of it.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", absent)
    done = zebra("generate", checkpoint, "--prompt", "Once")
    refused(done, "XTokenizer requires the X library", "Install that package with pip.")


def test_what_a_tokenizer_lacks_is_one_whole_line(zebra: Zebra, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("generate", stories, "--prompt", "Once")
    for file in stories.glob("*token*"):
        file.unlink()
    refused(
        zebra(*line),
        "there are no tokenizer files, such as tokenizer.json or tokenizer.model. Copy them from the source.",
    )
    (stories / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")

    def absent(*_: Any, **__: Any) -> None:  # with the advice of another package
        raise ImportError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", absent)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(zebra(*line), "tokenizer.model requires the package sentencepiece, which is not installed. Install that")
