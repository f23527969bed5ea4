"""The entry point that torch loads in each process of a command under `zebra with`. It registers attention "zebra".

torch calls it at the end of `import torch`, when transformers may be only partly imported. So the registration waits
until the first model's module is imported: no model can be loaded before that, and transformers is complete by then.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MODELS = re.compile(r"transformers\.models\.\w+\.modeling_\w+")


class _BeforeModels(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if _MODELS.fullmatch(name) and self in sys.meta_path:
            sys.meta_path.remove(self)
            import zebra.model.attention  # noqa: F401  # registers
        return None  # the next finder handles the import


def register_with_models() -> None:
    """Register attention "zebra" as soon as this process imports the first model of transformers.

    This is an entry point of the group `torch.backends`, which `import torch` calls.
    """
    sys.meta_path.insert(0, _BeforeModels())
