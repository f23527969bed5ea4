"""What torch calls in each process of a command that runs under `zebra with`: it registers attention "zebra" in time.

torch calls it when it has been imported, which transformers does while it is imported itself. So the registration waits
until the first model's module is imported: no model can be loaded before, and transformers is whole then.
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
        return None  # the next finders find the module


def register_with_models() -> None:
    """Register attention "zebra" before the first model of transformers is imported in this process.

    An entry point of torch's group `torch.backends`, which `import torch` calls.
    """
    sys.meta_path.insert(0, _BeforeModels())
