"""Low-rank adaptation by peft: W + alpha / r · B A in the attention projections, embeddings and norms in full.

LongLoRA (arXiv 2309.12307, section 3.3): for a longer context the low-rank update of attention is not enough by
itself; with the embeddings and the norms trained as well, which are few parameters, it comes close to full training.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from zebra.errors import ZebraError
from zebra.train.recipe import Lora

if TYPE_CHECKING:
    from peft import PeftModel


def wrap(model: PreTrainedModel, lora: Lora, *, seed: int) -> PeftModel:
    """The model with trainable low-rank updates; everything that is not to be trained is frozen.

    What is trained is float32, whatever the frozen weights are.

    Raises:
        ZebraError: peft is not installed, no module of these names.
    """
    peft = _peft()
    tied = model.get_output_embeddings() if model.config.tie_word_embeddings else None
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
        ensure_weight_tying=bool(model.config.tie_word_embeddings and "embeddings" in saved),
        task_type="CAUSAL_LM",
    )
    model.name_or_path = ""  # at each save peft would read the source's config, which may be of another class
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def reload(model: PreTrainedModel, adapter: str | os.PathLike[str]) -> PeftModel:
    """The model with the updates that were saved in a directory."""
    return _peft().PeftModel.from_pretrained(model, adapter)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ZebraError("LoRA needs peft, which is not installed: pip install 'zebra-llm[lora]'.") from None
    return peft
