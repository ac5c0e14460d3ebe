"""Points that are themselves learned (Polino et al., ICLR 2018, algorithm 2): of each tensor, or of each bucket.

A bucket's weights are scaled to 0…1 by its range, as on the uniform grid; the points there begin at percentiles.

Axes: N buckets, B weights in a bucket, P points, Y bytes in a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from lmdistill.errors import RecipeError
from lmdistill.quantization.grid import Grid, Quantised, Scales
from lmdistill.quantization.packing import bit_string, from_bit_string, raw, unraw
from lmdistill.quantization.registry import grid

_SAMPLE = 2**20  # weights of a tensor that percentiles are taken of


@grid("points")
@dataclass(frozen=True)
class LearnedPoints(Grid):
    """Points alpha · p[code] + beta, p in rising order. No bound on the error before the points are known."""

    bits: int = 4
    bucket: int = 256
    of: Literal["tensor", "bucket"] = "tensor"
    learnable: ClassVar[tuple[str, ...] | None] = ("p",)
    searches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise RecipeError for bits outside 1…8 or an empty bucket."""
        if not 1 <= self.bits <= 8 or self.bucket < 1 or self.of not in ("tensor", "bucket"):
            raise RecipeError(f"grid '{self.name}' takes 1 to 8 bits, buckets, and points of tensor or bucket")

    @property
    def block(self) -> int:
        """Weights in a bucket."""
        return self.bucket

    @property
    def code_bits(self) -> int:
        """As asked for."""
        return self.bits

    @property
    def block_bytes(self) -> int:
        """Range, least weight, the points and the codes; a tensor's own points are written in each bucket."""
        return 8 + (4 << self.bits) + -(-self.bucket * self.bits // 8)

    @property
    def bits_per_weight(self) -> float:
        """A tensor's own points count as nothing beside its weights."""
        points = 32 * 2**self.bits if self.of == "bucket" else 0
        return self.bits + (64 + points) / self.bucket

    def scale_dtypes(self) -> dict[str, torch.dtype]:
        """The range `alpha`, the least weight `beta` and the points `p`."""
        return {"alpha": torch.float32, "beta": torch.float32, "p": torch.float32}

    def sub_blocks(self) -> dict[str, tuple[int, ...]]:
        """P points a bucket."""
        return {"p": (2**self.bits,)}

    def by_block(self, scales: Scales) -> dict[str, torch.Tensor]:
        """A tensor's own points `[P]` are those of all its buckets."""
        found = super().by_block(scales)
        if "p" in found and "alpha" in found:
            found["p"] = found["p"].expand(len(found["alpha"]), -1)
        return found

    def quantise(self, weights: torch.Tensor, scales: Scales | None = None) -> Quantised:
        """As every grid does, from percentiles of the tensor or of its buckets."""
        found = super().quantise(weights, self._percentiles(weights) if scales is None else scales)
        if self.of == "tensor":  # kept once: whoever trains on learns points of the tensor again
            found.scales["p"] = found.scales["p"].reshape(-1, 2**self.bits)[0].clone()
        return found

    def _on_grid(self, weights: torch.Tensor, scales: Scales | None, dtype: torch.dtype | None) -> torch.Tensor:
        return super()._on_grid(weights, self._percentiles(weights) if scales is None else scales, dtype)

    def start(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ranges of the buckets, and points at percentiles: `[P]` of the tensor."""
        return self._percentiles(weights)

    def _percentiles(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        self.check_width(weights.shape[-1])
        blocks_NB = weights.detach().reshape(-1, self.bucket).float()
        _, scales = self._search(blocks_NB)
        if self.of == "tensor":
            unit = self._unit(blocks_NB, scales).flatten()
            scales["p"] = _evenly_taken(unit[:: -(-len(unit) // _SAMPLE)].unsqueeze(0), 2**self.bits)
        found = self.by_row(scales | {"p": scales["p"].expand(len(blocks_NB), -1)}, weights.shape)
        return found | {"p": scales["p"][0]} if self.of == "tensor" else found

    def _search(self, blocks_NB: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The bucket's own range and percentiles."""
        beta_N = blocks_NB.amin(1)
        scales = {"alpha": blocks_NB.amax(1) - beta_N, "beta": beta_N}
        scales["p"] = _evenly_taken(self._unit(blocks_NB, scales), 2**self.bits)
        return self.nearest(blocks_NB, scales), scales

    @staticmethod
    def _unit(blocks_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Weights by their bucket's range; a range of zero leaves 0."""
        alpha_N1, beta_N1 = scales["alpha"].unsqueeze(1), scales["beta"].unsqueeze(1)
        return torch.where(alpha_N1 == 0, 0.0, (blocks_NB - beta_N1) / alpha_N1)

    def nearest(self, blocks_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Weights half way between two points go to the lower one."""
        p_NP = scales["p"].sort(-1).values
        between_NP = (p_NP[:, 1:] + p_NP[:, :-1]) / 2
        codes_NB = torch.searchsorted(between_NP.contiguous(), self._unit(blocks_NB, scales).contiguous())
        return codes_NB.float()

    def points(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """A product and a sum, each rounded."""
        p_NP = scales["p"].sort(-1).values
        return p_NP.gather(1, codes_NB.long()) * scales["alpha"].unsqueeze(1) + scales["beta"].unsqueeze(1)

    def answering(self, weights_NB: torch.Tensor, points_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """The points alone move: each by the gradients of the weights it stands for, times their range."""
        return self.points(self.nearest(weights_NB, scales), scales)

    def _to_bytes(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Range, least weight, points, codes."""
        p_NP = scales["p"].sort(-1).values
        head = raw(scales["alpha"]), raw(scales["beta"]), raw(p_NP)
        return torch.cat((*head, bit_string(codes_NB, self.bits)), dim=1)

    def _from_bytes(self, bytes_NY: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        alpha_N, beta_N = unraw(bytes_NY[:, :4], torch.float32), unraw(bytes_NY[:, 4:8], torch.float32)
        end = 8 + 4 * 2**self.bits
        p_NP = bytes_NY[:, 8:end].contiguous().view(torch.float32)
        codes_NB = from_bit_string(bytes_NY[:, end:], self.bits, self.bucket)
        return codes_NB, {"alpha": alpha_N, "beta": beta_N, "p": p_NP}


def _evenly_taken(values_NM: torch.Tensor, count: int) -> torch.Tensor:
    """Values `[N, P]` in the middle of `count` equal shares of each row."""
    ordered_NM = values_NM.sort(-1).values
    places = (torch.arange(count, device=values_NM.device) * 2 + 1) * values_NM.shape[1] // (2 * count)
    return ordered_NM[:, places]
