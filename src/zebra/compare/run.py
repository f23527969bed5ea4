"""`zebra compare`: every method on the same windows of a text and the same retrieval samples, within a budget of time.

    <out>/inputs.json            what the measurements depend on; the same inputs continue, others are rejected
    <out>/measurements.jsonl     `zebra.compare.measurements`
    <out>/selection/             the losses behind the selected layout
    <out>/results.jsonl, report.html, report.md, report-*.svg

A first pass measures the cost and one window of each method. Their seconds say how many units fit into the budget, and
a second pass measures those. A method's failure is a result, not the end.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from zebra.compare.measurements import (
    COST,
    Measurement,
    Measurements,
    Unit,
    hides_in_text,
    measure_cost,
    measure_sample,
    measure_window,
    schedule,
)
from zebra.compare.methods import Method, choose_methods, standard_methods
from zebra.compare.results import comparison_results, failure_results
from zebra.data.corpus import Corpus, read_corpus
from zebra.data.encoding import Encoder, window_prefix, windows_of
from zebra.data.needles import Sample, SampleGenerator
from zebra.errors import ZebraError, first_line
from zebra.evaluate.calibration import MIN_SAMPLES
from zebra.evaluate.losses import selection_folder
from zebra.evaluate.perplexity import edges, task_name
from zebra.evaluate.selection import select
from zebra.evaluate.target import EvalTarget
from zebra.measure import measure_ceilings
from zebra.model.checkpoint import checkpoint_digests
from zebra.model.families import stripes_of
from zebra.model.load import device_name, read_device
from zebra.model.load_options import loaded_layout_name
from zebra.model.self_extend import self_extend_of
from zebra.plan.cost import BYTES, Run
from zebra.plan.decoder import decoder_from_config
from zebra.plan.devices import Device
from zebra.plan.memory import kv_bytes
from zebra.progress import bar, console
from zebra.provenance import versions
from zebra.report import write_report
from zebra.results import Result, write_results
from zebra.stripes import GLOBAL, Stripes

FIRST_WINDOW = Unit("window")
LOADING = ("dtype", "device", "trust_remote_code")
_ANSWER_TOKENS = 32
"""Tokens that a retrieval task decodes, for the estimate of its time."""
_SELECTION_SAMPLES = 8
"""At most."""
_SELECTION_WINDOWS = 4
"""Tokens of a sequence that layers are chosen by, in windows."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compared, on what.

    Attributes:
        text: files of the user's own text. Its windows are scored (of documents of a window or more; joined where there
            are none), and it hides the evidence of the retrieval tasks. A quarter at most, its end, is held back to
            select layers by.
        length: tokens of a window and of a prompt.
        stripes: the layout of the methods with stripes; a selected layout has as many global layers and its window.
        windows, samples: at most so many windows, and so many samples of each task and depth.
    """

    checkpoint: str
    text: Sequence[str]
    length: int
    methods: Sequence[Method]
    stripes: Stripes
    tasks: Sequence[str] = ("passkey", "needle")
    depths: Sequence[float] = (0.1, 0.5, 0.9)
    windows: int = 16
    samples: int = 10
    separator: str | None = None
    dtype: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    seed: int = 0

    @property
    def loading(self) -> dict[str, Any]:
        """The fields of `LoadOptions` that all methods share."""
        return {name: getattr(self, name) for name in LOADING}


def compare(
    checkpoint: str,
    text: Sequence[str],
    *,
    length: int,
    out: Path,
    stripes: str | None = None,
    methods: Sequence[str] | None = None,
    additional: Sequence[Method] = (),
    budget_minutes: float = 30.0,
    run: str = "compare",
    **options: Any,
) -> list[Result]:
    """Measure methods side by side, and write the results and their page.

    Args:
        out: the folder; the same call continues after a kill, and a larger budget adds to it.
        stripes: None takes every second layer and a window of an eighth of the trained length.
        methods: names of `zebra.compare.methods.standard_methods`, all of them where None; the checkpoint as it is
            comes first in any case.
        budget_minutes: no unit begins that would end later; the cost and one window of each method are always measured.
        options: other fields of `Settings`.

    Raises:
        ZebraError: a text too short, a task that this length cannot have, a folder of something else, a checkpoint that
            cannot be measured as it is; not what another method cannot do, a result of the task `compare-failed`.
    """
    end = time.monotonic() + 60 * budget_minutes
    loading = {name: options[name] for name in LOADING if name in options}
    trained = EvalTarget(checkpoint, purpose=None, **loading).reach
    layout = Stripes.parse(stripes) if stripes else Stripes.grouped(stride=2, window=max(1, (trained or length) // 8))
    chosen = choose_methods(standard_methods(trained, length, str(layout)), methods)
    settings = Settings(
        checkpoint=checkpoint,
        text=text,
        length=length,
        methods=[*chosen, *additional],
        stripes=layout,
        **options,
    )
    data = _Data(settings)
    with selection_folder(out, data.inputs()):
        comparison = _Comparison(settings, data, out)
        comparison.measure([COST, FIRST_WINDOW])
        comparison.check_first()
        comparison.measure(comparison.affordable(end - time.monotonic()))
        results = comparison.results(run)
        write_results(out / "results.jsonl", results)
        write_report(results, out / "report.html", title=f"{Path(checkpoint).name}, {length:,} tokens")
    return results


class _Data:
    """The windows and the retrieval samples that every method gets, and the text that layers are selected by."""

    def __init__(self, settings: Settings):
        self._settings = settings
        target = EvalTarget(settings.checkpoint, purpose=None, **settings.loading)
        self.tokenizer, self.config, self.trained = target.tokenizer, target.config, target.reach
        text = read_corpus(settings.text, Encoder.of(self.tokenizer), separator=settings.separator)
        self.digest = hashlib.sha256(text.tokens.tobytes()).hexdigest()
        length = settings.length
        self.selection_length = min(_SELECTION_WINDOWS * settings.stripes.window, length, self.trained or length)
        self.selection_samples = min(_SELECTION_SAMPLES, len(text.tokens) // 4 // self.selection_length)
        self.selection_text, text = _split(text, self.selection_samples * self.selection_length)
        text = text if (text.lengths >= length).any() else text.joined(length)
        self.prefix = window_prefix(self.tokenizer)
        self.windows: list[NDArray[np.integer[Any]]] = [
            window.tokens(document)
            for document in text
            for window in windows_of(document, length, self.prefix)
            if len(window) == length
        ][: settings.windows]
        self._generators = {
            task: SampleGenerator(self.tokenizer, text if hides_in_text(task) else None) for task in settings.tasks
        }
        for task, generator in self._generators.items():
            for depth in settings.depths:
                generator.check(task, length=length, depth=depth, count=settings.samples, seed=settings.seed)

    def inputs(self) -> dict[str, Any]:
        """What the measurements depend on, apart from the methods and how much of each is measured."""
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

    def sample(self, unit: Unit) -> Sample:
        """The sample of a unit; the same whatever else is drawn."""
        settings = self._settings
        drawn = self._generators[unit.kind].samples(
            unit.kind, length=settings.length, depth=unit.depth, count=unit.number + 1, seed=settings.seed
        )
        return drawn[-1]


def _split(text: Corpus, held_back: int) -> tuple[Corpus, Corpus]:
    """The last `held_back` tokens of a text, as one document, and what stands before them."""
    end = len(text.tokens) - held_back
    before = Corpus(text.tokens[:end], np.unique(np.minimum(text.offsets, end)))
    return Corpus(text.tokens[end:], np.array([0, held_back], dtype=np.int64)), before


class _Comparison:
    """The methods of one folder: what was measured, and why what is missing failed.

    Attributes:
        failures: the reason by method and kind of unit.
    """

    def __init__(self, settings: Settings, data: _Data, out: Path):
        self.settings, self.data, self.measurements = settings, data, Measurements(out / "measurements.jsonl")
        self.failures: dict[tuple[str, str], str] = {}
        self._ceilings: Device | None = None
        self._out = out
        self._selected = self._select() if any(method.selects for method in settings.methods) else None
        by_key = {self.key(method): method for method in reversed(settings.methods)}  # of equal ones the first
        self.methods = [method for method in settings.methods if by_key[self.key(method)] is method]

    def key(self, method: Method) -> str:
        """The name of a method's measurements: its options, with the layout that was selected."""
        options = {name: str(value) for name, value in method.arguments(self._selected).items()}
        if "checkpoint" in method.options:
            checkpoint = method.options["checkpoint"]
            digest = hashlib.sha256(repr(checkpoint_digests(checkpoint)).encode()).hexdigest()
            options["checkpoint"] = f"{checkpoint}@{digest[:8]}"
        return " ".join(f"{name}={value}" for name, value in options.items()) or method.name

    def results(self, run: str) -> list[Result]:
        """All that was measured and that failed."""
        settings, columns = self.settings, {"model": self.settings.checkpoint, "run": run}
        measured = [self.measurements.of(self.key(method)) for method in self.methods]
        results = comparison_results(
            [*filter(None, measured)],
            task=task_name("disjoint", self.data.prefix),
            bounds=edges(settings.length),
            trained=self.data.trained,
            run=run,
            seed=settings.seed,
        )
        return [*results, *failure_results(self.failures, length=settings.length, **columns)]

    def measure(self, units: Sequence[Unit]) -> None:
        """Measure what is missing of these units, method by method, so that each is loaded once."""
        todo = [(m, [u for u in units if self._missing(m, u)]) for m in self.methods]
        with bar("compare", sum(len(missing) for _, missing in todo), "units") as advance:
            for method, missing in todo:
                advance(note=method.name)
                for unit in self._measured(method, missing):
                    advance(1, note=f"{method.name}: {unit}")

    def check_first(self) -> None:
        """Check that the first method, with which the others are compared, can be measured.

        Raises:
            ZebraError: it cannot.
        """
        key = self.key(self.methods[0])
        if FIRST_WINDOW not in self.measurements.of(key):
            reason = next(text for (name, _), text in self.failures.items() if name == key)
            raise ZebraError(f"nothing can be compared with {self.methods[0].name}: {reason}")

    def affordable(self, seconds: float) -> list[Unit]:
        """The units from the first on that fit into some seconds, for all methods; those that are measured are free."""
        settings, units = self.settings, []
        for unit in schedule(settings.tasks, settings.depths, len(self.data.windows), settings.samples):
            seconds -= sum(self._estimate(method, unit) for method in self.methods if self._missing(method, unit))
            if seconds < 0:
                break
            units.append(unit)
        return units

    def _missing(self, method: Method, unit: Unit) -> bool:
        key = self.key(method)
        failed = self.failures.keys() & {(key, unit.kind), (key, "load")}
        return unit not in self.measurements.of(key) and not failed

    def _estimate(self, method: Method, unit: Unit) -> float:
        """Seconds of a unit: a window takes as long as the first, a sample a prefill and some decoded tokens."""
        measured = self.measurements.of(self.key(method))
        window, cost = measured.get(FIRST_WINDOW), measured.get(COST)
        if unit.kind == "window" or cost is None:
            return float(window["seconds"]) if window else 0.0
        return float(cost["prefill_seconds"] + _ANSWER_TOKENS * cost["decode_seconds"])

    def _measured(self, method: Method, units: Sequence[Unit]) -> Iterator[Unit]:
        """The units as they are measured or fail."""
        if not units:
            return
        key, settings = self.key(method), self.settings
        options = settings.loading | method.arguments(self._selected)
        model: PreTrainedModel | None = None
        try:
            checkpoint = method.options.get("checkpoint", settings.checkpoint)
            target = EvalTarget(checkpoint, purpose=None, **options)
            model = target.load()
            described = {"layout": loaded_layout_name(model, method.options.get("rope")), "model": checkpoint}
        except _FAILURES as error:
            self.failures[key, "load"] = first_line(error)
        for unit in units:
            if model is not None and self._missing(method, unit):
                try:
                    measurement = self._measurement(model, unit)
                    self.measurements.add(key, unit, measurement | described | {"device": device_name(model.device)})
                except _FAILURES as error:
                    self.failures[key, unit.kind] = first_line(error)
            yield unit
        del model
        gc.collect()

    def _measurement(self, model: PreTrainedModel, unit: Unit) -> Measurement:
        data = self.data
        if unit == COST:
            return measure_cost(model, data.windows[0]) | {"planned": self._planned(model)}
        if unit.kind == "window":
            return measure_window(model, data.windows[unit.number], edges(self.settings.length))
        return measure_sample(model, data.tokenizer, data.sample(unit))

    def _planned(self, model: PreTrainedModel) -> Measurement:
        """The cost by the plan, with the ceilings of this machine; without what the plan does not know."""
        planned: Measurement = {}
        dtype = str(model.dtype).removeprefix("torch.")
        with suppress(ZebraError):
            self._ceilings = self._ceilings or measure_ceilings(str(model.device))
            for phase, name in (("prefill", "prefill_seconds"), ("decode", "decode_seconds")):
                costs = Run(
                    decoder=decoder_from_config(model.config.to_dict(), name="the model"),
                    stripes=stripes_of(model.config),
                    length=self.settings.length,
                    dtype=dtype if dtype in BYTES else "float32",
                    phase=phase,
                    self_extend=self_extend_of(model),
                )
                planned |= {"kv_bytes": kv_bytes(costs)} if phase == "prefill" else {}
                planned[name] = sum(self._ceilings.seconds(costs).values())
        return planned

    def _select(self) -> Stripes:
        """As many global layers as the given stripes have, chosen by the text that is held back."""
        settings, stripes = self.settings, self.settings.stripes
        count = stripes.layer_types(self.data.config.get_text_config().num_hidden_layers).count(GLOBAL)
        samples = self.data.selection_samples
        if samples < MIN_SAMPLES:
            raise ZebraError(
                f"layers are selected by {MIN_SAMPLES} sequences of {self.data.selection_length:,} tokens or more, a "
                "quarter of the text at most, and the text is too short. Give more, or leave out the selected methods."
            )
        console.print(f"selecting {count} layers by {samples} sequences that are not scored below")
        return select(
            settings.checkpoint,
            count,
            window=f"{stripes.window}+{stripes.sinks}",
            length=self.data.selection_length,
            text=self.data.selection_text,
            samples=samples,
            order="once",
            seed=settings.seed,
            **settings.loading,
            work=self._out / "selection",
        ).stripes


_FAILURES = (ZebraError, RuntimeError, MemoryError)
"""What a method may end in: our own errors, and those of torch, out of memory among them."""
