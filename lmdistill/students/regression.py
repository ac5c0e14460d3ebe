"""Block-local regression: each block of a grown student learns what the teacher's blocks it stands for do.

Blocks are fitted from the bottom up. A block sees what the student's blocks below it really produce and aims at
the teacher's hidden states at the depth where the next kept block begins, so it bridges the blocks left out
after it and makes up for errors made before it. No head, no back-propagation through other blocks.

Axes: R rows, T positions, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lmdistill.precision import products_in
from lmdistill.students import blocks
from lmdistill.training.optimizer import build, step_sizes


@dataclass(frozen=True)
class Fit:
    """How a block is fitted."""

    steps: int
    rows: int
    lr: float  # relative to each tensor's root mean square
    precision: str
    seed: int


def relative_errors(out_RTD: torch.Tensor, target_RTD: torch.Tensor) -> torch.Tensor:
    """Squared error of each position relative to the squared length of its target `[R, T]`.

    The next block normalises every position, so an error counts by what share of the position it is; the few
    positions with huge activations would own a plain mean square.
    """
    error_RT = (out_RTD.float() - target_RTD.float()).pow(2).sum(-1)
    return error_RT / target_RTD.float().pow(2).sum(-1)


def fit_block(
    block: Any, inputs_RTD: torch.Tensor, targets_RTD: torch.Tensor, rotary: Any, how: Fit
) -> tuple[float, float]:
    """Fit one block in place; the relative error before and after, on the first rows."""
    probe = slice(0, how.rows)
    device = inputs_RTD.device.type
    products = products_in(how.precision, device)

    def error(rows: Any) -> torch.Tensor:
        with torch.autocast(device, getattr(torch, products), enabled=products != "float32"):
            out_RTD = blocks.run_block(block, inputs_RTD[rows], rotary)
        return relative_errors(out_RTD, targets_RTD[rows]).mean()

    with torch.no_grad():
        before = error(probe).item()
    optimizer = build(block, step_sizes(block, how.lr, relative=True), 0.0, (0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    generator = torch.Generator().manual_seed(how.seed)
    for _ in range(how.steps):
        rows = torch.randint(inputs_RTD.shape[0], (how.rows,), generator=generator)
        error(rows).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return before, error(probe).item()


def advance(block: Any, hidden_RTD: torch.Tensor, rotary: Any, rows: int, precision: str) -> torch.Tensor:
    """The block's output on all rows, a few at a time."""
    out_RTD = torch.empty_like(hidden_RTD)
    device = hidden_RTD.device.type
    products = products_in(precision, device)
    with torch.no_grad(), torch.autocast(device, getattr(torch, products), enabled=products != "float32"):
        for start in range(0, hidden_RTD.shape[0], rows):
            part = slice(start, start + rows)
            out_RTD[part] = blocks.run_block(block, hidden_RTD[part], rotary)
    return out_RTD
