"""Self-Extend by its formula: one full score matrix with the distances of `relative`, from unrotated queries and keys.

    s_ij = scale * <rotated by relative(i, j) f: q_i, k_j>,    out_i = sum over visible j of softmax(s_i)_j v_j

In a local layer only sinks are far: relative(i, j) is then sink_query(i) - j.

The oracle of `zebra.model.self_extend.layer`. Both share only the frequencies and how transformers rounds angles. The
formula has no near and far parts, no second rotation, no merge and no cache, and computes in float64. All position ids
are 0, so that queries and keys arrive as they were before the rope.
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
from zebra.model.context import context_length
from zebra.model.override import overriding_attention
from zebra.model.self_extend.probe import AttentionLayer, attention_layers
from zebra.positions import SelfExtend, grouped_key, grouped_query, relative, sink_query

_SCORES_AT_A_TIME = 1 << 23


class FormulaAttention:
    """An override that computes one layer by the formula; without a setting, causal attention with the layer's rope."""

    def __init__(self, layer: AttentionLayer, setting: SelfExtend | None, trained: int):
        self.layer, self.trained = layer, trained
        self.setting = setting if layer.rope is not None else None

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
        """As `AttentionOverride.attend`, over a whole text without padding; packed documents are not kept apart.

        Args:
            q: (B, H, N, D). k, v: (B, K, N, D).
        """
        assert positions is not None
        assert not positions.any()
        assert not any(kwargs.values())
        n, step = q.shape[2], max(1, _SCORES_AT_A_TIME // (q.shape[0] * q.shape[1] * q.shape[2]))
        group = q.shape[1] // k.shape[1]
        keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
        each = torch.arange(n, device=q.device)
        outs, lses = [], []
        for start in range(0, n, step):
            end = start + step  # later keys are not visible
            i, j = each[start:end, None], each[None, :end]
            queries = q[:, :, start:end].double()
            if self.layer.window is None and self.setting is not None and self.setting.log_scale:
                queries = queries * self.setting.query_scale(i, self.trained)
            scores = self._products(queries, keys[:, :, :end], i, j) * (q.shape[-1] ** -0.5 if scale is None else scale)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            visible = masks.causal(i, j)
            if self.layer.window is not None:
                visible &= masks.within(i, j, self.layer.window) | masks.sink(j, 0, self.layer.sinks)
            scores = scores.masked_fill_(~visible, -math.inf)
            outs.append(scores.softmax(dim=-1) @ values[:, :, :end])
            lses.append(scores.logsumexp(dim=-1))
        return torch.cat(outs, dim=2).to(q.dtype), torch.cat(lses, dim=2)

    def _products(self, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """In the plane of a frequency f:  (q1 k1 + q2 k2) cos(d f) + (q1 k2 - q2 k1) sin(d f)."""
        if self.layer.frequencies is None:
            return q @ k.mT
        distance, positions = i - j, (i, j)
        if self.setting is not None:
            group, window = self.setting.group, self.setting.window
            if self.layer.window is None:
                near = i - j < window
                far_distance = relative(i, j, group, window)
                far_positions = grouped_query(i, group, window), grouped_key(j, group)
            else:  # far keys are sinks
                near = i - j < self.layer.window
                far_positions = sink_query(i, group, window), j
                far_distance = far_positions[0] - j
            distance = torch.where(near, distance, far_distance)
            positions = torch.where(near, i, far_positions[0]), torch.where(near, j, far_positions[1])
        size = len(self.layer.frequencies)
        products = q[..., 2 * size :] @ k[..., 2 * size :].mT
        for r, frequency in enumerate(self.layer.frequencies.float()):
            # How much transformers' angles, which are float32 in any dtype, differ from p f.
            at_query, at_key = ((p.float() * frequency).double() - p * frequency.double() for p in positions)
            angle = distance.clamp(min=0) * frequency.double() + at_query - at_key
            q1, q2 = q[..., r, None], q[..., r + size, None]
            k1, k2 = k[..., None, :, r], k[..., None, :, r + size]
            products += (q1 * k1 + q2 * k2) * angle.cos() + (q1 * k2 - q2 * k1) * angle.sin()
        return products


@contextmanager
def formula_logits(model: PreTrainedModel, setting: SelfExtend | None) -> Iterator[Callable[..., Tensor]]:
    """Yield a function from tokens (B, N) to logits (B, N, V), with every layer computed by the formula."""
    trained = context_length(model.config) or 0
    with ExitStack() as stack:
        for layer in attention_layers(model, local=True):
            stack.enter_context(overriding_attention([layer.module], FormulaAttention(layer, setting, trained)))

        @torch.no_grad()
        def logits(ids: Tensor, **kwargs: Any) -> Tensor:
            output: Tensor = model(ids, position_ids=torch.zeros_like(ids), use_cache=False, **kwargs).logits
            return output

        yield logits
