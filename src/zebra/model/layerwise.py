"""Run a model's layers one by one: each is global or local by call, and a forward pass may start at any of them.

    whole     tokens ─► [0] ─► [1] ─► [2] ─► [3] ─► norm         the input of each layer is recorded
                                       │
    from 2    tokens ─► ... ─► ... ─► [2] ─► [3] ─► norm         two layers are run, and none before them

No forward is patched or copied. An attention override chooses the kind of each layer. During a call, the layers before
the first one that is run are replaced in the decoder's own list by a placeholder that returns the recorded input.
The results are bit for bit those of the whole forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zebra.errors import ZebraError
from zebra.kernels import Mask, attend
from zebra.model.attention import NAME
from zebra.model.local import LocalAttention
from zebra.model.override import attention_modules, names_of_other_overrides, overriding_attention


class Layerwise:
    """A loaded model whose layers may be of another kind in each call; the model itself does not change.

    Args:
        model: with attention "zebra", as `zebra.load` returns it.
        window, sinks: of the local layers, in place of the model's own.

    Raises:
        ZebraError: another attention, overrides such as Self-Extend, a model whose layers are not in one list.

    Example:
        >>> layers = Layerwise(zebra.load("examples/stories260K"), window=64)
        >>> states = layers.states(ids, "GGGGG")
        >>> hidden = layers.resume(ids, "GGGLG", 3, states[3])
    """

    def __init__(self, model: PreTrainedModel, window: int, sinks: int = 0):
        self._decoder: Any = model.get_decoder()
        layers = getattr(self._decoder, "layers", None)
        count = model.config.num_hidden_layers
        if not isinstance(layers, nn.ModuleList) or len(layers) != count:
            raise ZebraError(
                f"running layers one by one requires a decoder with a list of {count} layers, which this "
                f"{model.config.model_type} does not have. Choose the layout yourself, with --stripes."
            )
        others = names_of_other_overrides(model, LocalAttention)
        if model.config._attn_implementation != NAME or others:
            raise ZebraError(
                f'changing the kind of layers requires attention "{NAME}" without Self-Extend or any other override; '
                f"got {others or model.config._attn_implementation}. Load the model without it."
            )
        self._layers, self._window, self._local = layers, window, LocalAttention(sinks)
        self._attention = list(attention_modules(self._decoder))

    def states(self, ids: Tensor, kinds: str) -> list[Tensor]:
        """The input of each layer and, last, the hidden states after the norm: L + 1 tensors (B, T, hidden).

        Args:
            ids: (B, T), without padding.
            kinds: a letter for each layer, G or L.
        """
        inputs: list[Tensor] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(args[0] if args else kwargs["hidden_states"])

        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(layer.register_forward_pre_hook(record, with_kwargs=True))
            last = self._run(ids, kinds, 0)
        return [*inputs, last]

    def resume(self, ids: Tensor, kinds: str, start: int, state: Tensor) -> Tensor:
        """The hidden states after the norm, from layer `start` on with its input `state`; both (B, T, hidden)."""
        with self._replacing_layers_before(start, state):
            return self._run(ids, kinds, start)

    def _run(self, ids: Tensor, kinds: str, start: int) -> Tensor:
        choice = _KindOfEachLayer(kinds, self._window, self._local)
        with torch.no_grad(), overriding_attention(self._attention, choice):
            hidden: Tensor = self._decoder(input_ids=ids, use_cache=False).last_hidden_state
        if choice.layers != list(range(start, len(kinds))):
            raise RuntimeError(f"layers {start} to {len(kinds) - 1} should have attended; {choice.layers} did.")
        return hidden

    @contextmanager
    def _replacing_layers_before(self, start: int, state: Tensor) -> Iterator[None]:
        replaced = list(self._layers[:start])
        try:
            for i in range(start):
                self._layers[i] = _Placeholder(state)
            yield
        finally:
            for i, layer in enumerate(replaced):
                self._layers[i] = layer


class _KindOfEachLayer:
    """An attention override that attends globally or locally, by each layer's letter.

    Attributes:
        layers: the indices of the layers that have attended.
    """

    def __init__(self, kinds: str, window: int, local: LocalAttention):
        self._kinds, self._window, self._local = kinds, window, local
        self.layers: list[int] = []

    def attend(
        self, module: Any, positions: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Mask, /, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        self.layers.append(module.layer_idx)
        if self._kinds[module.layer_idx] == "G":
            return attend(q, k, v, replace(mask, window=None), **kwargs)
        mask = replace(mask, window=self._window)
        if self._local:
            return self._local.attend(module, positions, q, k, v, mask, **kwargs)
        return attend(q, k, v, mask, **kwargs)


class _Placeholder(nn.Module):
    """Takes the place of a layer whose output is known."""

    def __init__(self, state: Tensor):
        super().__init__()
        self._state = state

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._state
