"""Checkpoints of transformers: which family can be striped and how, loading, converting.

A conversion changes `config.json` and nothing else. Where the source's own class ignores `layer_types`, the target is
a stock class with the same tensors that reads them; plain transformers and vLLM load it without us.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from zebra import records
from zebra.model.attention import NAME
from zebra.model.cache import StripedCache
from zebra.refusal import Refusal
from zebra.stripes import GLOBAL, LOCAL, Stripes

DENSE = "dense"
"""The layout of a model without stripes, as rows and tables call it."""


@dataclass(frozen=True)
class Route:
    """How a family is striped: the stock class that reads its tensors and a layer's kind, and what to write for it."""

    target: str
    because: str
    writes: tuple[tuple[str, Any], ...] = ()
    refuses: Callable[[PreTrainedConfig], str | None] = lambda config: None


def _no_route_to_cwm(config: PreTrainedConfig) -> str | None:
    if getattr(config, "attention_bias", False):
        return "it has biases in its attention projections, which the stock class cwm would drop"
    for token in ("bos_token_id", "eos_token_id"):
        if getattr(config, token, None) is None:
            return f"its config.json has no {token}, and the stock class cwm would bring its own; write the right one"
    return None


ROUTES: dict[str, Route] = {
    "llama": Route("cwm", "llama ignores layer_types; cwm has the same tensors", refuses=_no_route_to_cwm),
    "mistral": Route("cwm", "mistral ignores layer_types; cwm has the same tensors", refuses=_no_route_to_cwm),
    "cwm": Route("cwm", "reads layer_types itself", refuses=_no_route_to_cwm),
    "qwen2": Route("qwen2", "reads layer_types itself", writes=(("use_sliding_window", True),)),
    "qwen3": Route("qwen3", "reads layer_types itself", writes=(("use_sliding_window", True),)),
}
"""The family table: `model_type` of the source to its route. The contract tests walk it."""


def route(config: PreTrainedConfig) -> Route:
    """The family's route.

    Raises:
        Refusal: no route for the family, or none for this member of it, with the reason.
    """
    found = ROUTES.get(config.model_type)
    if found is None:
        raise Refusal(
            f"there is no route for the family {config.model_type!r}; routes exist for {', '.join(ROUTES)}. "
            "See CONTRIBUTING.md, how to add a host family."
        )
    reason = found.refuses(config)
    if reason is not None:
        raise Refusal(f"this {config.model_type} checkpoint cannot be served: {reason}.")
    return found


