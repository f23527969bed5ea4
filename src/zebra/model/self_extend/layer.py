r"""Self-Extend (arXiv 2401.01325) in one layer of any host with a half-split rotary embedding.

    keys  0 ................ N      near \  the last W keys at their exact distance
    f f f f \ \ \                   far  f  older ones by positions that groups of G tokens share
    f f f f f \ \ \
    f f f f f f \ \ \               No distance reaches the trained length, and nothing is trained.

Keys and queries arrive rotated to the host's positions. Turning them again, by what another position differs, gives
any position, so no forward is touched.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zebra.errors import ZebraError
from zebra.kernels import Mask
from zebra.kernels.self_extend import self_extend_attention
from zebra.kernels.sinks import NO_POSITION
from zebra.model.cache import PendingKeys
from zebra.positions import SelfExtend, grouped_key, grouped_query

_log = logging.getLogger(__name__)

Turn = tuple[Tensor, Tensor]
"""For R frequencies (cos, cos) and (-sin, sin), each (1 or B, 1, tokens, 2 R)."""


def rotation_between(frequencies: Tensor, old: Tensor, new: Tensor, dtype: torch.dtype) -> Turn:
    """The turn that takes vectors from the positions `old` to `new`, both (1 or B, tokens); of several `new`
    (n, 1 or B, tokens), n turns.

    The host takes its angles in float32, off by up to p 2^-24 at position p. Angles are formed its way here, so that
    turning again equals having turned once, however far the text.
    """
    angles = [(p.float().unsqueeze(-1) * frequencies).double() for p in (old, new)]
    angle = (angles[1] - angles[0]).unsqueeze(-3)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(states: Tensor, turn: Turn) -> Tensor:
    """`states` (B, heads, tokens, D), turned in the planes of dimensions r and r + R < 2 R; the rest as it is.

    x_r cos - x_(r + R) sin,   x_(r + R) cos + x_r sin: few calls, as decode pays for each one.
    """
    cos, sin = turn
    size = cos.shape[-1]
    wide = states[..., :size].to(cos.dtype)
    new = torch.addcmul(wide * cos, wide.roll(size // 2, dims=-1), sin).to(states.dtype)
    return new if size == states.shape[-1] else torch.cat([new, states[..., size:]], dim=-1)


@dataclass(frozen=True)
class _Places:
    """Where the tokens of one forward stand.

    Attributes:
        host: their positions as the host has them, (1 or B, T).
        shift: what those are above the places in the row, (1 or B, 1); see `_shift`.
        base: the host's position of the first real token of each one's document.
        query, key: the turns to their grouped positions.
        scale: what the queries are multiplied by, (1 or B, 1, T, 1), or None.
    """

    host: Tensor
    shift: Tensor
    base: Tensor
    query: Turn
    key: Turn
    scale: Tensor | None


class GroupedRotation:
    """The frequencies that layers share, and the places of the forward under way, reckoned in its first layer only."""

    def __init__(self, frequencies: Tensor, setting: SelfExtend, trained: int):
        self.frequencies, self.setting, self.trained = frequencies.detach().float().clone(), setting, trained
        self._said = False
        self._memory: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_memory": None}

    def places(self, positions: Tensor, mask: Mask, total: int, dtype: torch.dtype, *, fresh: bool) -> _Places:
        """The places of the last T of `total` tokens; those of the layer before unless `fresh` or of other inputs."""
        keys = mask.keys
        if not fresh and self._memory is not None:
            known, padding, inputs, places = self._memory
            same = known() is positions and (keys is None if padding is None else padding() is keys)
            if same and inputs == (total, dtype):
                return places
        places = self._reckon(positions, mask, total, dtype)
        padding = None if keys is None else weakref.ref(keys)
        self._memory = (weakref.ref(positions), padding, (total, dtype), places)
        return places

    def _reckon(self, positions: Tensor, mask: Mask, total: int, dtype: torch.dtype) -> _Places:
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        shift = _shift(positions, mask.keys, total)
        if wrong := _broken(positions, mask, total, shift):
            raise self.refusal(wrong)
        base = _base(positions, mask, total, shift)
        true = (positions - base).clamp(min=0)
        if not self._said and total > self.setting.reach(self.trained):
            self._warn(int(true.max()) + 1)
        group, window = self.setting.group, self.setting.window
        scale = None
        if self.setting.log_scale:
            scale = self.setting.query_scale(true, self.trained).to(dtype)[:, None, :, None]
        new = torch.stack([grouped_query(true, group, window), grouped_key(true, group)])
        cos, sin = rotation_between(self.frequencies, positions, new, dtype)
        return _Places(positions, shift, base, query=(cos[0], sin[0]), key=(cos[1], sin[1]), scale=scale)

    def key_turn(self, places: _Places, total: int, dtype: torch.dtype) -> Turn:
        """The turn of all `total` keys, those before this forward's tokens too."""
        past = total - places.host.shape[1]
        if past == 0:
            return places.key
        earlier = places.host[:, :1] - past + torch.arange(past, device=places.host.device)
        host = torch.cat([earlier, places.host], dim=1)
        true = (host - places.base).clamp(min=0)
        return rotation_between(self.frequencies, host, grouped_key(true, self.setting.group), dtype)

    def follow(self, key: Tensor | PendingKeys, places: _Places, past: int) -> None:
        """Refuse new tokens whose positions do not follow those of the `past` cached ones.

        Our cache remembers where its rows begin; of another one, rows begin at 0 or with padding that is counted.
        """
        if isinstance(key, PendingKeys):
            follows = key.follow(places.shift)
        else:
            shift = places.shift
            follows = past == 0 or bool(((shift == 0) | (places.base == 0) | (shift == NO_POSITION)).all())
        if not follows:
            at = places.host[:4, 0].tolist()
            raise self.refusal(f"tokens that begin at the positions {at} behind {past} cached ones")

    def refusal(self, got: str) -> ZebraError:
        """Positions that grouping would misread."""
        return ZebraError(
            "under Self-Extend positions rise by 1 from token to token, on from the cached ones, and start again at 0 "
            f"only where a packed document does; got {got}. Leave position_ids out: grouping is done here, not by "
            f"them, and {self.setting} takes this model to {self.setting.reach(self.trained):,} tokens."
        )

    def _warn(self, length: int) -> None:
        reach = self.setting.reach(self.trained)
        if length > reach:
            self._said = True
            _log.warning(
                "a text of %s tokens is beyond the reach of Self-Extend %s, which takes this model to %s: distances "
                "from there on are ones that it was not trained for. Raise the group, or write auto:%d.",
                *(f"{length:,}", self.setting, f"{reach:,}", length),
            )


