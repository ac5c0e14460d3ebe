"""How much of the target should be the text itself: `kd_weight: auto`, from two short trainings and held-out text.

"Even your Teacher Needs Guidance" (arXiv 2102.13088) trains on α·y + (1−α)·f, y the ground truth and f the teacher's
prediction, and estimates the best α. Its formula is for squared loss; what follows is our own [ours], for tokens:

A model that is linear in its targets (kernel regression; one step of gradient descent; to first order, any short
training from one start) ends, trained on α·y + (1−α)·f, in the mixture of the two that were trained on y alone (α = 1,
λ = 0) and on f alone (α = 0, λ = 1). So two probes are trained, on equal rows from the same start, and

    α̂ = argmax Σ_held-out log( α·q₁(y) + (1−α)·q₀(y) ),      λ = 1 − α̂

with q₁, q₀ their probabilities of the held-out tokens. The sum is concave in α, so its maximum is one bisection away.

Axes: N held-out predictions.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.pipeline.stage import Progress
from lmdistill.precision import products_in
from lmdistill.signals.reader import SignalsReader
from lmdistill.training.config import DistillConfig
from lmdistill.training.data import SignalsCollator
from lmdistill.training.scoring import scored_rows

if TYPE_CHECKING:
    from lmdistill.training.run import Place

HELD_OUT = "valid"  # the split of the cache that α is estimated on
MOST_TOKENS = 65_536  # held-out tokens that are scored, in evenly spaced rows
SCORE_ROWS, SCORE_CHUNK = 8, 512  # as for difficulties
HALVINGS = 40
KEPT = "kd_weight.json"  # below the work folder


def best_share(log_q1_N: NDArray[Any], log_q0_N: NDArray[Any]) -> float:
    """The α in [0, 1] with the largest Σ log(α·q₁ + (1−α)·q₀)."""
    ratio_N = np.exp(np.clip(log_q1_N.astype(np.float64) - log_q0_N, -50, 50)) - 1.0

    def slope(alpha: float) -> float:
        return float((ratio_N / (1.0 + alpha * ratio_N)).sum())

    low, high = 0.0, 1.0
    if slope(low) <= 0:
        return low
    if slope(high) >= 0:
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2


def settled(
    reader: Any, config: DistillConfig, place: Place, progress: Progress
) -> tuple[DistillConfig, dict[str, Any]]:
    """The configuration with a number for λ, and what training.json says of an estimate (nothing where none is asked).

    The estimate is kept in `place.work`, and each probe resumes by itself: a resumed run has the λ of the first.
    """
    if config.kd_weight != "auto":
        return config, {}
    kept = place.work / KEPT
    if not kept.exists():
        found = _estimate(reader, config, place, progress)
        partial = kept.with_suffix(".tmp")
        partial.write_text(json.dumps(found, indent=1))
        partial.rename(kept)
    shutil.rmtree(place.work / "probes", ignore_errors=True)
    record = json.loads(kept.read_text())
    progress.note(f"λ is {record['kd_weight']}: the text's share of the target is estimated as {record['alpha']}")
    return config.model_copy(update={"kd_weight": record["kd_weight"]}), {"kd_weight_estimate": record}


def _estimate(reader: SignalsReader, config: DistillConfig, place: Place, progress: Progress) -> dict[str, Any]:
    """Train both probes and weigh them against each other on held-out text."""
    held_out = SignalsReader(reader.folder, HELD_OUT)
    log_q = {}
    for name, kd_weight in (("text", 0.0), ("teacher", 1.0)):
        progress.note(f"a probe for λ, taught by the {name} alone")
        model = _probe(reader, config, place, progress, name, kd_weight)
        log_q[name] = _log_probs(model, held_out, config, place)
    alpha = best_share(log_q["text"], log_q["teacher"])
    return {
        "kd_weight": round(1.0 - alpha, 3),
        "alpha": round(alpha, 3),
        "probe_nll": {name: round(float(-log_N.mean(dtype=np.float64)), 5) for name, log_N in log_q.items()},
        "held_out_tokens": len(log_q["text"]),
    }


def _probe(
    reader: SignalsReader, config: DistillConfig, place: Place, progress: Progress, name: str, kd_weight: float
) -> Path:
    """The model folder of a short training with this λ."""
    from lmdistill.training.run import train

    keys = {
        "kd_weight": kd_weight,
        "kd_weight_schedule": None,
        "tokens": max(1, round(config.tokens * config.probe_share)),
        "save_grid": "float32",
    }
    folder = place.work / "probes" / name
    train(
        reader, config.model_copy(update=keys), replace(place, output=folder / "model", work=folder / "work"), progress
    )
    return folder / "model"


def _log_probs(folder: Path, held_out: SignalsReader, config: DistillConfig, place: Place) -> NDArray[np.float32]:
    """A model's log-probs of the held-out tokens that count `[N]`."""
    from lmdistill.checkpoints import load_model
    from lmdistill.quantization.on_grid import kept_on_its_grids

    rows = min(held_out.rows, max(1, MOST_TOKENS // held_out.row_tokens))
    chosen = np.unique(np.linspace(0, held_out.rows - 1, rows).astype(int)).tolist()
    collator = SignalsCollator(held_out, held_out.manifest.packing == "isolate")
    model = load_model(folder, device=place.device)
    kept_on_its_grids(model, folder)
    half = products_in(config.precision, place.device) == "bfloat16"
    found = [lp_RT[~np.isnan(lp_RT)] for lp_RT in scored_rows(model, collator, chosen, SCORE_ROWS, SCORE_CHUNK, half)]
    return np.concatenate(found)
