"""What benchmarks/quantize.py compares: `python benchmarks/quantize.py` trains each way as its keys say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.training.config import DistillConfig

IMATRIX_TOKENS = START_TOKENS = 8_192  # that inputs are measured on, for importance matrices and before training
WARMUP_STEPS, DECAY, CALM_STEPS = 5, 0.8, 10  # a training: up, level, and down so much of it; a line of the log
FLOPS = 1.2e11  # of two cores with AVX2, in float32: 60.5e9 each, measured on SmolLM2's shapes
PASSES, LEARNED_PASSES = 3e-9, 9e-9  # seconds a weight and step: onto the grid, AdamW; and back to its scales
POINT_PASSES = 4.5e-8  # the same where each point is learned
CAPTURING = 1.8  # times a bare forward pass: the likeliest tokens and the cache's bytes besides
COMPENSATING = 7e-7  # seconds a weight, to round weights so that later ones make good
CACHE: dict[str, Any] = {"k": 1024, "precision": "float32"}  # what the parent says of that text, once for all ways
TRAINING: dict[str, Any] = {
    "loss": "decoupled_topk",
    "kd_weight": 1.0,
    "lr": 3e-4,
    "schedule": "warmup_stable_decay",
    "decay": DECAY,
    "freeze": ["model.embed_tokens.*"],
}
POINTS_ALONE = TRAINING | {"freeze": ["*.weight"]}
SHIPPED: dict[str, Any] = {
    "start": "compensated",
    "start_tokens": START_TOKENS,
    "scales": "learned",
    "self_teacher": "frozen",
}
OWN_LAYERS: dict[str, Any] = {"loss": "hidden_mse", "layers": "uniform", "live": True, "weight": 100.0}
RANGES: dict[str, Any] = {"start": "weighted", "start_tokens": START_TOKENS, "scales": "learned"}


@dataclass(frozen=True)
class Way:
    """One grid, how it is trained, and what it is without training."""

    name: str
    preset: str  # `quantize.grid`
    keys: dict[str, Any]
    rows: int = 1  # of text in a step
    row_tokens: int = 64  # of such a row
    training: dict[str, Any] = field(default_factory=lambda: TRAINING)

    @property
    def quantize(self) -> QuantizeKeys:
        """The keys, checked."""
        return QuantizeKeys.model_validate(self.keys)

    @property
    def untrained(self) -> dict[str, QuantizeKeys]:
        """The parent on the grid as it is, and with scales fitted to the inputs' mean squares."""
        bare = {key: value for key, value in self.keys.items() if key not in ("start", "scales")}
        if self.preset == "points":
            return {"ptq": QuantizeKeys.model_validate(bare | {"scales": "fixed"})}
        weighted = QuantizeKeys.model_validate(bare | {"start": "weighted", "scales": "fixed"})
        return {"ptq": QuantizeKeys.model_validate(bare), "ptq_imatrix": weighted}

    @property
    def cached(self) -> bool:
        """Whether it learns from what the parent said beforehand; else the parent runs beside it."""
        return DistillConfig.model_validate(self.training | {"tokens": 1, "quantize": self.keys}).needs_cache

    def step_seconds(self, weights: int) -> float:
        """About how long a step takes on two quiet cores: passes over weights; six operations a token, two to teach."""
        if self.preset == "points":
            return weights * (POINT_PASSES + 6 * self.rows * self.row_tokens / FLOPS)
        passes = LEARNED_PASSES if self.keys.get("scales") == "learned" else PASSES
        operations = 8 if "self_teacher" in self.keys else 6
        return weights * (passes + operations * self.rows * self.row_tokens / FLOPS)

    def config(self, steps: int) -> DistillConfig:
        """A training of so many steps."""
        every = math.gcd(steps, CALM_STEPS)
        keys = {
            "tokens": steps * self.rows * self.row_tokens,
            "batch_rows": self.rows,
            "warmup": min(0.5, WARMUP_STEPS / steps),
            "checkpoint_steps": every,
            "log_steps": every,
            "quantize": self.keys,
        }
        return DistillConfig.model_validate(self.training | keys)


def _shipped(name: str, preset: str, **step: int) -> Way:
    """The parent runs beside and teaches its predictions and its layers, as in recipes/lfm_qad.yaml."""
    training = TRAINING | {"loss": "full_kl", "intermediate": [OWN_LAYERS], "lr": 1e-3}
    return Way(name, preset, {"grid": preset, **SHIPPED}, training=training, **step)


def _narrow(name: str, grid: str, bits: int, **keys: Any) -> Way:
    """Polino's algorithm 1, with ranges that are learned; where points are learned, together with his algorithm 2."""
    return Way(name, grid, {"grid": grid, "bits": bits, "bucket": 192, **keys})


WAYS = {
    way.name: way
    for way in (
        _shipped("Q4_0", "q4_0", rows=2, row_tokens=256),
        # so near to its parent that products in bfloat16 would be the larger error, and large steps too
        Way("Q8_0", "q8_0", {"grid": "q8_0"}, training=TRAINING | {"precision": "float32", "lr": 3e-5}),
        _shipped("8da4w", "8da4w", row_tokens=256),
        _narrow("uniform_2bit", "uniform", 2, **RANGES),
        _narrow("uniform_3bit", "uniform", 3, **RANGES),
        _narrow("learned_points_2bit", "points", 2, scales="learned"),
        _narrow("learned_points_3bit", "points", 3, scales="learned"),
        # algorithm 2 by itself: weights as they are, points alone move
        replace(_narrow("points_alone_2bit", "points", 2, scales="learned", scale_lr=1e-2), training=POINTS_ALONE),
        _narrow("shared_points_3bit", "points", 3, scales="learned", share_bits="logarithmic"),
        _narrow("shared_points_3bit_linear", "points", 3, scales="learned", share_bits="linear"),
    )
}
LEARNED = {name for name in WAYS if "bit" in name}


def best_ptq(made: dict[str, Any]) -> float:
    """The least KL of what is not trained and what llama.cpp offers too."""
    return min(float(made[kind]["kl"]) for kind in ("ptq", "ptq_imatrix") if kind in made)
