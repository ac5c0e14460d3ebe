"""search: the student's architecture is chosen by measurement, under the budgets of the device it will run on."""

from __future__ import annotations

import json
from typing import Any

from lmdistill.errors import IntegrityError, LmdistillError
from lmdistill.pipeline.stage import Estimate, Input, PreflightContext, Stage, StageContext
from lmdistill.search.config import SearchConfig


class SearchStage(Stage[SearchConfig]):
    """A teacher cache, its corpus and the teacher in, the chosen student out."""

    name = "search"
    version = 5
    Config = SearchConfig
    inputs = (Input("signals", ("signals",)), Input("corpus", ("corpus",)))
    output = "student"
    tools = ("torch", "transformers", "accelerate", "optuna", "scipy", "llama-cpp-python", "gguf")

    def uses_teacher(self, config: SearchConfig) -> bool:
        """All weights come from it."""
        return True

    def choices(self) -> dict[str, dict[str, str]]:
        """The methods."""
        from lmdistill.search.methods import methods

        return {"method": methods()}

    def preflight(self, ctx: PreflightContext[SearchConfig]) -> list[LmdistillError]:
        """Method, loss and packages are there; the space has candidates, and the teacher can be grown from."""
        from lmdistill.search.checks import check_search

        return check_search(ctx)

    def estimate(self, ctx: PreflightContext[SearchConfig]) -> Estimate:
        """From the shapes of teacher and space."""
        from lmdistill.search.cost_of_search import of_search

        return of_search(ctx)

    def run(self, ctx: StageContext[SearchConfig]) -> dict[str, Any]:
        """Search, and write the winner as a student."""
        from lmdistill.search.run import search

        return search(ctx)

    def verify(self, ctx: StageContext[SearchConfig], metrics: dict[str, Any]) -> None:
        """The winner is what was chosen, to the last parameter, and can be exported."""
        from lmdistill.deployment.architectures import architecture_of

        if metrics["parameters"] != metrics["parameters_by_formula"]:
            raise IntegrityError(
                f"the student has {metrics['parameters']:,} parameters, its shape says "
                f"{metrics['parameters_by_formula']:,}",
                fix="report this with the recipe: the formula or the model is wrong",
            )
        architecture_of(json.loads((ctx.out / "model" / "config.json").read_text()))
