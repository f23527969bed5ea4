"""The settings of `zebra compare`, and the windows and retrieval samples that every method gets."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zebra.compare.measurements import Unit, hides_in_text
from zebra.compare.methods import Method
from zebra.data.corpus import Corpus, read_corpus
from zebra.data.documents import Names
from zebra.data.encoding import Encoder, window_prefix, windows_of
from zebra.data.needles import Sample, SampleGenerator
from zebra.errors import ZebraError
from zebra.evaluate.target import EvalTarget
from zebra.model.checkpoint import checkpoint_digests
from zebra.model.load import read_device
from zebra.provenance import versions
from zebra.stripes import Stripes

LOADING = ("dtype", "device", "trust_remote_code")
_SELECTION_SAMPLES = 8
"""The most sequences for selecting layers."""
_SELECTION_WINDOWS = 4
"""The length of such a sequence, in windows of the stripes."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compared, on what.

    Attributes:
        text: files of the user's own text. Its windows are scored: those of documents with at least `length` tokens,
            or of joined documents if there are none. It is also the haystack of retrieval tasks, except for the pass
            key. Its end, a quarter at most, is held back for selecting layers.
        length: tokens of a window and of a prompt.
        stripes: the layout of the methods with stripes; a selected layout has as many global layers and its window.
        windows, samples: the most windows, and the most samples of each task and depth.
    """

    checkpoint: str
    text: Names
    length: int
    methods: Sequence[Method]
    stripes: Stripes
    tasks: Sequence[str] = ("passkey", "needle")
    depths: Sequence[float] = (0.1, 0.5, 0.9)
    windows: int = 16
    samples: int = 10
    separator: str | None = None
    field: str | None = None
    dtype: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    seed: int = 0

    @property
    def loading(self) -> dict[str, Any]:
        """The fields of `LoadOptions` that all methods share."""
        return {name: getattr(self, name) for name in LOADING}


class ComparisonData:
    """The windows and the retrieval samples that every method gets, and the text for selecting layers."""

    def __init__(self, settings: Settings):
        self._settings = settings
        target = EvalTarget(settings.checkpoint, purpose=None, **settings.loading)
        self.tokenizer, self.config, self.trained = target.tokenizer, target.config, target.context_length
        encoder = Encoder.of(self.tokenizer)
        text = read_corpus(settings.text, encoder, separator=settings.separator, field=settings.field)
        self.digest = hashlib.sha256(text.tokens.tobytes() + text.offsets.tobytes()).hexdigest()
        length = settings.length
        self.selection_length = min(_SELECTION_WINDOWS * settings.stripes.window, length, self.trained or length)
        self.selection_samples = min(_SELECTION_SAMPLES, len(text.tokens) // 4 // self.selection_length)
        self.selection_text, text = _split(text, self.selection_samples * self.selection_length)
        text = text if (text.lengths >= length).any() else text.joined(length)
        self.prefix = window_prefix(self.tokenizer)
        of_documents = (
            [window.tokens(document) for window in windows_of(document, length, self.prefix) if len(window) == length]
            for document in text
        )
        in_turns = itertools.chain.from_iterable(itertools.zip_longest(*of_documents))  # round-robin over documents
        self.windows = [window for window in in_turns if window is not None][: settings.windows]
        in_text, in_noise = SampleGenerator(self.tokenizer, text), SampleGenerator(self.tokenizer)
        self._generators = {task: in_text if hides_in_text(task) else in_noise for task in settings.tasks}
        for task, generator in self._generators.items():
            for depth in settings.depths:
                generator.check(task, length=length, depth=depth, count=settings.samples, seed=settings.seed)

    def inputs(self) -> dict[str, Any]:
        """What the measurements depend on, except for the methods and the number of windows and samples."""
        settings = self._settings
        return {
            "checkpoint": checkpoint_digests(settings.checkpoint),
            "text": self.digest,
            "prefix": [*self.prefix],
            "stripes": str(settings.stripes),
            "length": settings.length,
            "seed": settings.seed,
            "dtype": str(settings.dtype),
            "device": read_device(settings.device),
            "versions": versions(),
        }

    def check_tokenizer(self, target: EvalTarget) -> None:
        """Check that a model reads the same tokens: each has the same number in its vocabulary.

        Raises:
            ZebraError: another vocabulary.
        """
        missing = self.tokenizer.get_vocab().items() - target.tokenizer.get_vocab().items()
        if missing:
            raise ZebraError(
                f"the tokenizer must be that of {self._settings.checkpoint}; {len(missing):,} of its tokens differ in "
                f"{target.checkpoint}. Compare checkpoints of one tokenizer."
            )

    def sample(self, unit: Unit) -> Sample:
        """The retrieval sample of a unit; it does not depend on the other units."""
        settings = self._settings
        (sample,) = self._generators[unit.kind].samples(
            unit.kind, length=settings.length, depth=unit.depth, first=unit.number, seed=settings.seed
        )
        return sample


def _split(text: Corpus, held_back: int) -> tuple[Corpus, Corpus]:
    """The last `held_back` tokens of a text, as one document, and the text before them."""
    end = len(text.tokens) - held_back
    before = Corpus(text.tokens[:end], np.unique(np.minimum(text.offsets, end)))
    return Corpus(text.tokens[end:], np.array([0, held_back], dtype=np.int64)), before
