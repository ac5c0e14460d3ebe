"""llama.cpp's Q6_K: 256 weights in 16 sub-blocks of 16, whose 8-bit scales have one float16 scale.

Axes: N blocks, B weights in a block, G sub-blocks in a block, M weights in a sub-block, Y bytes in a block, H halves
of a block, Q its quarters, J codes that share a byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lmdistill.quantization.arithmetic import divide, nearest_int, signed_extreme
from lmdistill.quantization.grid import Grid, Scales
from lmdistill.quantization.packing import raw, unraw
from lmdistill.quantization.registry import grid
from lmdistill.quantization.scale_search import linear_fit

_G, _M = 16, 16
_HALF = 32
_TRIALS = [trial for trial in range(-9, 10) if trial != 0]
_ALL_ZERO = float(np.float32(1e-15))


@grid("q6_k")
@dataclass(frozen=True)
class Q6_K(Grid):
    """Points (code − 32) · (d · sc); 6.5625 bits a weight. No bound on the error: the search may cut outliers off."""

    searches = True
    block = _G * _M
    code_bits = 6
    block_bytes = 210

    def scale_dtypes(self) -> dict[str, torch.dtype]:
        """The scale `d` of the 8-bit scales `sc`."""
        return {"d": torch.float16, "sc": torch.int8}

    def sub_blocks(self) -> dict[str, tuple[int, ...]]:
        """One 8-bit scale a sub-block."""
        return {"sc": (_G,)}

    def _search(self, blocks_NB: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sub-blocks are fitted alone; then their scales are rounded and the codes taken anew."""
        fit = linear_fit(blocks_NB.view(-1, _M).T.contiguous(), half=_HALF, trials=_TRIALS, delta=0.1)
        scale_NG = fit.scale_N.view(-1, _G)
        extreme_N1 = signed_extreme(scale_NG, 1)
        empty_N1 = extreme_N1.abs() < _ALL_ZERO
        inverse_N1 = divide(-128.0, extreme_N1)
        sc_NG = nearest_int(inverse_N1 * scale_NG).clamp_(max=127).to(torch.int8)
        scales = {
            "d": torch.where(empty_N1, 0.0, divide(1.0, inverse_N1)).squeeze(1).half(),
            "sc": torch.where(empty_N1, 0, sc_NG),
        }
        codes_NB = self._recoded(blocks_NB, scales, fit.codes_MN.T.reshape(-1, _G, _M))
        return torch.where(empty_N1, 0.0, codes_NB), scales

    def nearest(self, blocks_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """A scale of zero leaves only the point 0, whose code is 0 in the reference's empty blocks."""
        return self._recoded(blocks_NB, scales, blocks_NB.new_zeros(()))

    def _recoded(self, blocks_NB: torch.Tensor, scales: Scales, kept_NGM: torch.Tensor) -> torch.Tensor:
        step_NG1 = self._steps(scales)
        codes_NGM = (blocks_NB.view(-1, _G, _M) / step_NG1).round_().clamp_(-_HALF, _HALF - 1).add_(_HALF)
        return torch.where(step_NG1 == 0, kept_NGM, codes_NGM).flatten(1)

    @staticmethod
    def _steps(scales: Scales) -> torch.Tensor:
        """Step of each sub-block, `[N, G, 1]`."""
        return (scales["d"].float().unsqueeze(1) * scales["sc"].float()).unsqueeze(2)

    def points(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Two exact products: 11 bits times 8 times 5."""
        return ((codes_NB.view(-1, _G, _M) - _HALF) * self._steps(scales)).flatten(1)

    def _to_bytes(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Low nibbles, upper bit pairs, 8-bit scales, the float16 scale; each half of a block by itself."""
        quarters_NHQJ = codes_NB.reshape(-1, 2, 4, 32)
        low_NHQJ, high_NHQJ = quarters_NHQJ & 0x0F, quarters_NHQJ >> 4
        low_NHJ = (low_NHQJ[:, :, :2] | (low_NHQJ[:, :, 2:] << 4)).flatten(2)
        first, second, third, last = high_NHQJ.unbind(2)
        high_NHJ = first | (second << 2) | (third << 4) | (last << 6)
        return torch.cat((low_NHJ.flatten(1), high_NHJ.flatten(1), raw(scales["sc"]), raw(scales["d"])), dim=1)

    def _from_bytes(self, bytes_NY: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        low_NHQJ = bytes_NY[:, :128].reshape(-1, 2, 2, 32)
        high_NHJ = bytes_NY[:, 128:192].reshape(-1, 2, 32)
        low_NHQJ = torch.cat((low_NHQJ & 0x0F, low_NHQJ >> 4), dim=2)
        high_NHQJ = torch.stack([(high_NHJ >> place) & 3 for place in (0, 2, 4, 6)], dim=2)
        scales = {"d": unraw(bytes_NY[:, 208:], torch.float16), "sc": unraw(bytes_NY[:, 192:208], torch.int8)}
        return (low_NHQJ | (high_NHQJ << 4)).flatten(1), scales
