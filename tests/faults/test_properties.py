"""Properties of notations, packing and kernels over inputs that hypothesis draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import agree
from test_packing import as_lists, corpus_of

from zebra.data.packing import IGNORE, pack
from zebra.errors import ZebraError
from zebra.kernels import Mask
from zebra.model.rope import Rope
from zebra.positions import SelfExtend
from zebra.stripes import GLOBAL, Stripes

NOTATIONS: list[Any] = [Stripes, SelfExtend, Rope]
CHARACTERS = st.text("GLgl0123456789:,+-. e*xautoyrnliner\x00½\ud800", max_size=24)


@given(st.sampled_from(NOTATIONS), CHARACTERS | st.text(max_size=12))
def test_any_text_is_a_notation_or_rejected(kind: Any, text: str) -> None:
    try:
        value = kind.parse(text)
    except ZebraError:
        return
    assert kind.parse(str(value)) == value


@given(
    st.text("GL", min_size=1, max_size=9)
    | st.sets(st.integers(0, 40), min_size=1).map(lambda s: ",".join(map(str, s))),
    st.integers(1, 10**9),
    st.integers(0, 99),
    st.integers(1, 60),
)
def test_a_layout_is_what_it_prints(kinds: str, window: int, sinks: int, layers: int) -> None:
    text = f"{kinds}:{window}" + (f"+{sinks}" if sinks else "")
    try:
        stripes = Stripes.parse(text)
        types = stripes.layer_types(layers)
    except ZebraError:
        return
    assert Stripes.parse(str(stripes)) == stripes
    assert len(types) == layers
    if kinds[0] in "GL":
        assert [kind == GLOBAL for kind in types] == [kinds[i % len(kinds)] == "G" for i in range(layers)]
    else:
        assert {i for i, kind in enumerate(types) if kind == GLOBAL} == {int(i) for i in kinds.split(",")}


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(1, 24), st.booleans(), st.integers(0, 2**32))
def test_packing_loses_and_doubles_no_token(lengths: list[int], length: int, join: bool, seed: int) -> None:
    corpus = corpus_of(*lengths)
    try:
        sequences = as_lists(pack(corpus, length, join=join, seed=seed))
    except ZebraError:
        assert sum(lengths) < length
        return
    tokens = [token for one in sequences for token in one["input_ids"] if token]  # 0 pads
    assert len(tokens) == len({*tokens})
    assert len(tokens) == sum(lengths) // length * length if join else len(tokens) == sum(lengths)
    for one in sequences:
        assert all(label in (token, IGNORE) for label, token in zip(one["labels"], one["input_ids"], strict=True))
        steps = np.diff(one["position_ids"])
        assert all(step == 1 or position == 0 for step, position in zip(steps, one["position_ids"][1:], strict=True))


@st.composite
def requests(draw: st.DrawFn) -> tuple[Any, ...]:
    """Queries, keys, values and a mask, with padding or documents or neither."""
    batch, heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    keys = draw(st.integers(1, 150))
    queries = draw(st.integers(1, keys))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    q = torch.randn(batch, heads * group, queries, 8, dtype=torch.float64, generator=generator) * 2
    k, v = torch.randn(2, batch, heads, keys, 8, dtype=torch.float64, generator=generator)
    kind, real, documents = draw(st.sampled_from(["", "padding", "documents"])), None, None
    if kind == "padding":
        left = torch.tensor([draw(st.integers(0, keys - 1)) for _ in range(batch)])
        real = torch.arange(keys) >= left[:, None]
    elif kind == "documents":
        documents = (torch.rand(batch, keys, generator=generator) < draw(st.floats(0, 0.5))).cumsum(dim=1)
    window = draw(st.none() | st.integers(1, keys + 2))
    return q, k, v, Mask(window=window, keys=real, documents=documents), draw(st.sampled_from([None, 2.5]))


@given(requests())
def test_every_kernel_is_the_formula(request: tuple[Any, ...]) -> None:
    q, k, v, mask, softcap = request
    agree(q, k, v, mask, **({} if softcap is None else {"softcap": softcap}))
