"""A toy stage that takes everything."""

from __future__ import annotations

import json
from typing import Any

from lmdistill.pipeline.stage import Input, Stage, StageConfig, StageContext


class Summary(Stage[StageConfig]):
    """List the artefacts."""

    name, version, output, Config = "summary", 1, "report", StageConfig
    inputs = (Input("everything", ("corpus", "model"), many=True),)

    def run(self, ctx: StageContext[StageConfig]) -> dict[str, Any]:
        rows = [{"name": one.name, "kind": one.kind, "metrics": one.metrics} for one in ctx.inputs["everything"]]
        (ctx.out / "report.json").write_text(json.dumps(rows))
        return {"artefacts": len(rows)}
