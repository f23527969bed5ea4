"""Quantised checkpoints: their method, and whether transformers can load them here.

config.json names the method, and transformers' quantiser for it loads the tensors: as they are, or dequantised where
this machine has no kernel for them. A conversion needs neither.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from zebra.errors import ZebraError, first_line

LOADING_ERRORS = (ImportError, NotImplementedError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)
"""What transformers' quantisers raise where they cannot load a checkpoint."""


def quantization_of(config: PreTrainedConfig) -> str | None:
    """The method of a quantised checkpoint, such as `fp8` or `bitsandbytes_4bit`; None where it is not quantised."""
    fields = _fields(config)
    if fields is None:
        return None
    method = fields.get("quant_method") or "no quant_method"
    bits = [width for width in (4, 8) if fields.get(f"load_in_{width}bit")]
    return f"bitsandbytes_{bits[0]}bit" if bits else str(getattr(method, "value", method))


def check_quantization(path: str | os.PathLike[str], config: PreTrainedConfig) -> None:
    """Check that transformers can load a checkpoint's weights here, if they are quantised.

    Raises:
        ZebraError: it does not know the method, or lacks a package or a device for it.
    """
    method = quantization_of(config)
    if method is None:
        return
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # it would read the weights as if they were not quantised
        raise cannot_load(path, method, "this transformers does not support the method")
    try:
        _quantizer(config)
    except LOADING_ERRORS as error:
        raise cannot_load(path, method, first_line(error)) from None


def dtype_of_checks(
    path: str | os.PathLike[str], config: PreTrainedConfig, dtype: torch.dtype | None = None
) -> torch.dtype:
    """The dtype in which a checkpoint is compared with another: float32, or bfloat16 where weights stay quantised.

    Args:
        dtype: in place of float32.

    Raises:
        ZebraError: another dtype than bfloat16 for weights that stay quantised; as `check_quantization`.
    """
    check_quantization(path, config)
    if not _stays_quantised(config):
        return dtype or torch.float32
    if dtype not in (None, torch.bfloat16):
        raise ZebraError(
            f"{path} is quantised ({quantization_of(config)}) and can be checked only in bfloat16; got {dtype}. Leave "
            "out the dtype."
        )
    return torch.bfloat16


def _stays_quantised(config: PreTrainedConfig) -> bool:
    """Whether the model computes with the weights as stored; else transformers, without a kernel here, dequantises."""
    if quantization_of(config) is None:
        return False
    return not getattr(_quantizer(config).quantization_config, "dequantize", False)


def _quantizer(config: PreTrainedConfig) -> Any:
    """transformers' quantiser for a checkpoint, after its own checks of this machine."""
    quantizer = AutoHfQuantizer.from_config(copy.deepcopy(_fields(config)), pre_quantized=True)
    quantizer.validate_environment(device_map=None, weights_only=True)
    return quantizer


def set_dequantised_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert a dequantised model to a dtype: transformers dequantises into bfloat16 whatever dtype it is given."""
    if quantization_of(model.config) is None:
        for parameter in model.parameters():  # not model.to, which would round the rope's frequencies
            parameter.data = parameter.data.to(dtype)


def cannot_load(path: str | os.PathLike[str], method: str, reason: str) -> ZebraError:
    """The error for quantised weights that cannot be loaded here."""
    return ZebraError(
        f"{path} is quantised ({method}), and transformers cannot load it here: {reason.rstrip('. ')}. "
        "Fix that, or use the checkpoint before quantisation."
    )


def _fields(config: PreTrainedConfig) -> dict[str, Any] | None:
    settings = getattr(config, "quantization_config", None)
    return settings if isinstance(settings, dict | None) else settings.to_dict()
