"""What a training step of each cell of a study costs: time in turns, memory from a fresh process, the plan beside.

Cells of one length take turns in one process, each with the model, the batch and the optimiser of its recipe. The
memory is that of model, optimiser and one step together, beside the estimate of `zebra pretrain --dry-run`.
"""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zebra.study.model  # noqa: F401  # registers the decoder of the study
from zebra import kernels
from zebra.measure import measure_ceilings, relative_error, write_ceilings
from zebra.model.attention import NAME
from zebra.model.families import model_class
from zebra.model.load import read_device
from zebra.model.local import layout_name
from zebra.model.override import get_override, set_override
from zebra.plan.cost import flops
from zebra.results import Result
from zebra.stripes import GLOBAL, LOCAL
from zebra.study.grid import step_of
from zebra.study.summary import SummaryAttention, naive_summary_attention
from zebra.train.dry_run import dry_run
from zebra.train.pretrain import config_of
from zebra.train.recipe import PretrainRecipe, Training
from zebra.train.run_results import local_attention_for
from zebra.train.trainer import optimizer_of
from zebra_bench.configs import RUN, BenchmarkConfig
from zebra_bench.models import own_loss, planned_seconds
from zebra_bench.runner import Benchmark, Call, Variant, Workload, run_benchmark


@dataclass(frozen=True, kw_only=True)
class StudyStepConfig(BenchmarkConfig):
    """Cells of one length, dtype and batch size."""

    module = "zebra_bench.study"

    recipes: tuple[PretrainRecipe, ...]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.recipes[0].train.length


def costs(recipes: Sequence[PretrainRecipe], *, run: str = RUN, **options: Any) -> tuple[list[Result], tuple[str, ...]]:
    """Results of each distinct cell, whatever its seed, and what was left out; layout and length name the cell.

    milliseconds, tokens_per_second, planned_milliseconds    of one forward and backward pass and the optimiser's step
    extra_bytes, planned_bytes                               of the same, with the model and the optimiser's states
    parameters, attention_flops                              exact; the latter of one pass

    Args:
        run: the run of the results.
        options: of `BenchmarkConfig`: repeats, memory, ceilings, seed, device.

    Raises:
        ZebraError: a cell whose gradients are not those of the formula.
    """
    batches: dict[tuple[int, str, int], dict[str, PretrainRecipe]] = defaultdict(dict)
    for recipe in recipes:
        train = recipe.train
        batch = train.length, step_of(recipe).dtype, train.per_device_train_batch_size
        batches[batch].setdefault(_layout(recipe), recipe)
    results: list[Result] = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        options.setdefault("ceilings", str(Path(folder) / "ceilings.json"))
        if not Path(options["ceilings"]).exists():  # once, so that all plans rest on the same
            write_ceilings(Path(options["ceilings"]), measure_ceilings(read_device(options.get("device")), repeats=3))
        for (_, dtype, size), cells in batches.items():
            config = StudyStepConfig(recipes=tuple(cells.values()), dtype=dtype, batch_size=size, **options)
            timed, missing = run_benchmark(config)
            if not results:
                results += [one for one in timed if one.task == "bench ceilings"]
            left_out += missing
            for layout, recipe in cells.items():
                of_cell = [one for one in timed if one.layout == layout]
                exact = (
                    replace(of_cell[0], metric=metric, value=value, n=None, low=None, high=None)
                    for metric, value in _exact(recipe)
                )
                results += [*of_cell, *exact]
    return [replace(one, run=run) for one in results], tuple(left_out)


def _exact(recipe: PretrainRecipe) -> list[tuple[str, float]]:
    """What needs no measuring."""
    return [
        ("parameters", step_of(recipe).decoder.num_parameters),
        ("attention_flops", flops(step_of(recipe))["attention"]),
        ("planned_bytes", sum(dry_run(recipe).memory.values())),
    ]


def benchmark(config: StudyStepConfig) -> Benchmark:
    """A variant for each recipe."""
    variants = []
    for recipe in config.recipes:
        planned = planned_seconds(step_of(recipe))
        prepare = partial(_prepare, recipe, config.device)
        tokens = recipe.train.length * recipe.train.per_device_train_batch_size
        work = Workload(prepare=prepare, prepared_is_extra=True, tokens=tokens, planned=planned)
        gate = partial(_error, recipe, config.device)
        layout = _layout(recipe)
        variants.append(Variant(name=f"zebra, {layout}", layout=layout, workloads=(work,), gate=gate))
    sequences = f"{config.batch_size} sequence{'s' if config.batch_size > 1 else ''}"
    return Benchmark(task=f"study step: {sequences}, {config.recipes[0].train.optimizer}", variants=tuple(variants))


def _layout(recipe: PretrainRecipe) -> str:
    return layout_name(config_of(recipe), local_attention_for(recipe))


def _model(config: Any, device: str | None) -> Any:
    torch.manual_seed(0)
    model: Any = model_class(config)._from_config(config, attn_implementation=NAME, dtype=torch.float32)
    return model.to(read_device(device)).train()


def _loss(model: Any, tokens: Tensor, train: Training) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=train.bf16):
        return own_loss(model, tokens)


def _prepare(recipe: PretrainRecipe, device: str | None) -> Call:
    """The model and its optimiser, after a first step, so that the moments are there."""
    train, config = recipe.train, config_of(recipe)
    model = _model(config, device)
    if train.activation_checkpointing:  # its name after transformers 5.17, and before
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    named = optimizer_of(train)
    if named is None:
        optimiser = torch.optim.AdamW(model.parameters(), lr=train.learning_rate, fused=True)
    else:
        optimiser = named[0]()(model, **named[1])
    shape = train.per_device_train_batch_size, train.length
    tokens = torch.randint(3, config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(model.device)

    def step() -> list[Tensor]:
        _loss(model, tokens, train).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return []

    step()
    return step


def _error(recipe: PretrainRecipe, device: str | None) -> float:
    """Loss and gradients of a small model of the same kinds against the formula, beyond a short window."""
    config = copy.deepcopy(config_of(recipe))
    kinds = list(dict.fromkeys(config.attention_kinds))
    config.attention_kinds, config.num_hidden_layers = kinds, len(kinds)
    config.layer_types = [LOCAL if kind == "local" else GLOBAL for kind in kinds]
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 2 * config.head_dim, 2, 2
    config.intermediate_size, config.vocab_size = 64, 64
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    config.sliding_window = config.sliding_window and min(config.sliding_window, 24)
    config.summary_block = min(config.summary_block, 5)
    length = min(config.max_position_embeddings, 61)
    outputs = []
    for naive in (False, True):
        model = _model(config, device)
        tokens = torch.arange(length, device=model.device)[None] % config.vocab_size
        for layer in model.model.layers if naive else ():
            if get_override(layer.self_attn) is not None:
                set_override(layer.self_attn, SummaryAttention(config.summary_block, naive_summary_attention))
        with kernels.only("reference") if naive else nullcontext():
            loss = _loss(model, tokens, recipe.train)
            loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        outputs.append([loss.detach(), gradients])
    return relative_error(*outputs)
