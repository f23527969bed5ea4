"""Recipes: one YAML file is one experiment. Unknown keys and contradictions are errors before any work.

A key that corresponds to a field of `transformers.TrainingArguments` or of peft's `LoraConfig`, or to an argument of
`datasets`, has the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from zebra.model.rope import Rope
from zebra.stripes import Stripes

_LARGEST = 2**32


class RecipeSection(BaseModel):
    """A section of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _not_huge(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError("an integer must be at most 2^32; lower it")
        return value


class TextSource(RecipeSection):
    """Text files, and how they are split into documents."""

    files: list[str] | None = Field(None, min_length=1, description="files, folders, globs, from the working directory")
    separator: str | None = Field(None, description="splits a text file into documents; without it a file is one")
    field: str | None = Field(
        None, description="the field of a record, or column of a table, with the text; text where absent"
    )
    join: bool = Field(False, description="join documents into long ones; otherwise packed documents are kept apart")
    append_eos: bool = Field(False, description="put the end-of-text token after each document")


class MixtureSource(RecipeSection):
    """A source of a mixture: documents of some files within a range of lengths, and their share of the tokens."""

    name: str
    files: list[str] = Field(min_length=1)
    share: float = Field(gt=0, le=1, description="of the training's tokens; the shares of all sources sum to 1")
    min_tokens: int = Field(default=0, ge=0, description="only documents or conversations of at least so many tokens")
    max_tokens: int | None = Field(default=None, ge=1, description="only documents or conversations of fewer tokens")

    @model_validator(mode="after")
    def _consistent(self) -> MixtureSource:
        if self.max_tokens is not None and self.max_tokens <= self.min_tokens:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must be above min_tokens ({self.min_tokens}); change one of them"
            )
        return self


class TextMixtureSource(MixtureSource):
    """A source of texts."""

    separator: str | None = None
    field: str | None = None


class RecallSource(RecipeSection):
    """Generated documents that state facts and ask for them later (zebra.data.recall), mixed with the text."""

    share: float = Field(gt=0, le=1, description="of the training's sequences after hold; the others are text")
    first: int = Field(64, ge=2, description="tokens of a document at the beginning")
    hold: float = Field(0.25, ge=0, lt=1, description="part of the training with documents of first tokens, no text")
    until: float = Field(0.75, gt=0, le=1, description="part of the training when documents reach train.length")

    @model_validator(mode="after")
    def _consistent(self) -> RecallSource:
        if self.until <= self.hold:
            raise ValueError(f"until ({self.until:g}) must be above hold ({self.hold:g}); change one of them")
        return self


class TextData(TextSource):
    """The training text: files, each document once per epoch, or a mixture of sources that fills all sequences."""

    sources: list[TextMixtureSource] | None = Field(None, min_length=1)
    recall: RecallSource | None = Field(None, description="generated documents of recall among the sequences of text")
    held_out: float | None = Field(None, gt=0, lt=1, description="share of the documents that evaluate measures on")
    deduplicate: bool = Field(True, description="keep the first of documents with the same text")
    num_proc: int = Field(1, ge=1, description="processes that tokenise")
    cache_dir: str | None = Field(None, description="folder of the token cache; the user's cache folder where absent")

    @model_validator(mode="after")
    def _consistent(self) -> TextData:
        check_sources("the text", self.files, self.sources)
        if self.sources is not None and (key := first_changed(self, "separator", "field")):
            raise ValueError(f"{key} applies only to files; set it in each source")
        return self

    @property
    def by_source(self) -> list[TextMixtureSource]:
        """The sources of the mixture; `files` are a single source with all tokens."""
        return self.sources or [
            TextMixtureSource(
                name="data.files", files=self.files or [], share=1.0, separator=self.separator, field=self.field
            )
        ]


def check_sources(subject: str, files: list[str] | None, sources: Sequence[MixtureSource] | None) -> None:
    """Check that the data are either files, or sources with different names whose shares sum to 1."""
    check_one_of(subject, {"files": files, "sources": sources})
    if sources is not None:
        check_names([source.name for source in sources])
        total = sum(source.share for source in sources)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of the sources must sum to 1; got {total:g}; change them")


def check_one_of(subject: str, keys: Mapping[str, object]) -> None:
    """Check that exactly one of two keys has a value."""
    values = [value for value in keys.values() if value is not None]
    if len(values) != 1:
        raise ValueError(f"{subject} requires either {' or '.join(keys)}; got {'both' if values else 'neither'}")


