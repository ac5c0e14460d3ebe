"""What a recommendation is measured on, made by the pipeline itself: sampled text, the teacher's word on it, students.

Everything lies in one run folder below the work folder, so that what was made is kept by its fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdistill.pipeline.events import Sink
from lmdistill.pipeline.stage import Artefact
from lmdistill.recommend.request import Request, asset

K = 32  # log-probs of a token in the samples
GROWTH = {"selection_rows": 1, "selection_width": 1, "fit_rows": 16, "fit_steps": 10}  # quicker than a recipe's

Stages = list[dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """Where samples are made, and who is told."""

    request: Request
    precision: str
    separator: str  # between documents
    sinks: Sequence[Sink] = ()

    @property
    def run_dir(self) -> Path:
        """The run folder of all samples."""
        return self.request.work / "run"

    def make(self, name: str, stages: Stages) -> dict[str, Artefact]:
        """Artefacts of a recipe with these stages, those that are there kept."""
        from lmdistill.pipeline.plan import make_plan
        from lmdistill.pipeline.run import run_pipeline
        from lmdistill.recipe import load_recipe

        recipe = {"name": name, "teacher": self.request.teacher, "runtime": {"device": self.request.device}}
        file = self.request.work / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**recipe, "stages": stages}, indent=1) + "\n", encoding="utf-8")
        return run_pipeline(make_plan(load_recipe(file), self.run_dir), self.sinks)

    def sample(self, row_tokens: int, train_tokens: int, valid_tokens: int) -> Stages:
        """Stages that read so much of the data and have the teacher score it."""
        keys = source_keys(self.request)
        limit = self.request.sample_records
        corpus = {
            "stage": "corpus",
            "sources": [{"source": source, **keys, "limit": limit} for source in self.request.sources],
            "sequence_length": row_tokens,
            "separator": self.separator,
            "valid_fraction": 0.1,
            "train_tokens": max(train_tokens, row_tokens),
            "valid_tokens": max(valid_tokens, row_tokens),
        }
        return [corpus, {"stage": "teach", "k": K, "precision": self.precision}]

    def students(self, shapes: dict[int, dict[str, Any]]) -> Stages:
        """Stages that grow a student of each depth."""
        return [{"stage": "student", "name": f"student_{depth}", **shapes[depth], **GROWTH} for depth in shapes]


def separator_of(tokenizer: Path) -> str:
    """What stands between documents: pre-training's own mark, which a chat model's EOS is not; else EOS, else none."""
    from lmdistill.corpus.tokenizers import declares

    return next((mark for mark in ("<|endoftext|>", "eos") if declares(tokenizer, mark)), "none")


def source_keys(request: Request) -> dict[str, str]:
    """The field that holds the text: what was asked for, else `messages` where the records have no `text`."""
    if request.messages is not None:
        return {"messages": request.messages}
    if request.field is not None:
        return {"text": request.field}
    from lmdistill import assets
    from lmdistill.corpus.config import Source
    from lmdistill.corpus.load import first_fields

    path = assets.available(asset("data", request.sources[0]))
    fields = first_fields(Source(source=request.sources[0]), path) if path is not None else None
    return {"messages": "messages"} if fields and "text" not in fields and "messages" in fields else {}
