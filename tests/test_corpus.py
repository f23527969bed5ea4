"""Text to tokens: what is found, what is cached under which key, what is refused."""

from __future__ import annotations

import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zebra.data import corpus as module
from zebra.data.corpus import Corpus, read_corpus
from zebra.data.encoding import Encoder
from zebra.errors import ZebraError
from zebra.files import user_cache_dir


class Characters:
    """Characters as tokens; counts its calls and keeps what it was given."""

    def __init__(self, add: int = 0) -> None:
        self.seen: list[str] = []
        self.batches: list[int] = []
        self.add = add

    def __call__(self, texts: list[str]) -> list[list[int]]:
        self.seen += texts
        self.batches.append(len(texts))
        return [[ord(letter) + self.add for letter in text] for text in texts]


class Never:
    def __call__(self, texts: list[str]) -> list[list[int]]:
        raise AssertionError("tokenised again")


def run(
    files: Any,
    cache: Path,
    encode: Any = None,
    tokenizer: str = "characters",
    append: int | None = None,
    **options: Any,
) -> Corpus:
    patterns = [str(files)] if isinstance(files, (str, Path)) else [str(file) for file in files]
    return read_corpus(patterns, Encoder(encode or Characters(), tokenizer, append), cache=cache, **options)


def texts(corpus: Corpus) -> list[str]:
    return ["".join(map(chr, corpus[i])) for i in range(len(corpus))]


# -- tokenising


def test_documents_become_tokens(text: Path, tmp_path: Path) -> None:
    corpus = run([text / "a.txt", text / "b.txt"], tmp_path / "c", separator="--")
    assert texts(corpus) == ["ay", "ayay", "bee"]
    assert len(corpus) == 3
    assert corpus.lengths.tolist() == [2, 4, 3]
    assert corpus.offsets.tolist() == [0, 2, 6, 9]
    assert corpus.tokens.tolist() == [ord(letter) for letter in "ayayaybee"]


def test_the_appended_token_ends_each_document(text: Path, tmp_path: Path) -> None:
    corpus = run([text / "a.txt", text / "b.txt"], tmp_path / "c", separator="--", append=33)
    assert texts(corpus) == ["ay!", "ayay!", "bee!"]
    assert texts(run(text / "b.txt", tmp_path / "c", append=0)) == ["bee\0"]


@pytest.mark.parametrize(
    ("largest", "kind"), [(65_535, np.uint16), (65_536, np.uint32), (4_000_000_000, np.uint32)], ids=str
)
@pytest.mark.parametrize("by_append", [False, True])
def test_tokens_take_two_bytes_where_they_fit(
    text: Path, tmp_path: Path, largest: int, kind: Any, by_append: bool
) -> None:
    if by_append:
        corpus = run(text / "b.txt", tmp_path / "c", append=largest)
    else:
        corpus = run(text / "b.txt", tmp_path / "c", Characters(add=largest - ord("e")))
    assert corpus.tokens.dtype == kind
    assert int(corpus.tokens.max()) == largest


def test_large_texts_are_tokenised_in_batches(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 10)
    (text / "many.txt").write_text("--".join(["abcd"] * 7 + ["x" * 50, "y"]))
    encode = Characters()
    corpus = run(text / "many.txt", tmp_path / "c", encode, separator="--")
    assert texts(corpus) == encode.seen == ["abcd"] * 7 + ["x" * 50, "y"]
    assert encode.batches == [3, 3, 2, 1]


# -- the cache


