"""What benchmarks/quantize.py compares: `python benchmarks/quantize.py` trains each way as its keys say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lmdistill.quantization.keys import QuantizeKeys

IMATRIX_TOKENS = 16_384
TRAINING: dict[str, Any] = {"loss": "full_kl", "kd_weight": 1.0, "batch_rows": 4, "lr": 3e-4, "checkpoint_steps": 10}
SHIPPED: dict[str, Any] = {"start": "compensated", "scales": "learned", "self_teacher": "frozen"}


@dataclass(frozen=True)
class Way:
    """One grid, how it is trained, and what it is without training."""

    name: str
    preset: str  # `quantize.grid`
    keys: dict[str, Any]
    training: dict[str, Any] = field(default_factory=lambda: TRAINING)
    step_tokens: int = 1024

    @property
    def quantize(self) -> QuantizeKeys:
        """The keys, checked."""
        return QuantizeKeys.model_validate(self.keys)

    @property
    def untrained(self) -> dict[str, QuantizeKeys]:
        """The parent on the grid as it is, and with scales fitted to the inputs' mean squares."""
        bare = {key: value for key, value in self.keys.items() if key not in ("start", "scales", "self_teacher")}
        if self.preset == "points":
            return {"ptq": QuantizeKeys.model_validate(bare | {"scales": "fixed"})}
        weighted = QuantizeKeys.model_validate(bare | {"start": "weighted", "scales": "fixed"})
        return {"ptq": QuantizeKeys.model_validate(bare), "ptq_imatrix": weighted}


def _shipped(name: str, preset: str) -> Way:
    return Way(name, preset, {"grid": preset, **SHIPPED})


def _narrow(name: str, grid: str, bits: int, **keys: Any) -> Way:
    return Way(name, grid, {"grid": grid, "bits": bits, "bucket": 256, "self_teacher": "frozen", **keys})


WAYS = {
    way.name: way
    for way in (
        _shipped("Q4_0", "q4_0"),
        _shipped("Q8_0", "q8_0"),
        _shipped("8da4w", "8da4w"),
        _narrow("uniform_2bit", "uniform", 2),
        _narrow("uniform_3bit", "uniform", 3),
        _narrow("learned_points_2bit", "points", 2, scales="learned"),
        _narrow("learned_points_3bit", "points", 3, scales="learned"),
        _narrow("shared_points_3bit", "points", 3, scales="learned", share_bits="logarithmic"),
    )
}
LEARNED = {name for name in WAYS if "bit" in name}


def best_ptq(made: dict[str, Any]) -> float:
    """The least KL of what is not trained and what llama.cpp offers too."""
    return min(float(made[kind]["kl"]) for kind in ("ptq", "ptq_imatrix") if kind in made)
