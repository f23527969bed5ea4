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

from zebra.kernels import Mask
from zebra.kernels.extended import extended
from zebra.model.cache import Pending
from zebra.positions import SelfExtend, grouped_key, grouped_query
from zebra.refusal import Refusal

_log = logging.getLogger(__name__)

Turn = tuple[Tensor, Tensor]
"""For R frequencies (cos, cos) and (-sin, sin), each (1 or B, 1, tokens, 2 R)."""


def turn_between(frequencies: Tensor, old: Tensor, new: Tensor, dtype: torch.dtype) -> Turn:
    """The turn that takes vectors from the positions `old` to `new`, both (1 or B, tokens); of several `new`
    (n, 1 or B, tokens), n turns.

    The host takes its angles in float32, off by up to p 2^-24 at position p. Angles are formed its way here, so that
    turning again equals having turned once, however far the text.
    """
    angles = [(p.float().unsqueeze(-1) * frequencies).double() for p in (old, new)]
    angle = (angles[1] - angles[0]).unsqueeze(-3)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def turned(states: Tensor, turn: Turn) -> Tensor:
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
        base: the host's position of the first real token of each one's document.
        query, key: the turns to their grouped positions.
        scale: what the queries are multiplied by, (1 or B, 1, T, 1), or None.
    """

    host: Tensor
    base: Tensor
    query: Turn
    key: Turn
    scale: Tensor | None


class Rope:
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
        _check(positions, mask.keys, total)
        base = _base(positions, mask, total)
        true = (positions - base).clamp(min=0)
        if not self._said and total > self.setting.reach(self.trained):
            self._warn(int(true.max()) + 1)
        group, window = self.setting.group, self.setting.window
        scale = None
        if self.setting.log_scale:
            scale = self.setting.query_scale(true, self.trained).to(dtype)[:, None, :, None]
        new = torch.stack([grouped_query(true, group, window), grouped_key(true, group)])
        cos, sin = turn_between(self.frequencies, positions, new, dtype)
        return _Places(host=positions, base=base, query=(cos[0], sin[0]), key=(cos[1], sin[1]), scale=scale)

    def key_turn(self, places: _Places, total: int, dtype: torch.dtype) -> Turn:
        """The turn of all `total` keys, those before this forward's tokens too."""
        past = total - places.host.shape[1]
        if past == 0:
            return places.key
        earlier = places.host[:, :1] - past + torch.arange(past, device=places.host.device)
        host = torch.cat([earlier, places.host], dim=1)
        true = (host - places.base).clamp(min=0)
        return turn_between(self.frequencies, host, grouped_key(true, self.setting.group), dtype)

    def _warn(self, length: int) -> None:
        reach = self.setting.reach(self.trained)
        if length > reach:
            self._said = True
            _log.warning(
                "a text of %s tokens is beyond the reach of Self-Extend %s, which takes this model to %s: distances "
                "from there on are ones that it was not trained for. Raise the group, or write auto:%d.",
                *(f"{length:,}", self.setting, f"{reach:,}", length),
            )


def _base(positions: Tensor, mask: Mask, total: int) -> Tensor:
    """The host's position of the first real token of each token's document: (1 or B, 1), or (B, T) with documents.

    A plain forward without positions counts padding and `generate` does not; so true positions are differences.
    """
    queries = positions.shape[1]
    past = total - queries
    if mask.documents is not None:
        index = torch.arange(queries, device=positions.device)
        starts = nn.functional.pad(mask.documents.diff(dim=1) != 0, (1, 0))
        first = torch.where(starts, index, 0).cummax(dim=1).values
        if mask.keys is not None:
            first = torch.maximum(first, mask.keys.int().argmax(dim=1, keepdim=True))
        return positions.expand(first.shape[0], -1).gather(1, first)
    if mask.keys is None:
        return positions[:, :1] - past
    first = mask.keys.int().argmax(dim=1, keepdim=True)
    rows = positions.expand(first.shape[0], -1)
    return torch.where(first < past, rows[:, :1] - past + first, rows.gather(1, (first - past).clamp(min=0)))


def _check(positions: Tensor, keys: Tensor | None, total: int) -> None:
    """Refuse tokens whose places do not follow from the first one's.

    Raises:
        Refusal: padding between real tokens; positions of a chunk after cached tokens that do not rise by 1.
    """
    queries = positions.shape[1]
    if keys is not None and bool(((keys.int().diff(dim=1) > 0).sum(dim=1) + keys[:, 0].int() > 1).any()):
        raise Refusal("Self-Extend takes padding left or right of a row's tokens, never between them. Pad on the left.")
    if 1 < queries < total:
        broken = positions.diff(dim=1) != 1
        if keys is not None:
            new = keys[:, total - queries :]
            broken = broken & new[:, 1:] & new[:, :-1]
        if bool(broken.any()):
            raise Refusal(
                "under Self-Extend the positions of a chunk after cached tokens rise by 1 from token to token; got "
                f"{positions[:1].tolist()[0][:8]} ... Leave position_ids out: grouping is done here, not by them."
            )


class Extension:
    """What a global layer does under Self-Extend; `zebra.model.attention` calls it in place of `attend`."""

    def __init__(self, rope: Rope, layer: int, *, first: bool):
        self.rope, self.layer, self.first = rope, layer, first

    def attend(
        self,
        module: nn.Module,
        positions: Tensor | None,
        query: Tensor,
        key: Tensor | Pending,
        value: Tensor,
        mask: Mask,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`attend` with near keys at their exact distance and far ones at grouped ones.

        Args:
            positions: (1 or B, T), the host's.
            key: all keys, each rotated to its host position; or the new ones alone, from our cache, which holds the
                others twice turned. The first is right and slow: it turns all of them in every forward.
        """
        if positions is None:
            raise Refusal("Self-Extend needs the positions, which this host does not hand to its attention.")
        dtype = torch.promote_types(query.dtype, torch.float32)
        total = value.shape[2]
        places = self.rope.places(positions, mask, total, dtype, fresh=self.first)
        if isinstance(key, Pending):
            near, far = key.write(turned(key.states, places.key))
        else:
            near = key
            far = turned(key, self.rope.key_turn(places, total, dtype)) if total > self.rope.setting.window else key
        if places.scale is not None:
            query = (query * places.scale).to(query.dtype)
        far_query = turned(query, places.query) if total > self.rope.setting.window else query
        return extended(query, near, far_query, far, value, mask, window=self.rope.setting.window, **arguments)
