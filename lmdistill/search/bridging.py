"""Fits a finalist's blocks to the teacher's, as a student is grown: each to where the teacher's next kept block begins.

Shared weights stand for many students at once; a finalist's blocks can afford to bridge just what it leaves out.
Whether that helps weights that were trained is seen on held-out rows, and what does not help is not taken.

Axes: R rows, T positions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lmdistill.pipeline.files import write_json
from lmdistill.search.finalists import Finalist
from lmdistill.search.scored import plan_of
from lmdistill.students.grow import fit_in_turn

if TYPE_CHECKING:
    import torch

    from lmdistill.pipeline.stage import Progress
    from lmdistill.search.heldout import HeldOutLoss
    from lmdistill.search.supernet import SuperNet
    from lmdistill.students.regression import Fit


def bridge(
    finalists: Sequence[Finalist],
    net: SuperNet,
    tokens_RT: torch.Tensor,
    how: Fit,
    heldout: HeldOutLoss,
    tokenizer: Path,
    progress: Progress,
) -> None:
    """Fit each finalist from where it begins, and score it; `net` has the weights it was made with: the teacher's."""
    from lmdistill.checkpoints import load_model, save_model

    source = SimpleNamespace(model=net.body)
    for finalist in finalists:
        kept = finalist.folder / "fitted.json"
        if not kept.exists():
            model = load_model(finalist.begun, device=net.device)
            plan: Any = plan_of(finalist.scored.candidate, len(net.body.layers))
            work = finalist.folder / "fitting"
            work.mkdir(exist_ok=True)
            fit_in_turn(model, source, plan, tokens_RT, how, work, progress)
            model.tie_weights()
            save_model(model.float().cpu(), finalist.bridged, tokenizer_from=tokenizer)
            loss = heldout.of_folder(finalist.bridged)
            write_json(kept, {name: round(value, 6) for name, value in loss.items()})
        finalist.fitted = json.loads(kept.read_text())