def striped(config: PreTrainedConfig, stripes: Stripes) -> PreTrainedConfig:
    """The config of the same model with these stripes, every field written out: class defaults differ."""
    taken = route(config)
    layer_types = stripes.layer_types(config.num_hidden_layers)
    target_class = type(AutoConfig.for_model(taken.target))
    known = {f.name for f in fields(target_class)}
    foreign = {f.name for f in fields(type(config))} - known
    kept = {
        name: value
        for name, value in config.to_dict().items()
        if name not in foreign | {"model_type", "architectures", "transformers_version"}
    }
    kept |= dict(taken.writes) | {"layer_types": list(layer_types), "sliding_window": stripes.window}
    kept["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    made = target_class(**kept)
    made.architectures = [host_class(made).__name__]
    return made


def stripes_of(config: PreTrainedConfig) -> Stripes | None:
    """The layout that a config asks for; None where every layer is global."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [LOCAL if window else GLOBAL] * config.num_hidden_layers
    return Stripes.of(kinds, window) if window and LOCAL in kinds else None


def layout(config: PreTrainedConfig) -> str:
    """The layout in the short notation, `dense` where every layer is global."""
    return str(stripes_of(config) or DENSE)


def host_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The stock class that runs a config."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def read_config(path: str | os.PathLike[str]) -> PreTrainedConfig:
    """The config of a checkpoint on disk or in the hub's cache.

    Raises:
        Refusal: no checkpoint there, a broken config.json, a family without a route, or a config whose stripes its
            own class would ignore while its cache obeys them (`generate` would be silently wrong).
    """
    where = Path(path)
    if where.exists() and not (where / "config.json").is_file():
        raise Refusal(f"{path} is not a checkpoint: it has no config.json. Give a directory that transformers saved.")
    if not where.exists() and (where.is_absolute() or str(path).count("/") != 1 or str(path).startswith(".")):
        raise Refusal(f"there is no checkpoint at {path}. Give the path of a directory that transformers saved.")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Refusal(f"the config of {path} cannot be read: {_first_line(error)}") from None
    route(config)
    if getattr(config, "layer_types", None) is not None and config.model_type in ("llama", "mistral"):
        raise Refusal(
            f"{path} is a {config.model_type} with layer_types, which its class ignores while its cache obeys them. "
            "Remove layer_types from its config.json, then run `zebra convert`."
        )
    return config


def load_tokenizer(path: str | os.PathLike[str], config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        Refusal: there is none, or it makes ids that the model has no embedding for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # a broken tokenizer.json ends in a bare Exception of the tokenizers library
        raise Refusal(f"the tokenizer of {path} cannot be read: {_first_line(error)}") from None
    if largest >= config.vocab_size:
        raise Refusal(
            f"the tokenizer of {path} makes ids up to {largest}, but the model has {config.vocab_size} embeddings. "
            "Use the tokenizer that the model was trained with."
        )
    return tokenizer


def check_weights(path: str | os.PathLike[str], config: PreTrainedConfig) -> list[Path]:
    """The weight files of a checkpoint on disk, after reading their headers.

    Raises:
        Refusal: no weights, a missing, corrupt or truncated shard, tensors that are missing or of another shape than
            the config says.
    """
    where = Path(path)
    index = next(iter(sorted(where.glob("*.safetensors.index.json")) + sorted(where.glob("*.bin.index.json"))), None)
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index else None
    except (ValueError, KeyError, AttributeError):
        raise Refusal(f"{index} is not an index of shards. Copy it from the source again.") from None
    if names is None:
        names = {p.name for p in where.glob("model.safetensors")} or {p.name for p in where.glob("pytorch_model.bin")}
    if not names:
        raise Refusal(f"{path} has no weights: neither model.safetensors nor an index of shards. Copy them there.")
    files = [where / name for name in sorted(names)]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise Refusal(f"{path} lacks the shards {', '.join(absent)} that its index names. Copy them there.")
    if all(file.suffix == ".safetensors" for file in files):
        _check_shapes(path, config, files)
    return files


def _check_shapes(path: str | os.PathLike[str], config: PreTrainedConfig, files: list[Path]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise Refusal(f"{file} is corrupt or truncated: {_first_line(error)}. Copy it again.") from None
    with torch.device("meta"):
        model = host_class(config)(config)
    # Of two tied tensors either may be the one that was saved.
    twins = dict(model.all_tied_weights_keys) if config.tie_word_embeddings else {}
    twins |= {second: first for first, second in twins.items()}
    for name, tensor in model.state_dict().items():
        if name in shapes and shapes[name] != tuple(tensor.shape):
            raise Refusal(
                f"{path}: config.json asks for {name} of shape {tuple(tensor.shape)}, the weights have {shapes[name]}. "
                "Config and weights are of different models."
            )
        if name not in shapes and twins.get(name) not in shapes:
            raise Refusal(
                f"{path}: the weights lack {name}, which config.json asks for. Config and weights differ, or a shard is gone."
            )


@functools.cache
def _with_striped_cache(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The host's class, whose `generate` makes our bounded cache where the caller names none."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's `generate`, with the bounded cache of `zebra.model.cache` as its default."""
        named = kwargs.get("generation_config") or self.generation_config
        wants_own = (
            kwargs.get("past_key_values") is None
            and kwargs.get("use_cache", named.use_cache) is not False
            and kwargs.get("cache_implementation", named.cache_implementation) is None
        )
        if wants_own:
            kwargs["past_key_values"] = StripedCache(self.config)
        return super(made, self).generate(*args, **kwargs)

    # The name stays the host's: it is saved as the checkpoint's architecture.
    made = type(
        cls.__name__,
        (cls,),
        {"generate": generate, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__},
    )
    return made


def load(
    path: str | os.PathLike[str],
    *,
    stripes: Stripes | str | None = None,
    self_extend: Any = None,
    **from_pretrained_arguments: Any,
) -> PreTrainedModel:
    """A checkpoint as a transformers model that runs attention "zebra", with stripes where asked.

    It is the host's own class: it trains, saves, generates and evaluates like any other. `generate` uses the bounded
    cache. Do not call `set_attn_implementation` on it: the host would then compute local layers densely.

    Args:
        path: a directory that transformers saved, or a name in the hub.
        stripes: a layout, or its notation such as "GLLL:512"; None keeps what the checkpoint has.
        self_extend: reserved for Self-Extend, which this version does not have: must be None.
        from_pretrained_arguments: handed to `from_pretrained` (dtype, device_map, ...).

    Raises:
        Refusal: no or a corrupt checkpoint, a family without a route, a layout that does not fit the model.
    """
    if self_extend is not None:
        raise Refusal("Self-Extend is not in this version of zebra; self_extend must be None. Use stripes alone.")
    if "attn_implementation" in from_pretrained_arguments:
        raise Refusal(
            f'zebra.load runs attention "{NAME}"; for another attn_implementation use from_pretrained of transformers.'
        )
    config = read_config(path)
    if stripes is not None:
        config = striped(config, Stripes.parse(stripes) if isinstance(stripes, str) else stripes)
    if Path(path).exists():
        check_weights(path, config)
    try:
        model, info = _with_striped_cache(host_class(config)).from_pretrained(
            path, config=config, attn_implementation=NAME, output_loading_info=True, **from_pretrained_arguments
        )
    except (OSError, SafetensorError) as error:
        raise Refusal(f"the checkpoint {path} cannot be loaded: {_first_line(error)}") from None
    if info["missing_keys"]:
        raise Refusal(f"{path}: the weights lack {', '.join(sorted(info['missing_keys']))}. Config and weights differ.")
    return model


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], stripes: Stripes | str
) -> Path:
    """A copy of a checkpoint with stripes, which plain transformers loads: only its config.json differs.

    Weight files are hard links where the file system allows, copies elsewhere; never rewritten. `zebra.json` beside
    them keeps layout, source and versions. The target appears whole or not at all.

    Raises:
        Refusal: what `load` refuses, and a target that exists or is the source.
    """
    source, target = Path(source), Path(target)
    stripes = Stripes.parse(stripes) if isinstance(stripes, str) else stripes
    config = read_config(source)
    made = striped(config, stripes)
    weights = {file.name for file in check_weights(source, config)}
    if target.exists() and source.samefile(target):
        raise Refusal(f"source and target are the same directory, {source}. Name another target.")
    with staged(target) as aside:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name not in ("config.json", "zebra.json"):
                _link(file, aside / file.name) if file.name in weights else shutil.copyfile(file, aside / file.name)
        write_config(made, aside)
        write_card(aside, made, source=source)
    return target


