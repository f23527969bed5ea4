"""Self-Extend as its formula reads: one dense matrix of scores by `relative`, from queries and keys without a rope.

    s_ij = scale * <turned by relative(i, j) f: q_i, k_j>,    out_i = sum over visible j of softmax(s_i)_j v_j

The oracle of `zebra.model.self_extend.layer`. It shares nothing with it but the frequencies and how the host rounds
angles: no
near and far parts, no turning again, no merge, no cache, float64 inside. The host hands over queries and keys as they
were before the rope when every position is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zebra import masks
from zebra.kernels import Mask
from zebra.model.override import overriding_attention
from zebra.model.self_extend.apply import AttentionLayer, attention_layers
from zebra.positions import SelfExtend, grouped_key, grouped_query, relative

_AT_ONCE = 1 << 23
"""Scores at once."""


class Formula:
    """One layer by the formula; plain causal attention with its rope where `setting` is None."""

    def __init__(self, layer: AttentionLayer, setting: SelfExtend | None, trained: int):
        self.layer, self.trained = layer, trained
        self.setting = setting if layer.window is None and layer.rope is not None else None

    def attend(
        self,
        module: Any,
        positions: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        /,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        with_lse: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """What `attend` gives, over a whole text without padding. Packed documents are not kept apart."""
        assert positions is not None
        assert not positions.any()
        assert not any(kwargs.values())
        n, step = q.shape[2], max(1, _AT_ONCE // (q.shape[0] * q.shape[1] * q.shape[2]))
        group = q.shape[1] // k.shape[1]
        keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
        j = torch.arange(n, device=q.device)[None, :]
        outs, lses = [], []
        for start in range(0, n, step):
            i = j.T[start : start + step]
            rows = q[:, :, start : start + step].double()
            if self.setting is not None and self.setting.log_scale:
                rows = rows * self.setting.query_scale(i, self.trained)
            scores = self._products(rows, keys, i, j) * (q.shape[-1] ** -0.5 if scale is None else scale)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            visible = masks.causal(i, j)
            if self.layer.window is not None:
                visible &= masks.within(i, j, self.layer.window) | masks.sink(j, 0, self.layer.sinks)
            scores = scores.masked_fill_(~visible, -math.inf)
            outs.append(scores.softmax(dim=-1) @ values)
            lses.append(scores.logsumexp(dim=-1))
        return torch.cat(outs, dim=2).to(q.dtype), torch.cat(lses, dim=2)

    def _distance(self, i: Tensor, j: Tensor) -> Tensor:
        """What each query sees as its distance to each key; hidden keys as 0."""
        if self.setting is None:
            return (i - j).clamp(min=0)
        found: Tensor = relative(i, j, self.setting.group, self.setting.window)
        return found.clamp(min=0)

    def _places(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """Where each query and key stand for each other: their difference is the distance."""
        if self.setting is None:
            return i, j
        group, window = self.setting.group, self.setting.window
        near = i - j < window
        return torch.where(near, i, grouped_query(i, group, window)), torch.where(near, j, grouped_key(j, group))

    def _products(self, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """In the plane of a frequency f:  (q1 k1 + q2 k2) cos(d f) + (q1 k2 - q2 k1) sin(d f)."""
        if self.layer.frequencies is None:
            return q @ k.mT
        size = len(self.layer.frequencies)
        found = q[..., 2 * size :] @ k[..., 2 * size :].mT
        distance, places = self._distance(i, j), self._places(i, j)
        for r, frequency in enumerate(self.layer.frequencies.float()):
            at_query, at_key = (_rounding(place, frequency) for place in places)
            angle = distance * frequency.double() + at_query - at_key
            q1, q2 = q[..., r, None], q[..., r + size, None]
            k1, k2 = k[..., None, :, r], k[..., None, :, r + size]
            found += (q1 * k1 + q2 * k2) * angle.cos() + (q1 * k2 - q2 * k1) * angle.sin()
        return found


def _rounding(place: Tensor, frequency: Tensor) -> Tensor:
    """By what the host's angles, which are float32's in any dtype, miss p f."""
    return (place.float() * frequency).double() - place * frequency.double()


@contextmanager
def formula_logits(model: PreTrainedModel, setting: SelfExtend | None) -> Iterator[Callable[..., Tensor]]:
    """Within this context a function from tokens (B, N) to logits, every layer computed by the formula."""
    trained = model.config.get_text_config().max_position_embeddings
    with ExitStack() as stack:
        for layer in attention_layers(model, local=True):
            stack.enter_context(overriding_attention([layer.module], Formula(layer, setting, trained)))

        @torch.no_grad()
        def logits(ids: Tensor, **arguments: Any) -> Tensor:
            found: Tensor = model(ids, position_ids=torch.zeros_like(ids), use_cache=False, **arguments).logits
            return found

        yield logits
