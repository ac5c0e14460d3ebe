"""A teacher in little memory: linear layers of 4 or 8 bits by bitsandbytes, and what that costs it.

nf4 (arXiv 2305.14314) takes about 0.55 bytes a weight, int8 (arXiv 2208.07339) about 1; head, embeddings and norms stay
as they are. What is asked of the teacher is then what this smaller model says: the price is measured, not hidden.

Axes: B rows, T tokens in a row.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.pipeline.files import write_text
from lmdistill.pipeline.stage import ModelRef
from lmdistill.teachers.engine import EngineOptions, TeacherEngine, TopK
from lmdistill.teachers.engine_parity import REFERENCE, Expected, Proof, compare, open_reference

BYTES = {"nf4": 0.57, "int8": 1.03}  # a weight of a linear layer, scales included
_PROBE = 64  # width of the layer that is tried


def check_low_bits(load_in: str, engine: str, device: str) -> None:
    """Raise PreflightError where bitsandbytes is missing, cannot run `load_in` here, or the engine is not for it."""
    if engine != REFERENCE:
        raise PreflightError(
            f"`load_in: {load_in}` needs `engine: {REFERENCE}`",
            why=f"engine '{engine}' brings weights of its own",
            fix="drop one of the two",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PreflightError(
            f"`load_in: {load_in}` needs the package bitsandbytes",
            why="not installed",
            fix="pip install 'lmdistill[bitsandbytes]'",
        )
    try:
        _try(load_in, device)
    except Exception as error:
        raise PreflightError(
            f"bitsandbytes cannot run `load_in: {load_in}` on {device}",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="drop `load_in`, or use a machine with a GPU",
        ) from error


def _try(load_in: str, device: str) -> None:
    """One small layer forward; raises what bitsandbytes raises."""
    import bitsandbytes as bnb
    import torch

    if load_in == "nf4":
        layer = bnb.nn.Linear4bit(_PROBE, _PROBE, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(_PROBE, _PROBE, bias=False, has_fp16_weights=False)
    with torch.inference_mode():
        found = layer.to(device)(torch.ones(2, _PROBE, device=device))
    if not torch.isfinite(found).all():
        raise LmdistillError("its result is not finite")


def bits_config(load_in: str, dtype: Any) -> Any:
    """What transformers' from_pretrained takes as `quantization_config`."""
    from transformers import BitsAndBytesConfig

    if load_in == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if load_in == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    raise ValueError(f"load_in: {load_in}")


@dataclass(frozen=True)
class Cost(Proof):
    """Rows on which the smaller teacher is compared with the whole one: how far apart they are is written down."""

    def expect(self, teacher: ModelRef, options: EngineOptions, make: Callable[[], TeacherEngine]) -> Expected:
        """Ask the whole teacher, in the precision that is asked for, and leave none of it in memory."""
        whole = open_reference(teacher, replace(options, load_in=None), make())
        spoken = whole.score(self.tokens_BT, self.starts_BT)
        del whole
        gc.collect()
        return Expected(spoken, math.inf)

    def settle(self, engine: TeacherEngine, expected: Expected) -> None:
        """Measure what the teacher lost: its loss on the text, and how far its log-probs moved."""
        found = engine.score(self.tokens_BT, self.starts_BT)
        figures = compare(found, expected.top_k, math.inf)
        figures |= {"nll": _nll(found), "nll_whole": _nll(expected.top_k)}
        figures["nll_cost"] = figures["nll"] - figures["nll_whole"]
        if not self.record.exists():
            self.record.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.record, json.dumps(figures, sort_keys=True), f".{self.record.name}.{os.getpid()}.tmp")


def _nll(spoken: TopK) -> float:
    return float(-np.nanmean(spoken.lp_next_BT))