_MIXED = -NO_POSITION


def _shift(positions: Tensor, keys: Tensor | None, total: int) -> Tensor:
    """What the positions of each row's new tokens are above their places in the row, padding counted: (1 or B, 1).

    One number as long as a row goes on without gaps. `NO_POSITION` where all new tokens are padding, `_MIXED`
    where they differ in it.
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


def _base(positions: Tensor, mask: Mask, total: int, shift: Tensor) -> Tensor:
    """The host's position of the first real token of each token's document: (1 or B, 1), or (B, T) with documents.

    A plain forward without positions counts padding and `generate` does not; so true positions are differences.
    """
    if mask.keys is None and mask.documents is None:
        return shift
    first = mask.first_tokens(total, positions.device)
    if mask.documents is None:
        return shift + first[:, :1]
    return positions.expand(first.shape[0], -1).gather(1, first.clamp(max=total - 1))


def _broken(positions: Tensor, mask: Mask, total: int, shift: Tensor) -> str | None:
    """What is wrong with tokens whose places do not follow from the first one's, or with one that starts nothing new.

    Raises:
        ZebraError: padding between real tokens.
    """
    keys, queries = mask.keys, positions.shape[1]
    if mask.has_padding_holes():
        raise ZebraError(
            "Self-Extend takes padding left or right of a row's tokens, never between them. Pad on the left."
        )
    if queries == 1 or (queries == total and mask.documents is None):
        return None
    if queries < total and not bool((shift == _MIXED).any()):
        return None
    after = positions[:, 1:]
    wrong = positions.diff(dim=1) != 1
    if queries == total:
        wrong = wrong & (after != 0) & (after != positions[:, :1])
    if keys is not None:
        new = keys[:, total - queries :]
        wrong = wrong & new[:, 1:] & new[:, :-1]
    if not bool(wrong.any()):
        return None
    row, at = wrong.nonzero()[0].tolist()
    return f"the positions {positions.expand(wrong.shape[0], -1)[row, max(0, at - 1) : at + 3].tolist()}"


class SelfExtendAttention:
    """What a global layer does under Self-Extend; `zebra.model.attention` calls it in place of `attend`."""

    def __init__(self, rope: GroupedRotation, layer: int, *, first: bool):
        self.rope, self.layer, self.first = rope, layer, first

    def attend(
        self,
        module: nn.Module,
        positions: Tensor | None,
        query: Tensor,
        key: Tensor | PendingKeys,
        value: Tensor,
        mask: Mask,
        /,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`attend` with near keys at their exact distance and far ones at grouped ones.

        Args:
            positions: (1 or B, T), the host's.
            key: all keys, each rotated to its host position; or the new ones alone, from our cache, which holds the
                others twice turned. The first is right and slow: it turns all of them in every forward.
        """
        if positions is None:
            raise ZebraError("Self-Extend needs the positions, which this host does not hand to its attention.")
        dtype = torch.promote_types(query.dtype, torch.float32)
        total = value.shape[2]
        places = self.rope.places(positions, mask, total, dtype, fresh=self.first)
        if self.first:
            self.rope.follow(key, places, total - query.shape[2])
        if isinstance(key, PendingKeys):
            near, far = key.write(rotate(key.states, places.key))
        else:
            near = key
            far = rotate(key, self.rope.key_turn(places, total, dtype)) if total > self.rope.setting.window else key
        if places.scale is not None:
            query = (query * places.scale).to(query.dtype)
        far_query = rotate(query, places.query) if total > self.rope.setting.window else query
        return self_extend_attention(
            query, near, far_query, far, value, mask, window=self.rope.setting.window, **arguments
        )
