"""`zebra compare`: every method on the same windows of a text and the same retrieval samples, within a time budget.

    <out>/inputs.json            what the measurements depend on; the same inputs continue, others are rejected
    <out>/measurements.jsonl     see `zebra.compare.measurements`
    <out>/selection/             the losses behind the selected layout
    <out>/results.jsonl, report.html, report.md, report-*.svg

A first pass measures the cost and one window of each method. Their times give an estimate of how many units fit into
the budget, and a second pass measures those. The failure of a method is a result; the other methods continue.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from zebra.compare.data import LOADING, ComparisonData, Settings
from zebra.compare.measurements import (
    COST,
    Measurement,
    Measurements,
    Unit,
    measure_cost,
    measure_sample,
    measure_window,
    schedule,
)
from zebra.compare.methods import Method, choose_methods, standard_methods
from zebra.compare.results import comparison_results, failure_results
from zebra.data.documents import Names, names_of
from zebra.errors import ZebraError, check_names, first_line
from zebra.evaluate.calibration import MIN_SAMPLES
from zebra.evaluate.losses import selection_folder
from zebra.evaluate.perplexity import edges, task_name
from zebra.evaluate.selection import select
from zebra.evaluate.target import EvalTarget
from zebra.measure import measure_ceilings
from zebra.model.checkpoint import checkpoint_digests
from zebra.model.checkpoint_files import check_checkpoint
from zebra.model.families import stripes_of
from zebra.model.load import device_name
from zebra.model.load_options import loaded_layout_name
from zebra.model.local import local_attention_of, supports_sinks
from zebra.model.self_extend import self_extend_of
from zebra.plan.cost import BYTES, Run
from zebra.plan.decoder import decoder_from_config
from zebra.plan.devices import Device
from zebra.plan.memory import kv_bytes
from zebra.progress import bar, console
from zebra.report import write_report
from zebra.results import Result, write_results
from zebra.stripes import GLOBAL, Stripes

FIRST_WINDOW = Unit("window")
_ANSWER_TOKENS = 32
"""Tokens that a retrieval sample is assumed to decode, for the estimate of its time."""


def compare(
    checkpoint: str,
    text: Names,
    *,
    length: int,
    out: Path,
    stripes: str | None = None,
    methods: Names | None = None,
    additional: Sequence[Method] = (),
    budget_minutes: float = 30.0,
    run: str = "compare",
    **options: Any,
) -> list[Result]:
    """Measure methods side by side, and write the results and their report.

    Args:
        out: the folder; the same call continues after a kill, and a larger budget adds to it.
        stripes: a layout; None takes `default_stripes` of the trained length.
        methods: names of `zebra.compare.methods.standard_methods`; None takes all. The unchanged checkpoint always
            comes first.
        additional: further methods.
        budget_minutes: units are measured that are estimated to fit; the cost and one window of each method always are.
        options: other fields of `Settings`.

    Raises:
        ZebraError: a text too short, a task that does not fit this length, a folder of something else, or a checkpoint
            that cannot be measured unchanged, or no checkpoint at the path of a method. Any other failure of a method
            is a result of a task `compare-failed-*`.
    """
    check_names(options, [field.name for field in fields(Settings)])
    others = dict.fromkeys(one.options["checkpoint"] for one in additional if "checkpoint" in one.options)
    digests = {checkpoint: _short_digest(checkpoint) for checkpoint in others}
    if "tasks" in options:
        options["tasks"] = names_of(options["tasks"])
    end = time.monotonic() + 60 * budget_minutes
    loading = {name: options[name] for name in LOADING if name in options}
    target = EvalTarget(checkpoint, purpose=None, **loading)
    trained = target.context_length
    layout = Stripes.parse(stripes) if stripes else default_stripes(target.config, trained or length)
    chosen = choose_methods(standard_methods(trained, length, str(layout)), methods)
    settings = Settings(
        checkpoint=checkpoint,
        text=text,
        length=length,
        methods=[*chosen, *additional],
        stripes=layout,
        **options,
    )
    data = ComparisonData(settings)
    with selection_folder(out, data.inputs()):
        comparison = _Comparison(settings, data, out, digests)
        comparison.measure([COST, FIRST_WINDOW])
        comparison.check_first()
        comparison.measure(comparison.affordable(end - time.monotonic()))
        results = comparison.results(run)
        write_results(out / "results.jsonl", results)
        write_report(results, out / "report.html", title=f"{Path(checkpoint).name}, {length:,} tokens")
    return results


def _short_digest(checkpoint: str) -> str:
    check_checkpoint(checkpoint)
    return hashlib.sha256(repr(checkpoint_digests(checkpoint)).encode()).hexdigest()[:8]


def default_stripes(config: PreTrainedConfig, length: int) -> Stripes:
    """Every second layer global, a window of an eighth of the length, and four sinks, which ALiBi does not support."""
    return Stripes(max(1, length // 8), pattern="GL", sinks=4 if supports_sinks(config) else 0)


class _Comparison:
    """The methods of one folder, their measurements and their failures.

    Attributes:
        failures: the reason, by method and kind of unit.
    """

    def __init__(self, settings: Settings, data: ComparisonData, out: Path, digests: Mapping[str, str]):
        self.settings, self.data, self.measurements = settings, data, Measurements(out / "measurements.jsonl")
        self._digests = digests
        self.failures: dict[tuple[str, str], str] = {}
        self._ceilings: Device | None = None
        self._out = out
        self._selected = self._select() if any(method.needs_selection for method in settings.methods) else None
        by_key: dict[str, Method] = {}
        for method in settings.methods:
            same = by_key.setdefault(self.key(method), method)
            if same is not method:
                console.print(f"{method.name} is the same as {same.name}: {self.key(method)}")
        self.methods = [*by_key.values()]

    def key(self, method: Method) -> str:
        """The name of a method in its measurements: its options, with the selected layout."""
        options = {name: str(value) for name, value in method.arguments(self._selected).items()}
        if "checkpoint" in method.options:
            checkpoint = method.options["checkpoint"]
            options["checkpoint"] = f"{checkpoint}@{self._digests[checkpoint]}"
        return " ".join(f"{name}={value}" for name, value in options.items()) or method.name

    def results(self, run: str) -> list[Result]:
        """The results of all measurements and failures."""
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
        """Measure those of these units that are missing, method by method, so that each is loaded once."""
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
            raise ZebraError(f"{self.methods[0].name}, the reference of the comparison, failed: {reason}")

    def affordable(self, seconds: float) -> list[Unit]:
        """The first units whose estimated time for all methods fits into `seconds`; measured ones take no time."""
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
        """Estimated seconds of a unit: a window takes as long as the first, a sample a prefill and some decoding."""
        measured = self.measurements.of(self.key(method))
        window, cost = measured.get(FIRST_WINDOW), measured.get(COST)
        if unit.kind == "window" or cost is None:
            return float(window["seconds"]) if window else 0.0
        return float(cost["prefill_seconds"] + _ANSWER_TOKENS * cost["decode_seconds"])

    def _measured(self, method: Method, units: Sequence[Unit]) -> Iterator[Unit]:
        """Measure units, and yield each when it is measured or has failed: any error fails only this method."""
        if not units:
            return
        key, settings = self.key(method), self.settings
        options = settings.loading | method.arguments(self._selected)
        model: PreTrainedModel | None = None
        try:
            checkpoint = method.options.get("checkpoint", settings.checkpoint)
            target = EvalTarget(checkpoint, purpose=None, **options)
            self.data.check_tokenizer(target)
            model = target.load()
            described = {"layout": loaded_layout_name(model, method.options.get("rope")), "model": checkpoint}
        except Exception as error:
            self.failures[key, "load"] = first_line(error)
        for unit in units:
            if model is not None and self._missing(method, unit):
                try:
                    measurement = self._measurement(model, unit)
                    self.measurements.add(key, unit, measurement | described | {"device": device_name(model.device)})
                except Exception as error:
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
        """The cost that the plan predicts with the measured ceilings of this machine, as far as it can."""
        planned: Measurement = {}
        with suppress(ZebraError):
            self._ceilings = self._ceilings or measure_ceilings(str(model.device))
            for phase, name in (("prefill", "prefill_seconds"), ("decode", "decode_seconds")):
                costs = planned_run(model, self.settings.length, phase)
                planned |= {"kv_bytes": kv_bytes(costs)} if phase == "prefill" else {}
                planned[name] = sum(self._ceilings.seconds(costs).values())
        return planned

    def _select(self) -> Stripes:
        """Select as many global layers as the given stripes have, on the text that is held back."""
        settings, stripes = self.settings, self.settings.stripes
        count = stripes.layer_types(self.data.config.get_text_config().num_hidden_layers).count(GLOBAL)
        samples = self.data.selection_samples
        if samples < MIN_SAMPLES:
            raise ZebraError(
                f"selecting layers requires {MIN_SAMPLES} sequences of {self.data.selection_length:,} tokens or more "
                "in a quarter of the text, which is too short. Give more text, or leave out the selected methods."
            )
        console.print(f"selecting {count} layers on {samples} sequences that are not scored below")
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


def planned_run(model: PreTrainedModel, length: int, phase: str) -> Run:
    """The run of a loaded model on a text, for a plan; with the sinks and full decoding, which no config records."""
    stripes, local = stripes_of(model.config), local_attention_of(model)
    dtype = str(model.dtype).removeprefix("torch.")
    return Run(
        decoder=decoder_from_config(model.config.to_dict(), name="the model"),
        stripes=stripes and replace(stripes, sinks=local.sinks),
        length=length,
        dtype=dtype if dtype in BYTES else "float32",
        phase=phase,
        self_extend=self_extend_of(model),
        full_decode=local.full_decode,
    )
