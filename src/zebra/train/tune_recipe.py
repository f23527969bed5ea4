"""The recipe of instruction tuning: that of an adaptation, with conversations in the place of texts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from zebra.train.recipe import CheckpointRecipe, EvaluationSchedule, RecipeSection


class ConversationSource(RecipeSection):
    """A source of a mixture: conversations of some files within a bucket of lengths, and their share of the tokens."""

    name: str
    files: list[str] = Field(min_length=1)
    share: float = Field(gt=0, le=1, description="of the training's tokens; the shares of all sources sum to 1")
    min_tokens: int = Field(default=0, ge=0, description="only conversations of at least so many tokens")
    max_tokens: int | None = Field(default=None, ge=1, description="only conversations of fewer tokens")


class QualityChecks(RecipeSection):
    """The gate that conversations pass before they are trained on; see `zebra.data.quality`."""

    act: Literal["drop", "flag", "off"] = Field(
        default="drop", description="what happens to a conversation with a fault"
    )
    leaks: list[str] | None = Field(
        default=None,
        min_length=1,
        description="files of evaluation documents that must not be trained on, besides the suites",
    )
    independent: float | None = Field(
        default=None,
        description="nats a token by which the document must make the answer likelier under the model",
    )


class ConversationData(RecipeSection):
    """The conversations: files, each conversation once, or a mixture of sources that fills the training's rows."""

    files: list[str] | None = Field(None, min_length=1)
    sources: list[ConversationSource] | None = Field(None, min_length=1)
    held_out: float | None = Field(None, gt=0, lt=1, description="share of the conversations that evaluate measures on")
    too_long: Literal["refuse", "drop"] = Field(
        "refuse", description="what happens to a conversation that is longer than a row and has no document to cut"
    )
    quality: QualityChecks = QualityChecks()

    @model_validator(mode="after")
    def _consistent(self) -> ConversationData:
        if (self.files is None) == (self.sources is None):
            raise ValueError(
                "the conversations are given by files or by sources, by one of them; got "
                + ("neither" if self.files is None else "both")
            )
        if self.sources is not None:
            _named_once([source.name for source in self.sources])
            total = sum(source.share for source in self.sources)
            if abs(total - 1) > 1e-6:
                raise ValueError(f"the shares of the sources sum to 1; got {total:g}; change them")
        return self


class Suite(RecipeSection):
    """Conversations to measure on, such as short ones, or long ones."""

    name: str
    files: list[str] = Field(min_length=1)


class AnswerEvaluation(EvaluationSchedule):
    """The loss on answers before, during and after: on suites of their own, or on what data holds out of a source."""

    suites: list[Suite] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> AnswerEvaluation:
        _named_once([suite.name for suite in self.suites or []])
        return self


class TuneRecipe(CheckpointRecipe):
    """Long instruction tuning (LIT): a checkpoint, perhaps a new layout, conversations, training and measuring."""

    chat_template: str | None = Field(
        None, description="plain, chatml, or a .jinja file; the checkpoint's own without it"
    )
    data: ConversationData
    evaluate: AnswerEvaluation | None = None

    @model_validator(mode="after")
    def _conversations_fit(self) -> TuneRecipe:
        if self.evaluate is not None and (self.evaluate.suites is None) == (self.data.held_out is None):
            raise ValueError(
                "what to measure on is given by evaluate.suites or by data.held_out, by one of them; got "
                + ("neither" if self.evaluate.suites is None else "both")
            )
        return self


def _named_once(names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"each has a name of its own; got {', '.join(twice)} twice")
