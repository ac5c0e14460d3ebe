"""The keys of a curriculum in a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class CurriculumConfig(BaseModel):
    """Easy rows first; every row is trained on as often as without a curriculum."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    difficulty: str = Field(default="teacher_loss", description="what makes a row hard, by name, see below")
    buckets: Annotated[int, Field(ge=2, le=4096)] = Field(
        default=8, description="equal parts of the rows, by difficulty; rows of a bucket are shuffled"
    )
    pacing: str = Field(default="linear", description="how buckets are opened in training, by name, see below")
    start: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the rows, the easiest, that is open at the beginning: at least a bucket"
    )
    until: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="share of the training after which all rows are open"
    )

    @property
    def judged(self) -> bool:
        """Whether the caches of other teachers are read."""
        return self.difficulty == "ensemble"

    @property
    def graded(self) -> bool:
        """Whether success rates are read that came with the corpus."""
        return self.difficulty == "success_rate"
