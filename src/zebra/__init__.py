"""zebra: a longer and cheaper context for decoder language models of the Hugging Face ecosystem.

The public names are imported on first use, so `import zebra` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zebra.errors import ZebraError
from zebra.positions import SelfExtend
from zebra.stripes import Stripes

if TYPE_CHECKING:
    from zebra.conversation import Conversation
    from zebra.evaluate.selection import select
    from zebra.exports import export
    from zebra.generation import generate
    from zebra.model.load import convert, load
    from zebra.model.verify import verify
    from zebra.train.adapt import adapt

__version__ = "0.1.0"

_HOME = {
    "Conversation": "zebra.conversation",
    "load": "zebra.model.load",
    "convert": "zebra.model.load",
    "verify": "zebra.model.verify",
    "adapt": "zebra.train.adapt",
    "export": "zebra.exports",
    "generate": "zebra.generation",
    "select": "zebra.evaluate.selection",
}

__all__ = [
    "Conversation",
    "SelfExtend",
    "Stripes",
    "ZebraError",
    "__version__",
    "adapt",
    "convert",
    "export",
    "generate",
    "load",
    "select",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'zebra' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
