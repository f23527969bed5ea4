"""LoRA by peft: W + alpha / r · B A in the attention projections, with embeddings and norms trained in full.

LongLoRA (arXiv 2309.12307, section 3.3): for a longer context, LoRA on attention alone is not enough; with embeddings
and norms trained too, which are few parameters, it comes close to full fine-tuning.
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
    """Wrap a model with LoRA, and freeze everything else but `modules_to_save`.

    Trained weights are float32, whatever the dtype of the frozen ones.

    Raises:
        ZebraError: what `check_targets` raises.
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
    model.name_or_path = ""  # else peft reads the source's config at each save, and that may be of another class
    with torch.random.fork_rng(), _older_name_read():
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def reload(model: PreTrainedModel, adapter: str | os.PathLike[str]) -> PeftModel:
    """The model with the adapter that was saved in a directory."""
    with _older_name_read():
        return _peft().PeftModel.from_pretrained(model, adapter)


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the head and the embeddings share one tensor."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def check_targets(model: PreTrainedModel, lora: Lora) -> None:
    """Check that a model, on the meta device or any other, has the modules to update.

    Raises:
        ZebraError: peft is not installed; a name that no linear module has, or only a head that is tied to the
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
            f"lora.target_modules must name linear modules of the model that are not tied to its embeddings; got "
            f"{', '.join(absent)}. Choose from {', '.join(sorted(linear))}."
        )


@torch.no_grad()
def add_updates(model: PreTrainedModel, trained: PeftModel) -> None:
    """Merge a trained adapter into a model, in place: W += alpha / r * B A; modules trained in full are replaced.

    The equivalent of peft's own merge. A tied head follows the embeddings, because the model has one tensor for both,
    whatever peft ties.
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
    """Silence a warning: peft reads `is_gradient_checkpointing`, which has a new name in transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise missing_package("LoRA", "peft", "lora") from None
    return peft
