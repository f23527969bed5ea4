"""A proof must be able to fail: every check of `verify` is broken once and must say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_MEMBER, FAMILIES, STORIES, fitting, tiny_model
from safetensors.torch import load_file, save_file

import zebra
from zebra import ZebraError
from zebra.model import attention, cache_layers, opaque_layers
from zebra.model.self_extend import layer as extension
from zebra.model.verify import Check


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    return zebra.convert(STORIES, tmp_path / "out", "GLLL:16")


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["L:5", "2:33", "GL:1"])
def test_layouts_pass(family: str, layout: str, checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    zebra.convert(checkpoints(family), tmp_path / "out", layout)
    assert failed(zebra.verify(tmp_path / "out", against=checkpoints(family))) == set()


@pytest.mark.parametrize(
    ("member", "tied"),
    [
        pytest.param(member, tied, marks=pytest.mark.full if tied and member != "llama" else ())
        for member in EVERY_MEMBER
        for tied in (False, True)
    ],
)
def test_every_row_of_the_family_table_passes(
    member: str, tied: bool, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """Four query heads over two key-value heads, tied and untied."""
    source = checkpoints(member, tie_word_embeddings=tied)
    zebra.convert(source, tmp_path / "out", fitting(member, "GLLL:16"))
    checks = zebra.verify(tmp_path / "out", against=source)
    # The stock cache is not part of a check; of plain transformers only whole forwards are.
    assert failed(checks) == set()
    assert [c.name for c in checks][:2] == ["short", "long, plain"]
    assert checks[0].difference == 0


@pytest.mark.parametrize("member", ["qwen3_moe", "olmo2"])
def test_biases_in_the_attention_of_these_families_are_kept(
    member: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """The target's field of the same name is one that its class reads. New biases are 0, so they are drawn."""
    model = tiny_model(member, attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "source")
    zebra.convert(tmp_path / "source", tmp_path / "out", "GL:16")
    checks = zebra.verify(tmp_path / "out", against=tmp_path / "source")
    assert failed(checks) == set()
    assert checks[0].difference == 0


def test_a_real_checkpoint_passes_in_bfloat16_too(converted: Path) -> None:
    assert failed(zebra.verify(converted, against=STORIES, dtype=torch.bfloat16)) == set()


