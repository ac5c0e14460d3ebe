"""What share of a program's compute runs in XNNPACK, counted on the lowered graph.

A program whose operators were silently left to the portable kernels runs, and is many times slower. So the share is
measured: multiplications and additions of matrix products, one operation an element of everything else that computes,
at the sizes the program was traced with. Views and symbolic sizes are no compute.

Axes: M rows, K inner size, N columns of a product.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lmdistill.errors import IntegrityError

_FREE = ("view_copy", "getitem", "sym_size", "alloc", "floordiv", "squeeze_copy", "unsqueeze_copy", "expand_copy")


@dataclass
class Work:
    """Operations by who runs them."""

    delegated: float = 0.0
    left: Counter[str] = field(default_factory=Counter)  # by operator

    @property
    def share(self) -> float:
        """Of all operations, those in the delegate."""
        return self.delegated / max(1.0, self.delegated + sum(self.left.values()))


def delegated_work(program: Any) -> Work:
    """Count an edge program after lowering."""
    work = Work()
    for node in _calls(program.graph_module):
        if _name(node) == "executorch_call_delegate":
            lowered = getattr(program.graph_module, node.args[0].target)
            work.delegated += sum(map(_operations, _calls(lowered.original_module.graph_module)))
        elif operations := _operations(node):
            work.left[_name(node)] += operations
    return work


def check_share(work: Work, least: float) -> None:
    """Raise IntegrityError, with what was left out, where less than `least` of the compute is delegated."""
    if work.share < least:
        worst = ", ".join(f"{name} ({count:,} operations)" for name, count in work.left.most_common(3))
        raise IntegrityError(
            f"only {work.share:.1%} of the program's compute runs in XNNPACK, not {least:.0%}",
            why=f"left to the portable kernels: {worst}",
            fix="such a file is slow; lower `min_delegated` in the export stage to ship it all the same",
        )


def _calls(graph_module: Any) -> Iterator[Any]:
    return (node for node in graph_module.graph.nodes if node.op == "call_function")


def _name(node: Any) -> str:
    """An operator's name without its namespace and overload."""
    name = getattr(node.target, "__name__", str(node.target))
    return name.rsplit("::", 1)[-1].split(".")[-2] if "." in name else name


def _operations(node: Any) -> int:
    """What a node computes."""
    name = _name(node)
    value = node.meta.get("val")
    if name in _FREE or not hasattr(value, "shape"):
        return 0
    outputs = math.prod(map(_size, value.shape))
    if name in ("linear", "mm", "bmm", "addmm"):
        left = node.args[1] if name == "addmm" else node.args[0]
        return 2 * outputs * _size(left.meta["val"].shape[-1])
    return outputs


def _size(dimension: Any) -> int:
    """A dimension as it was traced."""
    return int(dimension if isinstance(dimension, int) else dimension.node.hint)
