"""The prefix cache: which cache a prompt takes, what is evicted, and how many bytes are counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

import zebra
from zebra.errors import ZebraError
from zebra.model.cache import kv_bytes
from zebra.model.prefix_cache import CachedText, PrefixCache
from zebra.plan.cost import Run
from zebra.plan.decoder import read_decoder
from zebra.plan.memory import snapshot_bytes
from zebra.positions import SelfExtend
from zebra.stripes import Stripes

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "striped": {"stripes": "GLLL:9"},
    "sinks": {"stripes": "GLLL:9+4"},
    "full decode": {"stripes": "GLLL:9", "full_decode": True},
    "self-extend": {"self_extend": "2:8"},
    "striped self-extend": {"stripes": "GLLL:9", "self_extend": "2:8"},
}
Load = Callable[[str], Any]


@pytest.fixture(scope="module")
def load(checkpoints: Callable[..., Path]) -> Load:
    models: dict[str, Any] = {}

    def loaded(way: str) -> Any:
        if way not in models:
            models[way] = zebra.load(checkpoints("llama"), **WAYS[way])
        return models[way]

    return loaded


def ids(n: int, seed: int = 0, behind: Tensor | None = None) -> Tensor:
    """n random tokens, after those of another text."""
    new = torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed))
    return new if behind is None else torch.cat([behind, new])


@torch.no_grad()
def read(model: Any, text: CachedText, tokens: Tensor, end: int | None = None) -> Tensor:
    """Read the tokens that the cache does not have; return the logits of the last one."""
    return model(tokens[None, len(text) : end], past_key_values=text.cache, use_cache=True).logits[0, -1]


def store(model: Any, prefixes: PrefixCache, tokens: Tensor, *snapshots: int) -> CachedText:
    """Read a text and store its cache, with snapshots at some lengths."""
    text = prefixes.take(tokens)
    for at in snapshots:
        read(model, text, tokens, at)
        text.snapshot()
    read(model, text, tokens)
    prefixes.put(tokens, text)
    return text


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_takes_the_longest_text_that_it_shares(load: Load, way: str) -> None:
    """And logits behind it are those of a text that is read at once, whatever became of the source."""
    model = load(way)
    prefixes = PrefixCache(model, max_texts=3)
    first = ids(60)
    store(model, prefixes, first, 20, 40)
    other = ids(15, 1, behind=first[:47])
    text = prefixes.take(other)
    assert len(text) == (47 if way in ("full", "full decode") else 40)
    fresh = PrefixCache(model).take(other)
    expected = read(model, fresh, other)
    torch.testing.assert_close(read(model, text, other), expected)
    prefixes.put(other, text)
    assert len(prefixes) == 2
    longer = ids(5, 2, behind=first)
    again = prefixes.take(longer)
    assert len(again) == 60, "the source was changed"
    torch.testing.assert_close(read(model, again, longer), read(model, PrefixCache(model).take(longer), longer))


def test_a_text_within_the_window_is_cut_anywhere(load: Load) -> None:
    """Between its sinks too."""
    model, first = load("sinks"), ids(8)
    for common in (2, 6):
        prefixes = PrefixCache(model)
        store(model, prefixes, first)
        other = ids(30, 1, behind=first[:common])
        text, fresh = prefixes.take(other), PrefixCache(model).take(other)
        assert len(text) == common
        torch.testing.assert_close(read(model, text, other), read(model, fresh, other))


@pytest.mark.parametrize("way", WAYS)
def test_bytes_are_those_of_storage_and_a_snapshots_are_planned(
    load: Load, way: str, checkpoints: Callable[..., Path]
) -> None:
    model, options = load(way), WAYS[way]
    run = {
        "decoder": read_decoder(str(checkpoints("llama"))),
        "stripes": Stripes.parse(options["stripes"]) if "stripes" in options else None,
        "self_extend": SelfExtend.parse(options["self_extend"]) if "self_extend" in options else None,
        "full_decode": options.get("full_decode", False),
        "dtype": "float32",
    }
    for length in (3, 8, 9, 40):
        prefixes = PrefixCache(model)
        text = prefixes.take(ids(length))
        read(model, text, ids(length))
        text.snapshot()
        planned = snapshot_bytes(Run(**run, length=length))
        assert kv_bytes(tail for tails in text.snapshots.values() for tail in tails) == planned
        prefixes.put(ids(length), text)
        assert prefixes.kv_bytes() == text.cache.kv_bytes() + planned


def test_the_least_recently_used_go_by_number_and_by_bytes(load: Load) -> None:
    model = load("striped")
    prefixes = PrefixCache(model, max_texts=2)
    texts = [ids(30, seed) for seed in range(3)]
    for one in texts[:2]:
        store(model, prefixes, one)
    prefixes.put(texts[0], prefixes.take(ids(1, 9, behind=texts[0])))
    store(model, prefixes, texts[2])
    lengths = [len(prefixes.take(ids(1, 9, behind=one))) for one in texts]
    assert lengths == [30, 0, 30]
    assert len(prefixes) == 0, "what was taken whole left the store"

    size = store(model, PrefixCache(model), texts[0]).cache.kv_bytes()
    prefixes = PrefixCache(model, max_texts=9, max_bytes=2 * size)
    for one in texts:
        store(model, prefixes, one)
        assert prefixes.kv_bytes() <= 2 * size
    assert len(prefixes) == 2
    tiny = PrefixCache(model, max_bytes=size - 1)
    store(model, tiny, texts[0])
    assert (len(tiny), tiny.kv_bytes()) == (0, 0)


def test_what_would_go_next_is_cut_and_not_copied(load: Load) -> None:
    model = load("striped")
    first = ids(40)
    for most, stored in ((1, 0), (2, 1)):
        prefixes = PrefixCache(model, max_texts=most)
        store(model, prefixes, first, 20)
        assert len(prefixes.take(ids(5, 1, behind=first[:30]))) == 20
        assert len(prefixes) == stored


def test_a_longer_text_replaces_its_beginning(load: Load) -> None:
    model = load("full")
    prefixes = PrefixCache(model, max_texts=5)
    store(model, prefixes, ids(20))
    text = prefixes.take(ids(10))  # copied, and read again to the same tokens and on
    longer = ids(5, 1, behind=ids(20))
    read(model, text, longer)
    prefixes.put(longer, text)
    assert len(prefixes) == 1


def test_an_equal_prompt_reads_its_last_token(load: Load) -> None:
    for way, cached in (("full", 29), ("striped", 20)):
        prefixes = PrefixCache(load(way))
        store(load(way), prefixes, ids(30), 20)
        assert len(prefixes.take(ids(30))) == cached


def test_snapshots_are_bounded_and_the_smallest_gap_goes(load: Load) -> None:
    model = load("striped")
    text, tokens = PrefixCache(model).take(ids(200)), ids(200)
    lengths = []
    for at in (20, 50, 55, 90, 130, 133, 180):
        read(model, text, tokens, at)
        text.snapshot(most=4)
        lengths.append(sorted(text.snapshots))
    assert lengths[3:] == [[20, 50, 55, 90], [20, 55, 90, 130], [20, 55, 90, 133], [55, 90, 133, 180]]


def test_layers_that_are_none_of_ours_are_never_cut(load: Load) -> None:
    model = load("striped")
    prefixes = PrefixCache(model)
    text = store(model, prefixes, ids(30), 20)
    text.cache.layers[1] = DynamicLayer()
    text.cache.layers[1].update(*torch.zeros(2, 1, 2, 30, 8))
    text.snapshot()
    assert list(text.snapshots) == [20]
    assert len(prefixes.take(ids(5, 1, behind=ids(30)[:25]))) == 0


@pytest.mark.parametrize("bounds", [{"max_texts": 0}, {"max_bytes": -1}])
def test_bounds_that_store_nothing_are_refused(load: Load, bounds: dict[str, int]) -> None:
    with pytest.raises(ZebraError, match="max_texts must be at least 1"):
        PrefixCache(load("full"), **bounds)
