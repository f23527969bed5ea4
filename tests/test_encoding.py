"""Worker processes: the same tokens for any number of them, and what a failure or a kill of one or of all leaves."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer

from zebra.data import corpus as module
from zebra.data.corpus import Corpus, read_corpus
from zebra.data.encoding import Encoder, encode_batches
from zebra.errors import ZebraError

# Without conftest: a worker imports this module, and should not wait for torch.
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STORIES = EXAMPLES / "stories260K"
STORY = EXAMPLES / "text" / "tinystories_validation.txt"
DEFINITION = (STORIES / "tokenizer.json").read_text()
SEPARATOR = "<|endoftext|>"


def letters(texts: list[str]) -> list[list[int]]:
    """Characters as tokens; some texts make the worker fail or die."""
    if "raise" in texts:
        raise ValueError("no such letter")
    if "die" in texts:
        os.kill(os.getpid(), signal.SIGKILL)
    return [[ord(letter) for letter in text] for text in texts]


def encoder_of(definition: Tokenizer, specials_as_text: bool = False) -> Encoder:
    """The encoder of a tokenizer of transformers, which would take a second to import."""
    tokenizer = SimpleNamespace(
        backend_tokenizer=definition, split_special_tokens=specials_as_text, eos_token_id=2, special_tokens_map={}
    )
    return Encoder.of(tokenizer)


def test_an_encoder_is_the_tokenizer_of_transformers() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    texts = [*STORY.read_text().split(SEPARATOR)[:20], "naïve 文字 <s> </s> \n\n  x", ""]
    encoder = Encoder.of(tokenizer)
    assert encoder.encode(texts) == tokenizer(texts, verbose=False)["input_ids"]
    assert pickle.loads(pickle.dumps(encoder)).encode(texts) == encoder.encode(texts)
    split = encoder_of(tokenizer.backend_tokenizer, specials_as_text=True)
    assert (
        split.encode(["<s>"]) == tokenizer(["<s>"], split_special_tokens=True)["input_ids"] != encoder.encode(["<s>"])
    )
    assert split.digest != encoder.digest
    assert (encoder.append, Encoder.of(tokenizer, append_eos=True).append) == (None, tokenizer.eos_token_id)


def test_a_definition_that_cuts_and_pads_is_not_followed() -> None:
    tokenizer = Tokenizer.from_str(DEFINITION)
    texts = ["one", "one two three four five six"]
    expected = encoder_of(tokenizer).encode(texts)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    assert encoder_of(tokenizer).encode(texts) == expected


@pytest.mark.parametrize(
    ("batches", "append"),
    [([], None), ([["a"]], None), ([["ab", ""], ["c"], ["def", "g"], ["h"], ["i" * 300_000]], 7)],
    ids=["none", "fewer than workers", "more"],
)
def test_batches_come_back_in_their_order(batches: list[list[str]], append: int | None) -> None:
    one = list(encode_batches(batches, Encoder(letters, "t", append), 1))
    last = "" if append is None else chr(append)
    assert ["".join(map(chr, batch.tokens)) for batch in one] == ["".join(t + last for t in batch) for batch in batches]
    assert [batch.lengths for batch in one] == [[len(text + last) for text in batch] for batch in batches]
    for a, b in zip(one, encode_batches(batches, Encoder(letters, "t", append), 2), strict=True):
        assert (a.tokens.tolist(), a.lengths, a.hashes.tolist()) == (b.tokens.tolist(), b.lengths, b.hashes.tolist())


def entry(cache: Path, num_proc: int) -> tuple[Corpus, dict[str, bytes]]:
    encoder = encoder_of(Tokenizer.from_str(DEFINITION))
    corpus = read_corpus([str(STORY)], encoder, separator=SEPARATOR, num_proc=num_proc, cache=cache)
    (where,) = cache.iterdir()
    return corpus, {where.name + "/" + path.name: path.read_bytes() for path in where.iterdir()}


def test_any_number_of_workers_makes_the_same_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 5_000)
    one, written = entry(tmp_path / "one", 1)
    two, same = entry(tmp_path / "two", 2)
    assert written == same
    assert len(one) == len(two) == 200
    again, _ = entry(tmp_path / "one", 2)
    assert np.array_equal(again.tokens, one.tokens)


@pytest.mark.parametrize(
    ("last", "error", "message"),
    [("raise", ValueError, "no such letter"), ("die", ZebraError, r"worker was killed, .*\. Lower num_proc")],
)
def test_a_worker_that_fails_ends_all(tmp_path: Path, last: str, error: type[Exception], message: str) -> None:
    (tmp_path / "a.txt").write_text("a--b--c--" + last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BATCH_CHARACTERS", 1)
        with pytest.raises(error, match=message):
            read_corpus(
                [str(tmp_path / "a.txt")], Encoder(letters, "t"), separator="--", num_proc=2, cache=tmp_path / "c"
            )
    assert list((tmp_path / "c").iterdir()) == []


def test_a_text_that_cannot_be_read_ends_the_workers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{')
    with pytest.raises(ZebraError, match="line 2 is not JSON"):
        read_corpus([str(tmp_path / "a.jsonl")], Encoder(letters, "t"), num_proc=2, cache=tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


KILLED = """
import os, signal, sys, time
from zebra.data import corpus
from zebra.data.encoding import Encoder

def encode(texts):
    with open(sys.argv[3], "a") as file:
        print(os.getpid(), file=file)
    while len(set(open(sys.argv[3]).read().split())) < 2:
        time.sleep(0.02)
    if texts == ["e"]:
        os.kill(os.getppid(), signal.SIGKILL)
    return [[ord(letter) for letter in text] for text in texts]

if __name__ == "__main__":
    corpus._BATCH_CHARACTERS = 1
    corpus.read_corpus([sys.argv[1]], Encoder(encode, "t"), separator="--", num_proc=2, cache=sys.argv[2])
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_kill_leaves_no_worker_and_nothing_half_made(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("--".join("abcdefgh"))
    (tmp_path / "killed.py").write_text(KILLED)
    arguments = [tmp_path / "killed.py", tmp_path / "a.txt", tmp_path / "c", tmp_path / "pids"]
    done = subprocess.run([sys.executable, *map(str, arguments)], timeout=60, stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "c").iterdir()
    assert left.name.startswith(".")
    workers = set(map(int, (tmp_path / "pids").read_text().split()))
    assert len(workers) == 2
    until = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < until, "a worker outlives its parent"
        time.sleep(0.02)
    corpus = read_corpus(
        [str(tmp_path / "a.txt")], Encoder(letters, "t"), separator="--", num_proc=2, cache=tmp_path / "c"
    )
    assert "".join(map(chr, corpus.tokens)) == "abcdefgh"
    (entry,) = (tmp_path / "c").iterdir()
    assert entry != left
