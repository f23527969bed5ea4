"""Download checkpoints from the Hugging Face Hub by their names OWNER/NAME, into the Hub's own cache.

huggingface_hub looks for a newer version if it can reach the Hub; otherwise it uses the version in the cache.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from zebra.errors import ZebraError, first_line

ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""Keyword arguments of `from_pretrained` that select files on the Hub and how they are downloaded."""


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Whether a path has the form OWNER/NAME and does not exist."""
    name = str(path)
    return name.count("/") == 1 and name[0] not in "./~" and not name.endswith("/") and not Path(path).exists()


def hub_directory(name: str, *, weights: bool = True, subfolder: str = "", **arguments: Any) -> Path:
    """Download a checkpoint and return its directory in the Hub's cache.

    It has the configs, the tokenizer and the weights: safetensors files, or pickle files (.bin) if there are none.
    Weights in other subfolders and Mistral's consolidated* files are not downloaded. Later calls of the process return
    the same version.

    Args:
        weights: whether to download the weights.
        subfolder: the folder of the checkpoint in its repository.
        arguments: keyword arguments of `from_pretrained`; only those in `ARGUMENTS` are used.

    Raises:
        ZebraError: neither the Hub nor its cache has that name, or the Hub denies access.
    """
    chosen = {key: arguments[key] for key in ARGUMENTS if arguments.get(key) is not None}
    return _download(name, weights, subfolder, tuple(chosen.items()))


@functools.cache
def _download(name: str, weights: bool, subfolder: str, arguments: tuple[tuple[str, Any], ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):
        """A progress bar that ignores the switch for the Hub's own bars, which zebra turns off."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": None})  # None: off if stderr is not a terminal

    folder = f"{subfolder}/" if subfolder else ""

    def fetch(*kinds: str) -> Path:
        return Path(
            snapshot_download(
                name,
                allow_patterns=[f"{folder}{kind}" for kind in kinds],
                ignore_patterns=[f"{folder}consolidated*", *([] if subfolder else ["*/*.safetensors", "*/*.bin"])],
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
            f"there is no directory {name}, and no checkpoint of that name on the hub or in its cache: "
            f"{first_line(error)} Correct the path or the name."
        ) from None
    return directory
