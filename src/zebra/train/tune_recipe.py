"""The recipe of instruction tuning: like that of an adaptation, but with conversations in place of texts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from zebra.train.recipe import (
    CheckpointRecipe,
    EvaluationSchedule,
    MixtureSource,
    RecipeSection,
    check_names,
    check_one_of,
    check_sources,
    first_changed,
)


class QualityChecks(RecipeSection):
    """The checks that conversations must pass before training; see `zebra.data.quality`."""

    act: Literal["drop", "flag", "off"] = Field(default="drop", description="what becomes of one with a fault")
    leaks: list[str] | None = Field(default=None, min_length=1, description="files not to be trained on, as the suites")
    independent: float | None = Field(
        default=None, description="nats a token by which the document must make the answer likelier under the model"
    )

    @model_validator(mode="after")
    def _checked(self) -> QualityChecks:
        if self.act == "off" and (key := first_changed(self, "leaks", "independent")):
            raise ValueError(f"{key} is a check, but act off turns all checks off; remove it, or set act to flag")
        return self


class ConversationData(RecipeSection):
    """The conversations: files, each conversation once per epoch, or a mixture of sources that fills all sequences."""

    files: list[str] | None = Field(None, min_length=1)
    sources: list[MixtureSource] | None = Field(None, min_length=1)
    held_out: float | None = Field(None, gt=0, lt=1, description="share of the conversations that evaluate measures on")
    too_long: Literal["refuse", "drop"] = Field(
        "refuse", description="what happens to a conversation that is longer than a sequence and has no document to cut"
    )
    quality: QualityChecks = QualityChecks()

    @model_validator(mode="after")
    def _consistent(self) -> ConversationData:
        check_sources("the data", self.files, self.sources)
        return self

    @property
    def by_source(self) -> list[MixtureSource]:
        """The sources of the mixture; `files` are a single source with all tokens."""
        return self.sources or [MixtureSource(name="instructions", share=1.0, files=self.files or [])]


class Suite(RecipeSection):
    """Conversations to evaluate on, such as short ones or long ones."""

    name: str
    files: list[str] = Field(min_length=1)


class AnswerEvaluation(EvaluationSchedule):
    """The loss on answers before, during and after training, on suites or on held-out conversations of the sources."""

    suites: list[Suite] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> AnswerEvaluation:
        check_names([suite.name for suite in self.suites or []])
        return self


class TuneRecipe(CheckpointRecipe):
    """Long instruction tuning (LIT): a checkpoint, perhaps a new layout, conversations, training and evaluation."""

    chat_template: str | None = Field(
        None, description="plain, chatml, or a .jinja file; the checkpoint's own without it"
    )
    data: ConversationData
    evaluate: AnswerEvaluation | None = None

    @property
    def suites(self) -> list[Suite]:
        """The suites to evaluate on; empty if the evaluation uses held-out conversations, or if there is none."""
        return (self.evaluate and self.evaluate.suites) or []

    @model_validator(mode="after")
    def _consistent(self) -> TuneRecipe:
        if self.evaluate is not None:
            keys = {"evaluate.suites": self.evaluate.suites, "data.held_out": self.data.held_out}
            check_one_of("evaluate", keys)
        if self.lora and "lm_head" in self.lora.target_modules:
            raise ValueError("lora.target_modules cannot include lm_head, which trl does not support; remove it")
        return self
