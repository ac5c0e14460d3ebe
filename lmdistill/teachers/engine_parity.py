"""The proof that an engine says what the teacher says: a few rows scored by it and by a reference, entry by entry.

Axes: B rows, T tokens in a row, N = B·T tokens, K entries of a token.
Engines that run a teacher outside transformers (vLLM, llama.cpp) bring kernels and converters of their own, and some
of them compute some architectures wrongly. The reference is the transformers engine in float32 on the same teacher.
"""

from __future__ import annotations

import json
import os
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
BOUNDS = {"float32": 0.01, "bfloat16": 1.0}  # nats: the largest |Δ log-prob| that rounding explains; docs/signals.md


@dataclass(frozen=True)
class Proof:
    """Rows on which an engine is held against the reference whenever it is opened."""

    tokens_BT: NDArray[Any]
    starts_BT: NDArray[np.bool_]
    bound: float  # nats
    record: Path  # where the first proof's figures are kept, as JSON

    def settle(self, engine: TeacherEngine, expected: TopK) -> None:
        """Compare what `engine` says of the rows with what the reference said; raises IntegrityError as `compare`."""
        figures = compare(engine.score(self.tokens_BT, self.starts_BT), expected, self.bound)
        if not self.record.exists():
            self.record.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.record, json.dumps(figures, sort_keys=True), f".{self.record.name}.{os.getpid()}.tmp")


def open_reference(teacher: ModelRef, options: EngineOptions, reference: TeacherEngine | None = None) -> TeacherEngine:
    """The transformers engine (or `reference`, not yet opened) on the same teacher, in float32.

    It runs on the CPU, so that it takes no accelerator's memory. With `isolate` each document is given to it by
    itself, so that teachers that leak in a packed row are proven too.
    """
    from lmdistill.teachers.prompts import DocumentsApart
    from lmdistill.teachers.registry import create_engine

    plain = reference or create_engine(REFERENCE)
    opened = DocumentsApart(plain) if options.isolate else plain
    opened.open(teacher, replace(options, precision="float32", device="cpu"))
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


def compare(found: TopK, expected: TopK, bound: float) -> dict[str, float]:
    """How far two engines' predictions of the same rows lie apart, in nats.

    `max_delta_logprob` is over the ids that both have among their K, over `lp_next`, and over ids that one engine has
    and the other has not: there, by how much the id exceeds the other's K-th entry, the least they can differ.
    `tail_mass` is the largest difference between the two tails' masses. Raises IntegrityError where either is more
    than `bound` allows.
    """
    both_NKK = found.ids_BTK[..., :, None] == expected.ids_BTK[..., None, :]
    apart_NKK = np.abs(found.logp_BTK[..., :, None] - expected.logp_BTK[..., None, :])
    common = apart_NKK[both_NKK]
    following = np.abs(found.lp_next_BT[:, :-1] - expected.lp_next_BT[:, :-1]).ravel()
    only_found = _excess(found, expected, both_NKK.any(axis=-1))
    only_expected = _excess(expected, found, both_NKK.any(axis=-2))
    tails = np.abs(np.exp(found.tail_BT) - np.exp(expected.tail_BT))
    figures = {
        "max_delta_logprob": _largest(np.concatenate([common, following, only_found, only_expected])),
        "mean_delta_logprob": float(common.mean()) if common.size else float("nan"),
        "tail_mass": _largest(tails),
        "common_ids": float(both_NKK.sum() / found.ids_BTK.size),
        "tokens": float(found.lp_next_BT.size),
        "bound": bound,
    }
    # written so that NaN fails
    if not (figures["max_delta_logprob"] <= bound and figures["tail_mass"] <= np.expm1(bound)):
        raise IntegrityError(
            f"the teacher's engine does not compute what the teacher computes: its log-probs are up to "
            f"{figures['max_delta_logprob']:.3g} nats from the reference's (bound {bound:g})",
            why=f"over {int(figures['tokens'])} tokens {figures['common_ids']:.1%} of the top ids are the same, their "
            f"log-probs {figures['mean_delta_logprob']:.3g} nats apart on average; tails up to "
            f"{figures['tail_mass']:.3g} of the mass apart",
            fix="use `engine: transformers`; raise `parity_bound` only where you know why they differ",
        )
    return figures


def _excess(one: TopK, other: TopK, shared_NK: NDArray[np.bool_]) -> NDArray[np.float32]:
    """By how much ids that only `one` has exceed the K-th entry of `other`, which has all that are likelier."""
    excess_NK: NDArray[np.float32] = one.logp_BTK - other.logp_BTK[..., -1:]
    return excess_NK[~shared_NK]


def _largest(values: NDArray[Any]) -> float:
    return float(values.max()) if values.size else 0.0