def check_names(names: list[str]) -> None:
    """Check that no name appears twice."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"names must be unique; got {', '.join(twice)} twice")


def first_changed(section: BaseModel, *names: str) -> str | None:
    """The first of the keys whose value differs from its default; None if none does."""
    return next((name for name in names if getattr(section, name) != type(section).model_fields[name].default), None)


class Training(RecipeSection):
    """Sequences, steps and the optimiser."""

    length: int = Field(ge=2, description="tokens in a sequence")
    max_steps: int = Field(ge=1, description="optimiser steps")
    per_device_train_batch_size: int = Field(
        1, ge=1, le=2**20, description="sequences of one forward pass on one device"
    )
    gradient_accumulation_steps: int = Field(1, ge=1, le=2**20, description="forward passes of one optimiser step")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: the layers' matrices, AdamW the rest")
    learning_rate: float = Field(gt=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    device: Literal["best", "cuda"] = Field("best", description="cuda: an error on a machine without a GPU")
    bf16: bool = Field(False, description="bfloat16 autocast; weights stay float32")
    activation_checkpointing: Literal[True, False, "auto"] = Field(
        "auto", description="compute activations again in the backward; auto: where a step does not fit without it"
    )
    compile: bool = Field(False, description="compile each layer by torch: faster steps after a first one of a minute")
    seed: int = Field(0, ge=0, lt=2**32)
    logging_steps: int = Field(10, ge=1)
    save_steps: int = Field(100, ge=1)
    save_total_limit: int = Field(2, ge=2, description="at least 2, so that one is complete after a kill inside a save")

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.save_steps % self.logging_steps:
            raise ValueError(
                f"save_steps ({self.save_steps}) must be a multiple of logging_steps ({self.logging_steps}), "
                "so that a resumed run logs the same losses; change one of them"
            )
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) cannot exceed max_steps ({self.max_steps}); lower it")
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            raise ValueError(
                f"lr_scheduler_type constant has no warm-up; got warmup_steps {self.warmup_steps}. "
                "Set lr_scheduler_type to constant_with_warmup, or warmup_steps to 0"
            )
        return self


class Lora(RecipeSection):
    """LoRA in place of full fine-tuning."""

    r: int = Field(16, ge=1, le=2**14, description="the rank")
    lora_alpha: float | None = Field(None, gt=0, description="the update is multiplied by lora_alpha / r; 2 r without")
    target_modules: tuple[str, ...] = Field(("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1, strict=False)
    modules_to_save: tuple[Literal["embeddings", "norms"], ...] = Field(
        ("embeddings", "norms"), strict=False, description="modules that are trained in full as well (LongLoRA)"
    )
    base_dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the frozen weights")
    merge: bool = Field(True, description="write a whole checkpoint; else the adapter, over run/base")


class Parallel(RecipeSection):
    """How the processes of a launcher split the work: their number is data x shard x sequence."""

    data: int | None = Field(default=None, ge=1, description="copies of the weights; as many as fit without it")
    shard: int = Field(
        default=1, ge=1, description="processes with sequences of their own that split the weights (FSDP2)"
    )
    sequence: int = Field(
        default=1, ge=1, description="processes that split each sequence (zebra.model.sequence_parallel)"
    )
    ring: bool = Field(
        default=False,
        description="global layers pass keys and values round these processes: less memory, one exchange more",
    )


class EvaluationSchedule(RecipeSection):
    """When a model is evaluated during training; each kind of training adds how."""

    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations during training; none without it")


class PerplexityEvaluation(TextSource, EvaluationSchedule):
    """Perplexity by position before, during and after training, on files of its own or on held-out documents."""

    length: int = Field(ge=2, description="tokens of context")
    beyond: int | None = Field(
        None, description="a longer context that is measured before and after too, beyond the trained length or not"
    )
    convention: Literal["disjoint", "strided", "truncated"] = "disjoint"
    bos: bool | None = Field(
        None,
        description="begin each window with the tokenizer's BOS token; as the tokenizer does without it",
    )
    first_bucket: int = Field(256, ge=1, description="positions of the first bucket; each next ends at twice as many")
    recall: int | None = Field(
        None, ge=1, description="documents of recall that are measured too, by distance; of beyond as many tokens"
    )


class Recipe(RecipeSection):
    """What every training has: a run directory, a layout, the settings of training, and when the model is evaluated."""

    run: str = Field(description="the run's directory")
    stripes: str | None = Field(None, description="the layout to train, such as GLLL:512; the model's own without it")
    train: Training
    parallel: Parallel = Parallel()
    evaluate: EvaluationSchedule | None = None

    @field_validator("stripes")
    @classmethod
    def _notation(cls, stripes: str | None) -> str | None:
        return None if stripes is None else str(Stripes.parse(stripes))

    @model_validator(mode="after")
    def _steps_run(self) -> Self:
        steps = self.evaluate.eval_steps if self.evaluate else None
        if steps is not None and steps > self.train.max_steps:
            raise ValueError(
                f"evaluate.eval_steps ({steps}) cannot exceed train.max_steps ({self.train.max_steps}); lower it"
            )
        if self.parallel.ring and self.parallel.sequence == 1:
            raise ValueError("parallel.ring requires parallel.sequence above 1; raise it, or remove parallel.ring")
        if self.train.compile and self.parallel.sequence > 1:
            raise ValueError("train.compile does not support parallel.sequence above 1; remove one of them")
        if self.train.optimizer == "muon" and self.parallel.shard > 1:
            raise ValueError("train.optimizer muon does not support parallel.shard above 1; use adamw")
        return self

    @property
    def longest(self) -> int:
        """The longest length in tokens to train or evaluate at; `evaluate.beyond` does not count."""
        return max(self.train.length, getattr(self.evaluate, "length", 0))


class TextRecipe(Recipe):
    """A training on text, evaluated by perplexity."""

    data: TextData
    evaluate: PerplexityEvaluation | None = None

    @model_validator(mode="after")
    def _texts_fit(self) -> Self:
        recall = self.data.recall
        if recall is not None and recall.first > self.train.length:
            raise ValueError(
                f"data.recall.first ({recall.first}) cannot exceed train.length ({self.train.length}); lower it"
            )
        if self.evaluate is not None:
            files, held_out = self.evaluate.files, self.data.held_out
            check_one_of("evaluate", {"evaluate.files": files, "data.held_out": held_out})
            beyond, length = self.evaluate.beyond, self.evaluate.length
            if beyond is not None and beyond <= length:
                raise ValueError(f"evaluate.beyond ({beyond}) must be above evaluate.length ({length}); raise it")
            if self.evaluate.recall and recall is None:
                raise ValueError("evaluate.recall requires data.recall; add that, or remove evaluate.recall")
            if files is None and (key := first_changed(self.evaluate, "separator", "field", "append_eos")):
                raise ValueError(f"evaluate.{key} applies only to evaluate.files; remove it")
        return self


class CheckpointRecipe(Recipe):
    """A training that starts from a checkpoint."""

    model: str = Field(description="the checkpoint to train")
    shape: str | None = Field(None, description="built-in shape that --dry-run takes where the checkpoint is absent")
    rope: str | None = Field(None, description="a change of the rope: linear:8, yarn:8, llama3:8 or base:5000000")
    lora: Lora | None = Field(None, description="train low-rank updates; all weights without it")

    @field_validator("rope")
    @classmethod
    def _rope_notation(cls, rope: str | None) -> str | None:
        parsed = None if rope is None else Rope.parse(rope)
        return None if parsed is None or parsed.kind == "none" else str(parsed)

    @model_validator(mode="after")
    def _precise_enough(self) -> Self:
        if self.lora and self.lora.base_dtype == "bfloat16" and not self.train.bf16:
            raise ValueError("lora.base_dtype bfloat16 requires train.bf16; change one of them")
        return self


class AdaptRecipe(TextRecipe, CheckpointRecipe):
    """Long-context adaptation (LCAT): a checkpoint, its new layout, the text, training and evaluation."""


class NewTokenizer(RecipeSection):
    """A byte-level BPE tokenizer to train on the text (zebra.train.tokenizer)."""

    vocab_size: int = Field(ge=257, description="tokens: 256 bytes, the end of text, and merges")
    digits: int = Field(3, ge=1, le=3, description="digits in a token: a longer number is cut into groups of so many")


class PretrainRecipe(TextRecipe):
    """Training from scratch: a config, a tokenizer, the text, training and evaluation."""

    model: dict[str, Any] = Field(description="model_type and fields of that config class in transformers")
    tokenizer: str | NewTokenizer = Field(description="a directory that has one, or what to train one by")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the checkpoint that is written")

    @model_validator(mode="after")
    def _named(self) -> PretrainRecipe:
        if "model_type" not in self.model:
            raise ValueError("model must have a model_type, such as llama; add it")
        return self
