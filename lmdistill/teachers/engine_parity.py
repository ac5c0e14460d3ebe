"""The proof that an engine says what the teacher says: a few rows scored by it and by a reference, entry by entry.

Axes: B rows, T tokens in a row, N = B·T tokens, K entries of a token.
Engines that run a teacher outside transformers (vLLM, llama.cpp) bring kernels and converters of their own, and some
of them compute some architectures wrongly. The reference is the transformers engine in float32 on the same teacher.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import IntegrityError
from lmdistill.pipeline.files import write_text
from lmdistill.pipeline.stage import ModelRef
from lmdistill.teachers.engine import EngineOptions, TeacherEngine, TopK

REFERENCE = "transformers"  # the engine that others are held against
FLOAT32_BOUND = 0.01  # nats: engines that are right stay a hundred times below it; docs/signals.md
MAX_MARGIN, MEAN_MARGIN = 3.0, 2.0  # over what rounding to the engine's precision does to the reference itself


@dataclass(frozen=True)
class Expected:
    """What the reference said of the rows, and how far from it an engine may be, in nats."""

    top_k: TopK
    bound: float
    mean_bound: float = math.inf


@dataclass(frozen=True)
class Proof:
    """Rows on which an engine is held against the reference whenever it is opened."""

    tokens_BT: NDArray[Any]
    starts_BT: NDArray[np.bool_]
    bound: float | None  # nats; None: what the engine's precision explains
    record: Path  # where the first proof's figures are kept, as JSON

    def expect(self, teacher: ModelRef, options: EngineOptions, make: Callable[[], TeacherEngine]) -> Expected:
        """Ask the reference, an unopened engine that `make` gives, and leave none of it in memory.

        In bfloat16 the reference's own rounding is the measure: how much that is depends on the teacher.
        """

        def ask(precision: str) -> TopK:
            asked = replace(options, precision=precision, finer_products=False)  # its rounding is what is measured
            reference = open_reference(teacher, asked, make())
            return reference.score(self.tokens_BT, self.starts_BT)

        spoken = ask("float32")
        gc.collect()
        if self.bound is not None or options.precision == "float32":
            return Expected(spoken, self.bound or FLOAT32_BOUND)
        rounding = compare(ask(options.precision), spoken, math.inf)
        gc.collect()
        return Expected(
            spoken, MAX_MARGIN * rounding["max_delta_logprob"], MEAN_MARGIN * rounding["mean_delta_logprob"]
        )

    def settle(self, engine: TeacherEngine, expected: Expected) -> None:
        """Compare what `engine` says of the rows with what the reference said; raises IntegrityError as `compare`."""
        found = engine.score(self.tokens_BT, self.starts_BT)
        figures = compare(found, expected.top_k, expected.bound, expected.mean_bound)
        if not self.record.exists():
            self.record.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.record, json.dumps(figures, sort_keys=True), f".{self.record.name}.{os.getpid()}.tmp")


def open_reference(teacher: ModelRef, options: EngineOptions, reference: TeacherEngine | None = None) -> TeacherEngine:
    """The transformers engine (or `reference`, not yet opened) on the same teacher, in the options' precision.

    It runs on the CPU, so that it takes no accelerator's memory. With `isolate` each document is given to it by
    itself, so that teachers that leak in a packed row are proven too.
    """
    from lmdistill.teachers.prompts import DocumentsApart
    from lmdistill.teachers.registry import create_engine

    plain = reference or create_engine(REFERENCE)
    opened = DocumentsApart(plain) if options.isolate else plain
    opened.open(teacher, replace(options, device="cpu"))
    return opened


def prove(
    engine: TeacherEngine,
    reference_engine: TeacherEngine,
    tokens_BT: NDArray[Any],
    starts_BT: NDArray[np.bool_],
    bound: float,
) -> dict[str, float]:
    """Score the rows by both engines and compare; see `compare`. Raises IntegrityError above `bound` nats."""
    return compare(engine.score(tokens_BT, starts_BT), reference_engine.score(tokens_BT, starts_BT), bound)


def compare(found: TopK, expected: TopK, bound: float, mean_bound: float = math.inf) -> dict[str, float]:
    """How far two engines' predictions of the same rows lie apart, in nats.

    `max_delta_logprob` is over the ids that both have among their K, over `lp_next`, and over ids that one engine has
    and the other has not: there, by how much the id exceeds the other's K-th entry, the least they can differ.
    `mean_delta_logprob` is over the common ids. `tail_mass` is the largest difference between the two tails' masses.
    Raises IntegrityError where one of them is more than `bound`, or the mean more than `mean_bound`, allows.
    """
    common, only_found, only_expected = _matched(found, expected)
    following = np.abs(found.lp_next_BT[:, :-1] - expected.lp_next_BT[:, :-1]).ravel()
    tails = np.abs(np.exp(found.tail_BT) - np.exp(expected.tail_BT))
    figures = {
        "max_delta_logprob": _largest(np.concatenate([common, following, only_found, only_expected])),
        "mean_delta_logprob": float(common.mean()) if common.size else float("nan"),
        "tail_mass": _largest(tails),
        "common_ids": common.size / found.ids_BTK.size,
        "tokens": float(found.lp_next_BT.size),
    }
    limits = {"max_delta_logprob": bound, "mean_delta_logprob": mean_bound, "tail_mass": float(np.expm1(bound))}
    if not all(figures[name] <= limit for name, limit in limits.items()):  # NaN is not
        raise IntegrityError(
            f"the teacher's engine does not compute what the teacher computes: its log-probs are up to "
            f"{figures['max_delta_logprob']:.3g} nats from the reference's (bound {bound:.3g})",
            why=f"over {int(figures['tokens'])} tokens {figures['common_ids']:.1%} of the top ids are the same, their "
            f"log-probs {figures['mean_delta_logprob']:.3g} nats apart on average (bound {mean_bound:.3g}); tails up "
            f"to {figures['tail_mass']:.3g} of the mass apart",
            fix="use `engine: transformers`; raise `parity_bound` only where you know why they differ",
        )
    bounds = {"bound": bound, "mean_bound": mean_bound}
    return figures | {name: value for name, value in bounds.items() if math.isfinite(value)}


def _matched(found: TopK, expected: TopK) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """|Δ log-prob| of the ids that both have, and by how much those that one has exceed the other's K-th entry."""
    position_BT1 = np.arange(found.tail_BT.size, dtype=np.int64).reshape(*found.tail_BT.shape, 1) << 32
    ours, theirs = ((position_BT1 | one.ids_BTK).ravel() for one in (found, expected))
    _, at_found, at_expected = np.intersect1d(ours, theirs, return_indices=True)
    common = np.abs(found.logp_BTK.ravel()[at_found] - expected.logp_BTK.ravel()[at_expected])
    only_found = np.delete((found.logp_BTK - expected.logp_BTK[..., -1:]).ravel(), at_found)
    only_expected = np.delete((expected.logp_BTK - found.logp_BTK[..., -1:]).ravel(), at_expected)
    return common, only_found, only_expected


def _largest(values: NDArray[Any]) -> float:
    return float(values.max()) if values.size else 0.0
