"""llama.cpp's Q4_K: 256 weights in 8 sub-blocks of 32, whose 6-bit scales and minima have a float16 scale each.

Axes: N blocks, B weights in a block, G sub-blocks in a block, M weights in a sub-block, Y bytes in a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmdistill.quantization.arithmetic import divide, nearest_int, ordered_sum, square_root
from lmdistill.quantization.grid import Grid, Scales
from lmdistill.quantization.packing import from_nibbles, nibbles, raw, unraw
from lmdistill.quantization.registry import grid
from lmdistill.quantization.scale_search import AffineFit, affine_fit

_G, _M = 8, 32


def _six_bits(values_NG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values at or above 0 as 6-bit codes and the float16 scale `[N]` that goes with them."""
    top_N1 = values_NG.amax(1, keepdim=True).clamp_(min=0.0).add_(0.0)  # +0, as the reference starts from
    inverse_N1 = torch.where(top_N1 > 0, divide(63.0, top_N1), 0.0)
    codes_NG = nearest_int(inverse_N1 * values_NG).bitwise_and_(0xFF).clamp_(max=63).to(torch.uint8)
    return codes_NG, divide(top_N1.squeeze(1), 63.0).half()


def _fit(blocks_NB: torch.Tensor) -> AffineFit:
    """The search of each sub-block, weighted by |x| plus the sub-block's root mean square."""
    x_MN = blocks_NB.reshape(-1, _M).T.contiguous()
    mean_square_N = ordered_sum(x_MN * x_MN) / _M  # a power of two: exact on every device
    weight_MN = x_MN.abs().add_(square_root(mean_square_N))
    return affine_fit(x_MN, weight_MN, top=15, first=-1.0, delta=0.1, trials=21)


@grid("q4_k")
@dataclass(frozen=True)
class Q4_K(Grid):
    """Points code · (d · sc) − dmin · m; 4.5 bits a weight. No bound on the error: the search may cut outliers off."""

    searches = True
    block = _G * _M
    code_bits = 4
    block_bytes = 144

    def scale_dtypes(self) -> dict[str, torch.dtype]:
        """The scales `d` and `dmin` of the 6-bit scales `sc` and minima `m`."""
        return {"d": torch.float16, "dmin": torch.float16, "sc": torch.uint8, "m": torch.uint8}

    def sub_blocks(self) -> dict[str, tuple[int, ...]]:
        """One 6-bit scale and minimum a sub-block."""
        return {"sc": (_G,), "m": (_G,)}

    def _search(self, blocks_NB: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sub-blocks are fitted alone; then their scales are rounded and the codes taken anew."""
        fit = _fit(blocks_NB)
        sc_NG, d_N = _six_bits(fit.scale_N.view(-1, _G))
        m_NG, dmin_N = _six_bits(fit.minimum_N.view(-1, _G))
        scales = {"d": d_N, "dmin": dmin_N, "sc": sc_NG, "m": m_NG}
        codes_NGM = fit.codes_MN.T.reshape(-1, _G, _M)  # they stay where a sub-block's scale was rounded to 0
        return self._recoded(blocks_NB, scales, codes_NGM), scales

    def nearest(self, blocks_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """A scale of zero leaves only the point −dmin · m."""
        return self._recoded(blocks_NB, scales, blocks_NB.new_zeros(()))

    def _recoded(self, blocks_NB: torch.Tensor, scales: Scales, kept_NGM: torch.Tensor) -> torch.Tensor:
        step_NG1, low_NG1 = self._steps(scales)
        codes_NGM = (blocks_NB.view(-1, _G, _M) + low_NG1).div_(step_NG1).round_().clamp_(0, 15)
        return torch.where(step_NG1 == 0, kept_NGM, codes_NGM).flatten(1)

    @staticmethod
    def _steps(scales: Scales) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and minimum of each sub-block, `[N, G, 1]`."""
        step_NG = scales["d"].float().unsqueeze(1) * scales["sc"].float()
        low_NG = scales["dmin"].float().unsqueeze(1) * scales["m"].float()
        return step_NG.unsqueeze(2), low_NG.unsqueeze(2)

    def points(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """An exact product, then a rounded difference."""
        step_NG1, low_NG1 = self._steps(scales)
        return (codes_NB.view(-1, _G, _M) * step_NG1 - low_NG1).flatten(1)

    def _to_bytes(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """The float16 scales, 12 bytes of 6-bit ones, then nibbles of neighbouring sub-blocks."""
        sc_NG, m_NG = scales["sc"], scales["m"]
        (first_sc, last_sc), (first_m, last_m) = sc_NG.chunk(2, 1), m_NG.chunk(2, 1)
        six = (first_sc | (last_sc >> 4 << 6), first_m | (last_m >> 4 << 6), (last_sc & 0x0F) | (last_m << 4))
        pairs_N = nibbles(codes_NB.reshape(-1, _G // 2, 2 * _M)).flatten(1)
        return torch.cat((raw(scales["d"]), raw(scales["dmin"]), *six, pairs_N), dim=1)

    def _from_bytes(self, bytes_NY: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        d_N, dmin_N = unraw(bytes_NY[:, :2], torch.float16), unraw(bytes_NY[:, 2:4], torch.float16)
        first_sc, first_m, last = bytes_NY[:, 4:16].chunk(3, 1)
        sc_NG = torch.cat((first_sc & 63, (last & 0x0F) | (first_sc >> 6 << 4)), dim=1)
        m_NG = torch.cat((first_m & 63, (last >> 4) | (first_m >> 6 << 4)), dim=1)
        codes_NB = from_nibbles(bytes_NY[:, 16:].reshape(-1, _G // 2, _M)).flatten(1)
        return codes_NB, {"d": d_N, "dmin": dmin_N, "sc": sc_NG, "m": m_NG}
