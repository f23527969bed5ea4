"""Low-rank adaptation by peft: W + alpha / r · B A in the attention projections, embeddings and norms in full.

LongLoRA (arXiv 2309.12307, section 3.3): for a longer context the low-rank update of attention is not enough by
itself; with the embeddings and the norms trained as well, which are few parameters, it comes close to full training.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from zebra.errors import ZebraError, missing_package
from zebra.train.recipe import Lora

if TYPE_CHECKING:
    from peft import PeftModel


def wrap(model: PreTrainedModel, lora: Lora, *, seed: int) -> PeftModel:
    """The model with trainable low-rank updates; everything that is not to be trained is frozen.

    What is trained is float32, whatever the frozen weights are.

    Raises:
        ZebraError: peft is not installed, no module of these names.
    """
    peft, tied = _peft(), has_tied_head(model)
    check_targets(model, lora)
    saved, embeddings = lora.modules_to_save, model.get_input_embeddings()
    whole = [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if ("embeddings" in saved and module is embeddings)
        or ("norms" in saved and type(module).__name__.endswith("Norm"))
    ]
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=2 * lora.r if lora.lora_alpha is None else lora.lora_alpha,
        target_modules=list(lora.target_modules),
        modules_to_save=list(dict.fromkeys(whole)),
        ensure_weight_tying=tied and "embeddings" in saved,
        task_type="CAUSAL_LM",
    )
    model.name_or_path = ""  # at each save peft would read the source's config, which may be of another class
    with torch.random.fork_rng(), _older_name_read():
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def reload(model: PreTrainedModel, adapter: str | os.PathLike[str]) -> PeftModel:
    """The model with the updates that were saved in a directory."""
    with _older_name_read():
        return _peft().PeftModel.from_pretrained(model, adapter)


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the head and the embeddings are one tensor."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def check_targets(model: PreTrainedModel, lora: Lora) -> None:
    """Check that a model, on the meta device or any other, has the modules to update.

    Raises:
        ZebraError: peft is not installed; a name that no linear module has, or that of a head that is tied to the
            embeddings.
    """
    _peft()
    tied = model.get_output_embeddings() if has_tied_head(model) else None
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not tied
    }
    absent = sorted(set(lora.target_modules) - linear)
    if absent:
        raise ZebraError(
            f"lora.target_modules names {', '.join(absent)}, which this model does not have or ties to its embeddings; "
            f"its own linear modules are {', '.join(sorted(linear))}. Name some of those."
        )


@torch.no_grad()
def add_updates(model: PreTrainedModel, trained: PeftModel) -> None:
    """Add to a model what was trained over it: to each W its alpha / r * B A, and what was trained whole in its place.

    The twin of peft's own merge. A head that is tied to the embeddings follows them because the model has one tensor
    for both, whatever peft ties.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    head = trained.get_output_embeddings()
    for name, module in trained.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            a, b = (one["default"].get_parameter("weight") for one in (module.lora_A, module.lora_B))
            weight = model.get_parameter(f"{name}.weight")
            weight += module.scaling["default"] * (b @ a).to(weight)
        elif isinstance(module, ModulesToSaveWrapper) and module is not head:
            model.get_submodule(name).load_state_dict(module.modules_to_save["default"].state_dict())


@contextmanager
def _older_name_read() -> Iterator[None]:
    """peft asks a model for `is_gradient_checkpointing`, which transformers has under a newer name too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise missing_package("LoRA", "peft", "lora") from None
    return peft
