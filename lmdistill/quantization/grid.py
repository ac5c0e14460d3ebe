"""What a grid is: the points a row of weights can lie on, their codes and scales, and their bytes in a file.

A grid cuts each row into blocks that share scales. It says four things of blocks: the codes and scales that its
runtime's own quantiser would choose, the codes nearest to given scales, the points themselves, and the bytes. From
these follow the straight-through fake quantisation, whose points are by construction those of the packed file.

All arithmetic is in float32 and in the order of the reference, one rounding an operation, so that the bytes are the
reference's; where that needs care, the comment says so. Weights of another dtype are converted to float32 first.

Axes: W width of a row, N blocks, B weights in a block, G sub-blocks in a block, Y bytes in a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lmdistill.errors import IntegrityError, PreflightError

Scales = Mapping[str, torch.Tensor]
REACH = 0.501  # of a step: what is farther from its point lies beyond the grid's ends
_CPU_CHUNK, _GPU_CHUNK = 2**17, 2**26  # weights at a time: what a core's cache holds; what a GPU is kept busy by


@dataclass(frozen=True)
class Quantised:
    """A tensor of weights `[…, W]` on a grid."""

    codes: torch.Tensor  # integers [..., W], as the grid's class names them
    scales: dict[str, torch.Tensor]  # by name, [..., W / B] or [..., W / B, G], in the dtypes of the file


@dataclass(frozen=True)
class Grid(ABC):
    """One grid; subclasses say what happens to blocks `[N, B]`."""

    name: ClassVar[str] = ""
    code_dtype: ClassVar[torch.dtype] = torch.uint8
    dynamic_activations: ClassVar[bool] = False  # whether its runtime rounds the activations of a linear layer too
    searches: ClassVar[bool] = False  # whether finding the reference's scales takes longer than a step of training
    learnable: ClassVar[tuple[str, ...] | None] = None  # scales that can be trained; None: all of a float dtype
    finds_again: ClassVar[bool] = True  # whether the reference's scales of points are those that the points have
    either_sign: ClassVar[bool] = False  # whether a scale may be negative, so that the last point is at the other end

    @property
    @abstractmethod
    def block(self) -> int:
        """B, which the width of every tensor must be a multiple of."""

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Y."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of a code, without what the block's scales take."""

    @property
    def repeats(self) -> bool:
        """Whether the same weights get the same points in every call."""
        return True

    def settled(self) -> Grid:
        """The same points, chosen without drawing: where a training's weights come to lie for good."""
        return self

    @property
    def bits_per_weight(self) -> float:
        """In a file, scales included."""
        return 8 * self.block_bytes / self.block

    @abstractmethod
    def _search(self, blocks_NB: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Codes `[N, B]` as whole float32 numbers and the scales that the reference chooses for them."""

    @abstractmethod
    def nearest(self, blocks_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Codes `[N, B]`, as whole float32 numbers, of the points nearest to the weights on the grid of `scales`."""

    @abstractmethod
    def points(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """The weights `[N, B]` that float32 codes stand for."""

    @abstractmethod
    def _to_bytes(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """The blocks `[N, Y]` of a file from integer codes and scales."""

    @abstractmethod
    def _from_bytes(self, bytes_NY: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Integer codes and scales from the blocks of a file."""

    def stored(self, scales: Scales) -> dict[str, torch.Tensor]:
        """Scales as the file can hold them: what was learned in float32 is rounded to its dtype."""
        return {name: scale.to(self.scale_dtypes()[name]) for name, scale in scales.items()}

    @abstractmethod
    def scale_dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each scale by its name."""

    def check_width(self, width: int, tensor: str = "a tensor") -> None:
        """Raise PreflightError where rows of `width` weights are not made of whole blocks."""
        if width % self.block or width == 0:
            raise PreflightError(
                f"{tensor} with rows of {width} weights cannot be put on grid '{self.name}'",
                why=f"its blocks have {self.block} weights, and {width} is no multiple of that",
                fix="choose a grid with smaller blocks for it, or a model whose widths fit",
            )

    def quantise(self, weights: torch.Tensor, scales: Scales | None = None) -> Quantised:
        """Codes and scales of `weights` `[…, W]`: the reference's, or the codes nearest on the grid of `scales`.

        Weights that lie on the grid of `scales` get back exactly their codes. Raises PreflightError for a width that
        does not fit.
        """
        parts = [
            (codes_NB.to(self.code_dtype), found)
            for _, codes_NB, found in self._encoded(weights.detach(), None if scales is None else self.stored(scales))
        ]
        codes_NB = torch.cat([codes for codes, _ in parts])
        merged = {name: torch.cat([found[name] for _, found in parts]) for name in parts[0][1]}
        return Quantised(codes_NB.view(weights.shape), self.by_row(merged, weights.shape))

    def start(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scales that training begins with: the reference's."""
        return self.quantise(weights).scales

    def answering(self, weights_NB: torch.Tensor, points_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Blocks whose gradient in float32 `scales` is what training uses; their values mean nothing.

        As LSQ (arXiv 1902.08153) has it, by the grid's own formula, which is linear in each scale and in the code: a
        weight between the grid's ends has as code what its rounding added, one beyond them its end's.
        """
        zeros_NB = torch.zeros_like(points_NB)
        low_NB = self.points(zeros_NB, scales)
        step_NB = (self.points(torch.ones_like(points_NB), scales) - low_NB).detach()
        inside_NB = (points_NB - weights_NB).abs() <= REACH * step_NB.abs()
        start_NB = torch.where(inside_NB, weights_NB, low_NB.detach())
        codes_NB = torch.where(step_NB == 0, 0.0, (points_NB - start_NB) / step_NB)
        # a minimum moves the point only where the code cannot answer
        return low_NB * (~inside_NB) + (self.points(codes_NB, scales) - self.points(zeros_NB, scales))

    def nearest_points(self, blocks_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """The points `[N, B]` nearest to the weights on the grid of `scales`."""
        return self.points(self.nearest(blocks_NB, scales).add_(0.0), scales)

    def scale_gradients(
        self, grad_NB: torch.Tensor, weights_NB: torch.Tensor, scales: Scales, names: tuple[str, ...]
    ) -> list[torch.Tensor]:
        """The gradients of the scales called `names`, block by block, from that of the points."""
        points_NB = self.nearest_points(weights_NB, scales)
        with torch.enable_grad():
            leaves = {name: scales[name].float().requires_grad_() for name in names}
            answer_NB = self.answering(weights_NB, points_NB, {**scales, **leaves})
            return list(torch.autograd.grad(answer_NB, list(leaves.values()), grad_NB))

    def dequantise(self, quantised: Quantised) -> torch.Tensor:
        """The float32 weights `[…, W]` that the file's runtime reads; differentiable in scales of a float dtype."""
        codes_NB = quantised.codes.reshape(-1, self.block).float()
        return self.points(codes_NB, self.by_block(quantised.scales)).view(quantised.codes.shape)

    def fake_quantise(
        self, weights: torch.Tensor, scales: Scales | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """`dequantise(quantise(weights, scales))`, bit for bit, with the gradient passed straight to `weights`.

        In the dtype of `weights`, or rounded to `dtype`; only float32 holds every point of every grid.
        """
        result: torch.Tensor = _StraightThrough.apply(weights, self, scales, dtype)
        return result

    def pack(self, quantised: Quantised) -> torch.Tensor:
        """The file's bytes, uint8 `[…, W / B · Y]`."""
        codes_NB = quantised.codes.reshape(-1, self.block)
        packed_NY = self._to_bytes(codes_NB, self.by_block(quantised.scales))
        *rows, width = quantised.codes.shape
        return packed_NY.reshape(*rows, width // self.block * self.block_bytes)

    def unpack(self, packed: torch.Tensor) -> Quantised:
        """Codes and scales from a file's bytes, the reverse of `pack`."""
        *rows, width = packed.shape
        if width % self.block_bytes or packed.dtype != torch.uint8:
            raise IntegrityError(f"rows of {width} bytes are not made of whole '{self.name}' blocks")
        codes_NB, scales = self._from_bytes(packed.reshape(-1, self.block_bytes))
        shape = torch.Size((*rows, width // self.block_bytes * self.block))
        return Quantised(codes_NB.to(self.code_dtype).view(shape), self.by_row(scales, shape))

    def pack_exactly(self, weights: torch.Tensor, scales: Scales | None = None, tensor: str = "a tensor") -> Any:
        """The bytes of weights that already lie on this grid; raises IntegrityError where one of them does not."""
        quantised = self.quantise(weights, scales)
        packed = self.pack(quantised)
        off = int((self.dequantise(self.unpack(packed)) != weights.float()).sum())
        if off:
            raise IntegrityError(
                f"{off} of the {weights.numel()} weights of {tensor} do not lie on grid '{self.name}'",
                why="they were changed after they were put on it, or its scales are not those they were trained with",
                fix="export the weights as they were trained, with their scales, or quantise them anew",
            )
        return packed

    def _on_grid(self, weights: torch.Tensor, scales: Scales | None, dtype: torch.dtype | None) -> torch.Tensor:
        """The points that `weights` are put on, chunk by chunk into one new tensor."""
        self.check_width(weights.shape[-1])
        points = torch.empty(weights.shape, dtype=dtype or weights.dtype, device=weights.device)
        points_NB, blocks_NB = points.view(-1, self.block), weights.reshape(-1, self.block)
        if scales is None:
            for rows, codes_NB, found in self._encoded(weights, None):
                points_NB[rows] = self.points(codes_NB, found)
            return points
        given = self.by_block(self.stored(scales))
        for rows in self.chunks(weights):
            own = {name: scale[rows] for name, scale in given.items()}
            points_NB[rows] = self.nearest_points(blocks_NB[rows].float(), own)
        return points

    def _encoded(
        self, weights: torch.Tensor, scales: Scales | None
    ) -> Iterator[tuple[slice, torch.Tensor, dict[str, torch.Tensor]]]:
        """Chunks of blocks: where they are, their codes as float32, and their scales."""
        self.check_width(weights.shape[-1])
        blocks_NB = weights.reshape(-1, self.block)
        given = None if scales is None else self.by_block(scales)
        for rows in self.chunks(weights):
            chunk_NB = blocks_NB[rows].float()
            if given is None:
                codes_NB, found = self._search(chunk_NB)
            else:
                found = {name: scale[rows] for name, scale in given.items()}
                codes_NB = self.nearest(chunk_NB, found)
            yield rows, codes_NB.add_(0.0), found  # +0: the integer code 0 has no sign, and its point must not either

    def chunks(self, weights: torch.Tensor) -> Iterator[slice]:
        """Slices of as many blocks of `weights` as are worked on at once."""
        count, at_once = weights.numel() // self.block, _CPU_CHUNK if weights.device.type == "cpu" else _GPU_CHUNK
        for start in range(0, count, max(1, at_once // self.block)):
            yield slice(start, start + max(1, at_once // self.block))

    def by_row(self, scales: Scales, shape: torch.Size) -> dict[str, torch.Tensor]:
        """Scales `[N]` or `[N, G]` as `[…, W / B]` or `[…, W / B, G]`."""
        lead = (*shape[:-1], shape[-1] // self.block)
        return {name: scale.view(*lead, *scale.shape[1:]) for name, scale in scales.items()}

    def by_block(self, scales: Scales) -> dict[str, torch.Tensor]:
        """The reverse of `by_row`."""
        per_block = self.sub_blocks()
        return {name: scale.reshape(-1, *per_block.get(name, ())) for name, scale in scales.items()}

    def sub_blocks(self) -> dict[str, tuple[int, ...]]:
        """`(G,)` for each scale that is one of several in a block."""
        return {}


class _StraightThrough(torch.autograd.Function):  # type: ignore[misc]
    """Weights to their points; the gradient as if nothing had been done."""

    @staticmethod
    def forward(
        ctx: Any, weights: torch.Tensor, grid: Grid, scales: Scales | None, dtype: torch.dtype | None
    ) -> torch.Tensor:
        """The points in a new tensor."""
        ctx.dtype = weights.dtype
        return grid._on_grid(weights, scales, dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient at the points, for the weights."""
        return grad.to(ctx.dtype), None, None, None
