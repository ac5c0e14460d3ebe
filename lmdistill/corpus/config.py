"""The corpus stage's keys in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmdistill.asset_spec import AssetSpec
from lmdistill.pipeline.stage import AddedKey, StageConfig

Format = Literal["auto", "text", "jsonl", "parquet", "hub"]
Packing = Literal["concat", "isolate", "single"]
SPLITS = ("train", "valid", "test")
Tokens = Annotated[int, Field(ge=1)]


class Source(AssetSpec):
    """One data source: an asset, and where in its records the text is."""

    text: str | None = Field(default=None, description="field with the text; null: `text`, unless `messages` is set")
    messages: str | None = Field(default=None, description="field with a conversation: a list of {role, content}")
    format: Format = Field(default="auto", description="auto: by the file's ending; a folder is read as on the hub")
    unit: Literal["line", "paragraph", "document"] = Field(
        default="paragraph", description="what one document is in a plain-text file (document: the whole file)"
    )
    subset: str | None = Field(default=None, description="the hub data set's configuration, where it has several")
    split: str = Field(default="train", description="the hub data set's split to read")
    group: str | None = Field(
        default=None, description="field whose equal values stay on one side of the train/valid split"
    )
    success: Annotated[str | None, AddedKey()] = Field(
        default=None, description="field with how often models succeed at the item, 0 to 1; a curriculum can go by it"
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(default=None, description="read only the first so many records")

    @model_validator(mode="after")
    def _one_field(self) -> Source:
        if self.text is not None and self.messages is not None:
            raise ValueError("name `text` or `messages`, not both")
        return self

    @property
    def field(self) -> str:
        """The field that is read."""
        return self.messages or self.text or "text"


class CorpusConfig(StageConfig):
    """Which data, and how it becomes rows of tokens."""

    sources: Annotated[list[Source], Field(min_length=1)] = Field(description="data files or data sets, in order")
    sequence_length: Annotated[int, Field(ge=2, le=1_048_576)] = Field(default=1024, description="tokens in a row")
    packing: Packing = Field(
        default="concat",
        description="concat: documents in a row see each other; isolate: same rows, trainers reset at each document "
        "(exact for attention, a short convolution of kernel k sees k-1 tokens back); single: one document each",
    )
    separator: str = Field(
        default="eos",
        description="between texts: eos or a token (after each), bos (before each), none; conversations need none",
    )
    assistant_only: bool = Field(
        default=True, description="in conversations only the assistant's turns are targets; false: every token"
    )
    deduplicate: Literal["exact", "none"] = Field(default="exact", description="drop documents with equal text")
    valid_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.05, description="share of documents held out, chosen by a hash of their group"
    )
    test_fraction: Annotated[float, AddedKey(), Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of documents in a split `test`, which no choice is made on; beside valid's"
    )
    train_tokens: Tokens | None = Field(default=None, description="at most so many training tokens; null: all")
    valid_tokens: Tokens | None = Field(
        default=None, description="at most so many tokens of each held-out split; null: all"
    )
    shuffle_seed: int = Field(default=0, description="another seed, another order of documents; the split stays")
    tokenizer: AssetSpec | None = Field(default=None, description="null: the teacher's")

    @model_validator(mode="after")
    def _something_to_train_on(self) -> CorpusConfig:
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError("valid_fraction and test_fraction together leave nothing to train on")
        return self

    @model_validator(mode="after")
    def _caps_fill_a_row(self) -> CorpusConfig:
        for name, cap in (("train_tokens", self.train_tokens), ("valid_tokens", self.valid_tokens)):
            if cap is not None and cap < self.sequence_length:
                raise ValueError(f"{name} ({cap}) is less than one row of sequence_length ({self.sequence_length})")
        return self

    def row_cap(self, split: str) -> int | None:
        """The most rows that `split` may have; None: as many as there are."""
        cap = self.train_tokens if split == "train" else self.valid_tokens
        return None if cap is None else cap // self.sequence_length