def test_a_source_with_a_window_of_its_own(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """Short inputs are those inside both windows; the oracle replaces the source's window."""
    source = checkpoints("mistral", sliding_window=12)
    zebra.convert(source, tmp_path / "out", "GL:20")
    assert failed(zebra.verify(tmp_path / "out", against=source)) == set()


def test_a_wrong_weight_fails_even_short(converted: Path) -> None:
    tensors = load_file(converted / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name] * 1.01
    (converted / "model.safetensors").unlink()  # a hard link to the source
    save_file(tensors, converted / "model.safetensors", metadata={"format": "pt"})
    assert {"short", "long, plain", "long, zebra"} <= failed(zebra.verify(converted, against=STORIES))


def test_attention_of_one_key_too_many_fails(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention.attend

    def wide(q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        if mask.window is not None:
            mask = type(mask)(mask.window + 1, mask.keys, mask.documents)
        return real(q, k, v, mask, **kwargs)

    monkeypatch.setattr(attention, "attend", wide)
    assert "long, zebra" in failed(zebra.verify(converted, against=STORIES))


def test_attention_blind_to_padding_fails(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention.attend
    monkeypatch.setattr(
        attention, "attend", lambda q, k, v, mask, **kw: real(q, k, v, type(mask)(mask.window, None, None), **kw)
    )
    assert failed(zebra.verify(converted, against=STORIES)) == {"padded left"}


def test_a_cache_that_keeps_too_little_fails(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def last(self: Any, states: Any, count: int) -> Any:
        return states[:, :, max(0, states.shape[-2] - (count - 1)) :]

    monkeypatch.setattr(cache_layers.GrowingBuffer, "last", last)
    assert failed(zebra.verify(converted, against=STORIES)) == {"cached", "chunked"}


def test_nan_is_not_equal() -> None:
    assert not Check("x", "y", float("nan"), 1.0, 1).passed


def test_refusals(converted: Path, checkpoints: Callable[..., Path]) -> None:
    with pytest.raises(ZebraError, match="no stripes to verify"):
        zebra.verify(STORIES, against=STORIES)
    with pytest.raises(ZebraError, match="different models: vocab_size is 512 and 97"):
        zebra.verify(converted, against=checkpoints("llama"))
    with pytest.raises(ZebraError, match="larger than the window of 16; got 10"):
        zebra.verify(converted, against=STORIES, length=10)


# Self-Extend


def test_self_extend_is_verified_without_a_source(checkpoints: Callable[..., Path]) -> None:
    checks = zebra.verify(checkpoints("phi"), self_extend="4:16")
    assert failed(checks) == set()
    assert [c.name for c in checks] == [
        *("short, self-extend 4:16", "long", "cached", "chunked", "padded left", "padded right", "packed"),
    ]
    assert checks[0].difference == 0


def test_self_extend_is_compared_with_the_angles_of_transformers() -> None:
    """In float64 nothing but their cosines is float32's."""
    for dtype, allowed in (("float32", 1e-5), ("float64", 5e-6)):
        checks = zebra.verify(STORIES, self_extend="8:16", dtype=dtype)
        assert failed(checks) == set()
        assert checks[1].tolerance == allowed
        assert checks[1].difference < (5e-7 if dtype == "float64" else 2e-6)


def test_stripes_and_self_extend_are_verified_together(converted: Path) -> None:
    checks = zebra.verify(converted, against=STORIES, self_extend="auto:1000")
    assert failed(checks) == set()
    assert len(checks) == 14


def unturned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "rotate", lambda states, rotation: states)


def no_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "grouped_query", lambda i, group, window: i // group)


def a_little_off(monkeypatch: pytest.MonkeyPatch) -> None:
    real = extension.rotate
    monkeypatch.setattr(extension, "rotate", lambda states, rotation: real(states, rotation) * (1 + 3e-5))


def leaking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "documents_of", lambda *arguments, **options: None)


def padding_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        extension, "_document_start", lambda positions, mask, total, offset: torch.zeros(1, 1, dtype=torch.long) - 5
    )


def short_near(monkeypatch: pytest.MonkeyPatch) -> None:
    write = opaque_layers.SelfExtendLayer.write

    def broken(self: Any, exact: torch.Tensor, far: torch.Tensor) -> Any:
        near, keys = write(self, exact, far)
        return near * 0.5 if near.shape[-2] > exact.shape[-2] else near, keys

    monkeypatch.setattr(opaque_layers.SelfExtendLayer, "write", broken)


def padded_ungrouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences with padding, and no others, are grouped five positions off."""
    real = extension._document_start

    def broken(positions: Any, mask: Any, total: int, offset: Any) -> Any:
        start = real(positions, mask, total, offset)
        padded = mask.documents is None and mask.keys is not None
        return start - 5 * (~mask.keys.all(1, keepdim=True)).long() if padded else start

    monkeypatch.setattr(extension, "_document_start", broken)


def test_padded_sequences_are_verified_beyond_a_large_window(monkeypatch: pytest.MonkeyPatch) -> None:
    padded_ungrouped(monkeypatch)
    assert failed(zebra.verify(STORIES, self_extend="8:128")) == {"padded left", "padded right"}


def test_sinks_are_verified_behind_a_larger_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    striped = zebra.convert(STORIES, tmp_path / "out", "GL:200+4")
    assert failed(zebra.verify(striped, self_extend="8:64")) == set()
    real = extension.sink_query
    monkeypatch.setattr(extension, "sink_query", lambda i, group, window: real(i, group, window) + 5)
    assert "long" in failed(zebra.verify(striped, self_extend="8:64"))


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        (unturned, {"long"}),
        (no_shift, {"long"}),
        (a_little_off, {"long"}),
        (leaking, {"packed"}),
        (padding_counted, {"long"}),
        (short_near, {"cached", "chunked"}),
    ],
)
def test_a_broken_self_extend_is_seen(broken: Any, names: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    assert names <= failed(zebra.verify(STORIES, self_extend="8:16"))


def test_what_self_extend_cannot_be_verified_with_is_refused(converted: Path) -> None:
    with pytest.raises(ZebraError, match="Pass it as against"):
        zebra.verify(converted)
    with pytest.raises(ZebraError, match=r"larger than the window of Self-Extend 8:16, .* got 16"):
        zebra.verify(STORIES, self_extend="8:16", length=16)
    with pytest.raises(ZebraError, match="below the trained length"):
        zebra.verify(STORIES, self_extend="8:512")
