"""Attention overrides, which compute a layer's attention in place of `zebra.kernels.attend`.

    transformers ─► zebra_attention(module, q, k, v, ...) ─► get_override(module)
                      ├─ None         kernels.attend(q, k, v, mask)
                      └─ an override  override.attend(module, positions, q, k, v, mask)

Self-Extend, attention sinks, full attention while decoding, summary attention, the oracles and the layer selection are
overrides. An override is set on the attention module of a layer; nothing is patched, and no forward is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from zebra.kernels import Mask

_ATTRIBUTE = "attention_override"


class AttentionOverride(Protocol):
    """Computes the attention of the modules that it is set on."""

    def attend(
        self,
        module: nn.Module,
        positions: Tensor | None,
        query: Tensor,
        key: Any,
        value: Tensor,
        mask: Mask,
        /,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The output (B, H, T, D) and the log-sum-exp (B, H, T) or None, as `zebra.kernels.attend` returns them.

        Args:
            module: the attention module of the layer.
            positions: (1 or B, T), the position ids of the queries, or None where the model does not pass them.
            query: (B, H, T, D), rotated.
            key: (B, K, S, D), rotated; or an object with the keys, from one of zebra's cache layers.
            value: (B, K, S, D).
            mask: window, padding and documents of the layer.
            kwargs: further arguments of `zebra.kernels.attend`.
        """


Override = TypeVar("Override", bound=AttentionOverride)


def get_override(module: nn.Module) -> AttentionOverride | None:
    """The override of an attention module, or None."""
    return getattr(module, _ATTRIBUTE, None)


def set_override(module: nn.Module, override: AttentionOverride | None) -> None:
    """Set the override of an attention module; None removes it."""
    module.__dict__[_ATTRIBUTE] = override


def attention_modules(model: nn.Module) -> Iterator[Any]:
    """The attention modules of a transformers model: those with a `layer_idx` and a `scaling` of the scores."""
    return (module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "scaling"))


def overrides_of(model: nn.Module, kind: type[Override]) -> Iterator[Override]:
    """The overrides of one class in a model, in the order of the modules."""
    return (override for module in model.modules() if isinstance(override := get_override(module), kind))


def names_of_other_overrides(model: nn.Module, *kinds: type[AttentionOverride]) -> str:
    """The class names of a model's overrides of all other classes, separated by commas; empty without any."""
    overrides = (get_override(module) for module in model.modules())
    return ", ".join(sorted({type(o).__name__ for o in overrides if o is not None and not isinstance(o, kinds)}))


@contextmanager
def overriding_attention(modules: Iterable[nn.Module], override: AttentionOverride | None) -> Iterator[None]:
    """Within this context set this override on the modules; afterwards restore the previous one of each."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(set_override, module, get_override(module))
            set_override(module, override)
        yield
