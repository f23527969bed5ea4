r"""Self-Extend (arXiv 2401.01325) in one layer of a model with a half-split rotary embedding.

    keys  0 ................ N      near \  the last W keys at their exact distance
    f f f f \ \ \                   far  f  older ones by positions that groups of G tokens share
    f f f f f \ \ \
    f f f f f f \ \ \               No distance reaches the trained length, and nothing is trained.

Keys and queries arrive rotated to the positions that transformers gave them. A second rotation, by the difference,
moves them to their grouped positions, so that no forward is changed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zebra.errors import ZebraError
from zebra.kernels import Mask
from zebra.kernels.self_extend import self_extend_attention
from zebra.kernels.sinks import NO_POSITION
from zebra.model.opaque_layers import PendingKeys
from zebra.positions import SelfExtend, grouped_key, grouped_query, sink_query

_log = logging.getLogger(__name__)

NO_POSITION_IDS = (
    "Self-Extend requires position_ids, which this model does not pass to its attention. Load it without Self-Extend."
)
Rotation = tuple[Tensor, Tensor]
"""For R frequencies (cos, cos) and (-sin, sin), each (1 or B, 1, T, 2 R)."""


def rotation_between(frequencies: Tensor, old: Tensor, new: Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation that takes vectors from the positions `old` to `new`.

    transformers computes its angles in float32, with an error of up to p 2^-24 at position p. Here they are computed in
    the same way, so that a second rotation equals one rotation to `new`, however long the text.

    Args:
        frequencies: (R).
        old: (1 or B, T). new: (1 or B, T), or (n, 1 or B, T) for n targets.

    Returns:
        Two tensors (1 or B, 1, T, 2 R), or (n, 1 or B, 1, T, 2 R).
    """
    angles = [(p.float().unsqueeze(-1) * frequencies).double() for p in (old, new)]
    angle = (angles[1] - angles[0]).unsqueeze(-3)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """`states` (B, H or K, T, D) rotated in the planes of the dimensions r and r + R < 2 R; other dimensions unchanged.

    x_r cos - x_(r + R) sin,   x_(r + R) cos + x_r sin: in few calls, as each one costs time in decoding.
    """
    cos, sin = rotation
    size = cos.shape[-1]
    rotated = states[..., :size].to(cos.dtype)
    rotated = torch.addcmul(rotated * cos, rotated.roll(size // 2, dims=-1), sin).to(states.dtype)
    return rotated if size == states.shape[-1] else torch.cat([rotated, states[..., size:]], dim=-1)


@dataclass(frozen=True)
class _Positions:
    """The positions of the T tokens of one forward pass.

    Attributes:
        original: the positions from transformers, (1 or B, T).
        padding: the mask of the keys, (B, S), or None. total: S.
        offset: `original` minus the index in the sequence, padding counted, (1 or B, 1); see `_offset`.
        document_start: the original position of the first real token of each token's document, (1 or B, 1 or T).
        query_rotation, key_rotation: the rotations to their grouped positions.
        query_scale: what the queries are multiplied by, (1 or B, 1, T, 1), or None.
    """

    original: Tensor
    padding: Tensor | None
    total: int
    offset: Tensor
    document_start: Tensor
    query_rotation: Rotation
    key_rotation: Rotation
    query_scale: Tensor | None

    @property
    def past(self) -> int:
        """The number of earlier tokens, S - T."""
        return self.total - self.original.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rotations."""
        return self.key_rotation[0].dtype


class GroupedRotation:
    """A rope that layers share, and the positions of the current forward pass, computed only in its first layer.

    The frequencies are read from the model's own buffer in every forward pass, because a conversion of the
    model (`.to(torch.bfloat16)`) rounds them.

    Args:
        rope: the model's rotary embedding.
        buffer: the name of its buffer of frequencies (R).
        setting: the group and the window.
        trained: the length that the model was trained at.
    """

    def __init__(self, rope: nn.Module, buffer: str, setting: SelfExtend, trained: int):
        self.rope, self.buffer, self.setting, self.trained = rope, buffer, setting, trained
        self._has_warned = False
        self._latest: _Positions | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_latest": None}

    def frequencies(self, device: torch.device) -> Tensor:
        """The model's frequencies (R), in float32, which transformers converts them to."""
        frequencies: Tensor = getattr(self.rope, self.buffer)
        return frequencies.to(device).float()

    def positions(
        self, position_ids: Tensor, mask: Mask, total: int, dtype: torch.dtype, *, recompute: bool
    ) -> _Positions:
        """The positions of the last T of `total` tokens: the previous layer's, unless `recompute` or inputs changed."""
        if (latest := self._latest) is not None and not recompute:
            same_inputs = latest.original is position_ids and latest.padding is mask.keys
            if same_inputs and (latest.total, latest.dtype) == (total, dtype):
                return latest
        offset = _offset(position_ids, mask.keys, total)
        if invalid := _invalid_step(position_ids, mask, total, offset):
            raise self._error(invalid)
        start = _document_start(position_ids, mask, total, offset)
        true = (position_ids - start).clamp(min=0)
        reach = self.setting.reach(self.trained)
        if not self._has_warned and total > reach and (length := int(true.max()) + 1) > reach:
            self._has_warned = True
            _log.warning(
                "a text of %s tokens is beyond the reach of Self-Extend %s, which extends this model to %s: it was not "
                "trained on larger distances. Raise the group, or use auto:%d.",
                *(f"{length:,}", self.setting, f"{reach:,}", length),
            )
        group, window = self.setting.group, self.setting.window
        scale = None
        if self.setting.log_scale:
            scale = self.setting.query_scale(true, self.trained).to(dtype)[:, None, :, None]
        grouped = torch.stack([grouped_query(true, group, window), grouped_key(true, group)])
        cos, sin = rotation_between(self.frequencies(position_ids.device), position_ids, grouped, dtype)
        rotations = (cos[0], sin[0]), (cos[1], sin[1])
        self._latest = latest = _Positions(position_ids, mask.keys, total, offset, start, *rotations, scale)
        return latest  # another thread may have replaced the attribute

    def move_query(self, query: Tensor, tokens_before: Tensor) -> Tensor:
        """As `SinkRotation.move_query`, to the positions `sink_query`; in float32 or more."""
        dtype, frequencies = torch.promote_types(query.dtype, torch.float32), self.frequencies(query.device)
        moved = sink_query(tokens_before, self.setting.group, self.setting.window)
        return rotate(query.to(dtype), rotation_between(frequencies, tokens_before, moved, dtype))

    def move_sinks(self, keys: Tensor, tokens_before: Tensor) -> Tensor:
        """As `SinkRotation.move_sinks`: the rotation of `move_query`, inverted."""
        dtype, frequencies = torch.promote_types(keys.dtype, torch.float32), self.frequencies(keys.device)
        moved = sink_query(tokens_before, self.setting.group, self.setting.window)
        return rotate(keys, rotation_between(frequencies, moved, tokens_before, dtype))

    def rotation_of_all_keys(self, positions: _Positions) -> Rotation:
        """The rotation of all S keys, those of earlier tokens included."""
        past = positions.past
        if past == 0:
            return positions.key_rotation
        earlier = positions.original[:, :1] - past + torch.arange(past, device=positions.original.device)
        original = torch.cat([earlier, positions.original], dim=1)
        true = (original - positions.document_start).clamp(min=0)
        frequencies = self.frequencies(original.device)
        return rotation_between(frequencies, original, grouped_key(true, self.setting.group), positions.dtype)

    def check_continues(self, key: Tensor | PendingKeys, positions: _Positions) -> None:
        """Reject new tokens whose positions do not continue those of the cached ones; `key` is (B, K, S, D).

        zebra's cache remembers where its sequences begin. In any other they begin at 0, or with counted padding.
        """
        if isinstance(key, PendingKeys):
            continues = key.layer.continues(positions.offset)
        else:
            offset, start = positions.offset, positions.document_start
            continues = positions.past == 0 or bool(((offset == 0) | (start == 0) | (offset == NO_POSITION)).all())
        if not continues:
            at = positions.original[:4, 0].tolist()
            raise self._error(f"tokens that start at positions {at} after {positions.past} cached ones")

    def _error(self, got: str) -> ZebraError:
        return ZebraError(
            "Self-Extend requires positions that rise by 1 per token, continue after cached tokens, and restart at 0 "
            f"only where a packed document starts; got {got}. Leave out position_ids: Self-Extend groups positions "
            f"itself, and {self.setting} extends this model to {self.setting.reach(self.trained):,} tokens."
        )


_MIXED = -NO_POSITION


def _offset(positions: Tensor, keys: Tensor | None, total: int) -> Tensor:
    """The positions (1 or B, T) of the new tokens minus their indices in the sequence, padding counted: (1 or B, 1).

    It is one number while a sequence continues without gaps. `NO_POSITION` where all new tokens are padding, `_MIXED`
    where they have different offsets.
    """
    queries = positions.shape[1]
    if queries == 1 and keys is None:
        return positions - (total - 1)
    least = most = positions - torch.arange(total - queries, total, device=positions.device)
    if keys is not None:
        real = keys[:, total - queries :]
        least, most = torch.where(real, least, NO_POSITION), torch.where(real, most, -NO_POSITION)
    least, most = least.amin(dim=1, keepdim=True), most.amax(dim=1, keepdim=True)
    return torch.where(least < most, _MIXED, least)


def _document_start(positions: Tensor, mask: Mask, total: int, offset: Tensor) -> Tensor:
    """The position of the first real token of each token's document: (1 or B, 1), or (B, T) with documents.

    A plain forward without positions counts padding, and `generate` does not, so true positions are differences.
    """
    if mask.keys is None and mask.documents is None:
        return offset
    first = mask.first_tokens(total, positions.device)
    if mask.documents is None:
        return offset + first[:, :1]
    return positions.expand(first.shape[0], -1).gather(1, first.clamp(max=total - 1))


def _invalid_step(positions: Tensor, mask: Mask, total: int, offset: Tensor) -> str | None:
    """The first positions that neither continue earlier ones nor start a document, in words; None if there are none.

    Raises:
        ZebraError: padding between real tokens.
    """
    keys, queries = mask.keys, positions.shape[1]
    if mask.has_padding_holes():
        raise ZebraError(
            "Self-Extend supports padding to the left or right of a sequence, but not inside it. Pad on the left."
        )
    if queries == 1 or (queries == total and mask.documents is None):
        return None
    if queries < total and not bool((offset == _MIXED).any()):
        return None
    after = positions[:, 1:]
    invalid = positions.diff(dim=1) != 1
    if queries == total:
        invalid = invalid & (after != 0) & (after != positions[:, :1])
    if keys is not None:
        new = keys[:, total - queries :]
        invalid = invalid & new[:, 1:] & new[:, :-1]
    if not bool(invalid.any()):
        return None
    entry, at = invalid.nonzero()[0].tolist()
    return f"the positions {positions.expand(invalid.shape[0], -1)[entry, max(0, at - 1) : at + 3].tolist()}"


class SelfExtendAttention:
    """The attention override of a global layer: near keys at their exact distance, far ones at grouped distances.

    Args:
        rotation: shared by all layers with the same frequencies.
        layer_idx: the layer's index.
        first: whether it is the first of these layers in a forward pass.
    """

    def __init__(self, rotation: GroupedRotation, layer_idx: int, *, first: bool):
        self.rotation, self.layer_idx, self.first = rotation, layer_idx, first

    def attend(
        self,
        module: nn.Module,
        positions: Tensor | None,
        query: Tensor,
        key: Tensor | PendingKeys,
        value: Tensor,
        mask: Mask,
        /,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `AttentionOverride.attend`, query (B, H, T, D) and value (B, K, S, D).

        Args:
            positions: (1 or B, T), or (1 or B, S) with those of all keys, which allows packed documents for any T.
            key: (B, K, S, D), all keys at the positions that transformers gave them; or only the new ones, from zebra's
                cache, which has the others. Without that cache all keys are rotated each time, which is slow.

        Raises:
            ZebraError: no positions, or positions that do not continue those of the cached tokens.
        """
        if positions is None:
            raise ZebraError(NO_POSITION_IDS)
        dtype = torch.promote_types(query.dtype, torch.float32)
        total, queries, window = value.shape[2], query.shape[2], self.rotation.setting.window
        current = self.rotation.positions(positions, mask, total, dtype, recompute=self.first)
        if self.first:
            self.rotation.check_continues(key, current)
        if isinstance(key, PendingKeys):
            near, far = key.layer.write(key.states, rotate(key.states, current.key_rotation))
        else:
            near = far = key
            if total > window:
                far = rotate(key, self.rotation.rotation_of_all_keys(current))
        if current.query_scale is not None:
            query = (query * current.query_scale[:, :, -queries:]).to(query.dtype)
        cos, sin = current.query_rotation
        if positions.shape[1] > queries:
            cos, sin = cos[:, :, -queries:], sin[:, :, -queries:]
        far_query = rotate(query, (cos, sin)) if total > window else query
        return self_extend_attention(query, near, far_query, far, value, mask, window=window, **kwargs)
