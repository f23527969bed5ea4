"""Checkpoints by their names in the hub: OWNER/NAME, downloaded once into the hub's own cache.

huggingface_hub looks for a newer version where the hub can be reached; else what the cache has is taken.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from zebra.errors import ZebraError, first_line

ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""Keyword arguments of `from_pretrained` that say which files of the hub are meant."""


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Whether a path that does not exist may be OWNER/NAME."""
    name = str(path)
    return name.count("/") == 1 and name[0] not in "./~" and not name.endswith("/") and not Path(path).exists()


def hub_directory(name: str, *, weights: bool = True, subfolder: str = "", **arguments: Any) -> Path:
    """The directory of a name's files in the hub's cache: configs and tokenizer, and its weights once.

    Weights are safetensors files; those of pickle where there are none. Files of other formats, which some keep in
    subfolders, are left out. A process takes the same version at each call.

    Args:
        weights: whether weights are wanted.
        subfolder: the one that holds the checkpoint.
        arguments: keyword arguments of `from_pretrained`, of which those in `ARGUMENTS` count.

    Raises:
        ZebraError: neither the hub nor its cache has that name, or the hub does not allow it.
    """
    chosen = {key: arguments[key] for key in ARGUMENTS if arguments.get(key) is not None}
    return _download(name, weights, subfolder, tuple(chosen.items()))


@functools.cache
def _download(name: str, weights: bool, subfolder: str, arguments: tuple[tuple[str, Any], ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):
        """The hub's own is switched off, as it would break ours in other work."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": None})  # off where stderr is no terminal

    folder = f"{subfolder}/" if subfolder else ""

    def fetch(*kinds: str) -> Path:
        return Path(
            snapshot_download(
                name,
                allow_patterns=[f"{folder}{kind}" for kind in kinds],
                ignore_patterns=None if subfolder else [f"*/{kind}" for kind in ("*.safetensors", "*.bin")],
                tqdm_class=Bar,
                **dict(arguments),
            )
        )

    kinds = ["*.json", "*.jinja", "*.model", "*.txt"]
    try:
        directory = fetch(*kinds, *["*.safetensors"] * weights)
        if weights and not any((directory / folder).glob("*.safetensors")):
            directory = fetch(*kinds, "*.bin")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ZebraError(
            f"there is no directory {name}, and no checkpoint of that name in the hub or its cache: "
            f"{first_line(error)} Correct the path or the name."
        ) from None
    return directory