def test_the_tokens_are_found_again(text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    options = {"separator": "--", "append": 1}
    first = run(text, cache, **options)
    again = run(text, cache, Never(), **options)
    assert texts(first) == texts(again)
    assert isinstance(again.tokens, np.memmap)
    (entry,) = cache.iterdir()
    assert sorted(path.name for path in entry.iterdir()) == ["hashes.npy", "offsets.npy", "tokens.npy", "version.json"]


def test_the_same_content_elsewhere_is_found_again(text: Path, tmp_path: Path) -> None:
    run([text / "a.txt", text / "b.txt"], tmp_path / "c")
    moved = Path(shutil.copytree(text, tmp_path / "moved"))
    os.rename(moved / "a.txt", moved / "z.txt")
    os.utime(moved / "b.txt", (0, 0))
    run([moved / "z.txt", moved / "b.txt"], tmp_path / "c", Never())


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": "another"},
        {"separator": "-"},
        {"separator": None},
        {"append": 5},
        {"append": None},
        {"append": 0},
    ],
    ids=str,
)
def test_another_option_is_another_entry(text: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    cache = tmp_path / "c"
    options = {"tokenizer": "characters", "separator": "--", "append": 7}
    run(text / "a.txt", cache, **options)
    encode = Characters()
    corpus = run(text / "a.txt", cache, encode, **(options | change))
    assert encode.seen
    assert len(list(cache.iterdir())) == 2
    assert len(corpus) == (2 if (options | change)["separator"] == "--" else len(encode.seen))
    run(text / "a.txt", cache, Never(), **options)


def test_a_field_and_a_kind_of_file_are_part_of_the_key(text: Path, tmp_path: Path) -> None:
    raw = '{"text": "bee", "title": "bees"}\n'
    for name in ("r.jsonl", "r.txt"):
        (text / name).write_text(raw)
    cache = tmp_path / "c"
    assert texts(run(text / "r.jsonl", cache)) == ["bee"]
    assert texts(run(text / "r.jsonl", cache, field="title")) == ["bees"]
    assert texts(run(text / "r.txt", cache)) == [raw.strip()]
    assert len(list(cache.iterdir())) == 3


def test_changed_text_is_another_entry(text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    files = [text / "a.txt", text / "b.txt"]
    run(files, cache)
    before = (text / "b.txt").stat()
    (text / "b.txt").write_text("boo")  # of the same length and time
    os.utime(text / "b.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert texts(run(files, cache))[1] == "boo"
    assert texts(run(files[::-1], cache))[0] == "boo"  # another order
    (text / "a.txt").write_text((text / "a.txt").read_text() + "b")
    (text / "b.txt").write_text("oo")  # the same bytes end to end
    assert texts(run(files, cache))[1] == "oo"
    assert len(list(cache.iterdir())) == 4


def test_a_failure_leaves_nothing_behind(text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c"

    def broken(batch: list[str]) -> list[list[int]]:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(text / "b.txt", cache, broken)
    (text / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(ZebraError):
        run([text / "b.txt", text / "bad.txt"], cache)
    assert list(cache.iterdir()) == []
    assert texts(run(text / "b.txt", cache)) == ["bee"]


def entry_of(text: Path, tmp_path: Path) -> tuple[Path, Path]:
    cache = tmp_path / "c"
    run(text / "b.txt", cache)
    (entry,) = cache.iterdir()
    return cache, entry


def test_what_a_killed_process_left_is_not_read(text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    code = (
        "import os, sys\n"
        "from zebra.data.corpus import read_corpus\n"
        "from zebra.data.encoding import Encoder\n"
        "encoder = Encoder(lambda _: os.kill(os.getpid(), 9), 'characters')\n"
        "read_corpus([sys.argv[1]], encoder, cache=sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(text / "b.txt"), str(cache)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    (left,) = cache.iterdir()
    assert left.name.startswith(".")
    assert texts(run(text / "b.txt", cache)) == ["bee"]
    (entry,) = cache.iterdir()  # what was left is gone
    assert entry != left


def test_what_a_killed_process_of_the_same_number_left_is_not_read(text: Path, tmp_path: Path) -> None:
    """In a container every run may be process 1."""
    cache = tmp_path / "c"
    aside: list[Path] = []

    def encode(batch: list[str]) -> list[list[int]]:
        aside.extend(cache.iterdir())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(text / "b.txt", cache, encode)
    aside[0].mkdir()
    (aside[0] / "tokens.raw").write_bytes(b"\1\2\3\4" * 9)
    assert texts(run(text / "b.txt", cache)) == ["bee"]


@pytest.mark.parametrize(
    "broken", ["empty", "no offsets", "no version", "another version", "cut hashes", "cut tokens", "no header"]
)
def test_a_broken_entry_is_built_again(
    text: Path, tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, entry = entry_of(text, tmp_path)
    if broken == "empty":
        shutil.rmtree(entry)
        entry.mkdir()
    elif broken == "no offsets":
        (entry / "offsets.npy").unlink()
    elif broken == "no version":
        (entry / "version.json").unlink()
    elif broken == "another version":
        (entry / "version.json").write_text("1")
    elif broken == "cut hashes":
        np.save(entry / "hashes.npy", np.empty(0, dtype=np.uint64))
    else:
        raw = (entry / "tokens.npy").read_bytes()
        (entry / "tokens.npy").write_bytes(raw[:-2] if broken == "cut tokens" else b"")
    capsys.readouterr()
    assert texts(run(text / "b.txt", cache)) == ["bee"]
    assert capsys.readouterr().err == f"the cache entry {entry} is damaged or of another version; tokenising again.\n"
    run(text / "b.txt", cache, Never())


@pytest.mark.parametrize("change", ["more", "other", "gone", "bad", "shorter"])
def test_a_text_that_changes_while_it_is_tokenised_is_refused(text: Path, tmp_path: Path, change: str) -> None:
    """Whether or not the reader noticed: it may have read all of the old text, or a changed file."""
    cache = tmp_path / "c"
    (text / "a.txt").write_text("a" * 100)
    second = text / "b.jsonl"
    second.write_text('{"text": "bee"}\n' * 9)

    class Changing(Characters):
        def __call__(self, batch: list[str]) -> list[list[int]]:
            if change == "gone":
                second.unlink()
            else:
                contents = {
                    "more": '{"text": "bee"}\n' * 10,
                    "other": '{"text": "boo"}\n' * 9,
                    "bad": "{",
                    "shorter": "",
                }
                second.write_text(contents[change])
            return super().__call__(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BATCH_CHARACTERS", 10)
        with pytest.raises(ZebraError, match=r"b\.jsonl changed while it was tokenised\. Run again"):
            run([text / "a.txt", second], cache, Changing())
    assert list(cache.iterdir()) == []


def test_a_text_that_changes_afterwards_does_not_matter_to_its_tokens(text: Path, tmp_path: Path) -> None:
    corpus = run(text / "b.txt", tmp_path / "c")
    (text / "b.txt").write_text("other")
    shutil.rmtree(tmp_path / "c")
    assert texts(corpus) == ["bee"]


def test_the_hash_of_a_document_is_that_of_its_text(text: Path, tmp_path: Path) -> None:
    """Whatever file it stands in, at whatever place, under whatever tokenizer."""
    (text / "r.jsonl").write_text('{"text": " bee "}\n{"text": "ayay"}\n')
    plain = run([text / "a.txt", text / "b.txt"], tmp_path / "c", separator="--")
    records = run(text / "r.jsonl", tmp_path / "c", Characters(add=1), tokenizer="other", append=1)
    assert plain.hashes.dtype == np.uint64
    assert plain.hashes.tolist()[1:] == records.hashes.tolist()[::-1]
    assert len(set(plain.hashes.tolist())) == 3


def test_two_builders_of_one_entry(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process begins and ends while this one is tokenising."""
    cache = tmp_path / "c"
    pid = os.getpid()
    inner = Characters()

    def encode(batch: list[str]) -> list[list[int]]:
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: pid + 1)
            assert texts(run(text / "b.txt", cache, inner)) == ["bee"]
        return Characters()(batch)

    assert texts(run(text / "b.txt", cache, encode)) == ["bee"]
    assert inner.seen == ["bee"]
    (entry,) = cache.iterdir()
    assert not entry.name.startswith(".")


def test_a_rename_that_fails_is_an_error(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(os, "rename", failing)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(ZebraError, match=r"the token cache .* cannot be used: no\."):
        run(text / "b.txt", tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_an_entry_shows_only_when_it_is_whole(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "c"
    seen: list[set[str]] = []
    replace = os.replace

    def watching(source: Path, target: Path) -> None:
        assert not target.exists()
        seen.append({path.name for path in source.iterdir()})
        replace(source, target)

    monkeypatch.setattr(os, "rename", watching)
    monkeypatch.setattr(os, "replace", watching)
    run(text / "b.txt", cache)
    assert seen == [{"tokens.npy", "offsets.npy", "hashes.npy", "version.json"}]


def test_the_default_cache_is_the_users(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache_dir("tokens") == tmp_path / "xdg" / "zebra" / "tokens"
    read_corpus([str(text / "b.txt")], Encoder(Characters(), "t"))
    assert len(list((tmp_path / "xdg" / "zebra" / "tokens").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache_dir("tokens") == tmp_path / "home" / ".cache" / "zebra" / "tokens"


def test_a_text_that_becomes_no_token(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ZebraError, match="produces no tokens"):
        run(text / "b.txt", tmp_path / "c", lambda batch: [[] for _ in batch])


# -- joining


def corpus_of(*lengths: int) -> Corpus:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus(np.arange(offsets[-1]), offsets)


@pytest.mark.parametrize(
    ("lengths", "length", "expected"),
    [
        ([3, 3, 3, 3], 6, [6, 6]),
        ([3, 3, 3], 6, [9]),
        ([3, 3, 3, 3, 3], 6, [6, 9]),
        ([10, 1, 1, 10], 5, [10, 12]),
        ([5], 5, [5]),
        ([2, 3], 5, [5]),
        ([4, 4], 5, [8]),
        ([7, 7], 1, [7, 7]),
        ([6, 1], 6, [7]),
    ],
)
def test_neighbours_are_joined_whole(lengths: list[int], length: int, expected: list[int]) -> None:
    corpus = corpus_of(*lengths)
    joined = corpus.joined(length)
    assert joined.lengths.tolist() == expected
    assert joined.lengths.min() >= length
    assert np.concatenate([joined[i] for i in range(len(joined))]).tolist() == corpus.tokens.tolist()
    assert set(joined.offsets.tolist()) <= set(corpus.offsets.tolist())


@pytest.mark.parametrize("lengths", [[4], [2, 2], [0, 0]])
def test_less_text_than_one_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ZebraError, match=f"at least 5 tokens; all documents together have {sum(lengths)}"):
        corpus_of(*lengths).joined(5)


# -- a cache that cannot be used


@pytest.mark.parametrize("entry_first", [False, True])
def test_a_full_disk_is_one_line_that_names_the_remedy(text: Path, tmp_path: Path, entry_first: bool) -> None:
    cache = tmp_path / "c"
    if entry_first:  # of another text
        run(text / "b.txt", cache)
    before = sorted(cache.rglob("*"))
    (text / "long.txt").write_text("a" * 5000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ZebraError, match=r"the token cache .* cannot be used: File too large\. .* XDG_CACHE_HOME"):
            run(text / "long.txt", cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(cache.rglob("*")) == before


def test_nothing_is_mapped_to_be_written(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store to a mapped file on a full disk kills the process."""
    accesses: list[int] = []
    mapped = mmap.mmap

    def recording(*arguments: Any, access: int, **options: Any) -> mmap.mmap:
        accesses.append(access)
        return mapped(*arguments, access=access, **options)

    monkeypatch.setattr(mmap, "mmap", recording)
    assert texts(run(text / "b.txt", tmp_path / "c")) == ["bee"]
    assert accesses == [mmap.ACCESS_READ]


def test_a_cache_that_cannot_be_written_is_one_line_that_names_the_remedy(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ZebraError, match=r"the token cache .* cannot be used: .*\. .* XDG_CACHE_HOME"):
        run(text / "b.txt", tmp_path / "file" / "c")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ZebraError, match=r"requires a home folder, and this user has none\. .*XDG_CACHE_HOME"):
        read_corpus([str(text / "b.txt")], Encoder(Characters(), "characters"))


def test_a_damaged_entry_that_cannot_be_removed(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, entry = entry_of(text, tmp_path)
    (entry / "tokens.npy").write_bytes((entry / "tokens.npy").read_bytes()[:-2])
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **options: None)
    with pytest.raises(ZebraError, match=r"the token cache .* cannot be used: it is damaged"):
        run(text / "b.txt", cache)