class staged:  # noqa: N801
    """A context whose directory becomes `target` by one rename when its body ends well, and vanishes otherwise.

    Raises:
        Refusal: the target exists and is not an empty directory.
    """

    def __init__(self, target: str | os.PathLike[str]):
        self.target = Path(target)
        self.aside = self.target.with_name(f".{self.target.name}.{os.getpid()}.partial")

    def __enter__(self) -> Path:
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise Refusal(f"the target {self.target} exists already. Name another, or remove it first.")
        self.aside.mkdir(parents=True)
        return self.aside

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.replace(self.aside, self.target)
        else:
            shutil.rmtree(self.aside, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    real = source.resolve()  # the hub's cache holds symbolic links
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def write_config(config: PreTrainedConfig, where: Path) -> None:
    """Write config.json with every field of its class, defaults too: another version's defaults may differ."""
    own = {f.name for f in fields(type(config))} - {f.name for f in fields(PreTrainedConfig)}
    whole = config.to_dict()
    written = config.to_diff_dict() | {name: whole[name] for name in own if name in whole}
    written.pop("_name_or_path", None)
    text = json.dumps(written, indent=2, sort_keys=True) + "\n"
    (where / "config.json").write_text(text, encoding="utf-8")


def write_card(where: Path, config: PreTrainedConfig, *, source: Path, **more: Any) -> None:
    """Write zebra.json: the layout, where it came from, and with which versions."""
    stripes = stripes_of(config)
    card = {
        "layout": layout(config),
        "window": stripes.window if stripes else None,
        "window_counts": "keys that a query sees, its own included: 0 <= i - j < window",
        "layer_types": getattr(config, "layer_types", None),
        "source": str(source),
        "source_config_sha256": hashlib.sha256((source / "config.json").read_bytes()).hexdigest(),
        "versions": records.versions(),
        "commit": records.commit(),
        **more,
    }
    (where / "zebra.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
