"""Grows a student from a Llama-like teacher: blocks left out, attention replaced, each block fitted in turn.

Every decision and every fitted block is kept in the work folder as soon as it is made, so that a growth that was
stopped goes on where it was and ends with the same bytes.

Axes: R rows, T positions, D hidden width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lmdistill.pipeline.stage import Progress
from lmdistill.precision import products_in
from lmdistill.students import blocks, lfm2, regression, selection, short_conv
from lmdistill.students.regression import Fit
from lmdistill.students.selection import Fate, PlanScorer

Start = Callable[[Any, Any, torch.Tensor, Any], None]  # of (block, the source's, inputs [R, T, D], rotary)


@dataclass(frozen=True)
class Growth:
    """What is grown, and how."""

    architecture: str  # lfm2 | llama
    layers: int
    attention_layers: int
    kernel: int
    selection_rows: int
    selection_width: int
    fit: Fit


def choose(model: Any, tokens_RT: torch.Tensor, growth: Growth, work: Path, progress: Progress) -> list[Fate]:
    """The fate of every block of `model`, greedy by measured KL; kept in work/plan.json."""
    kept = work / "plan.json"
    if kept.exists():
        plan: list[Fate] = json.loads(kept.read_text())
        return plan
    scorer = PlanScorer(in_precision(model, growth.fit.precision), tokens_RT[: growth.selection_rows])
    total = len(scorer.layers)
    plan = ["full"] * total
    for fate, count in (("gone", total - growth.layers), ("local", growth.layers - growth.attention_layers)):
        word = "blocks left out" if fate == "gone" else "attentions switched off"

        def report(step: int, steps: int, kl: float, word: str = word) -> None:
            progress.update(step, steps, word, kl=round(kl, 4))

        if count:
            plan = selection.greedy(scorer, plan, fate, count, growth.selection_width, report)  # type: ignore[arg-type]
    write_json(kept, plan)
    return plan


def in_precision(model: Any, precision: str) -> Any:
    """`model`, or a copy with weights in what products are made in; buffers (rotary frequencies) keep every digit."""
    products = products_in(precision, model.device.type)
    if products == "float32":
        return model
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(getattr(torch, products))
    return rounded


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is either whole or not there."""
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(content))
    partial.rename(path)


def _empty_student(source: Any, plan: list[Fate], growth: Growth) -> Any:
    """The student with the source's embeddings, norms, MLPs and kept attention; its convolutions are still random."""
    from transformers import AutoModelForCausalLM

    kept = [fate for fate in plan if fate != "gone"]
    if growth.architecture == "lfm2":
        types = ["conv" if fate == "local" else "full_attention" for fate in kept]
        config = lfm2.config_like(source.config, types, growth.kernel, source.config.norm_eps)
    else:
        config = type(source.config).from_dict(source.config.to_dict() | {"num_hidden_layers": len(kept)})
    torch.manual_seed(growth.fit.seed)
    student = AutoModelForCausalLM.from_config(config).float().eval()
    student.model.embed_tokens.load_state_dict(source.model.embed_tokens.state_dict())
    blocks.final_norm(student).load_state_dict(blocks.final_norm(source).state_dict())
    if not config.tie_word_embeddings:
        student.lm_head.load_state_dict(source.lm_head.state_dict())
    originals = [layer for layer, fate in zip(source.model.layers, plan, strict=True) if fate != "gone"]
    for block, original in zip(student.model.layers, originals, strict=True):
        block.load_state_dict(original.state_dict(), strict=False)
    return student


def spans(plan: list[Fate]) -> list[range]:
    """For each kept block, the teacher's blocks it has to stand for: itself and those gone up to the next kept one."""
    first = kept_blocks(plan)[1:]
    return [range(start, end) for start, end in zip([0, *first], [*first, len(plan)], strict=True)]


def kept_blocks(plan: list[Fate]) -> list[int]:
    """The blocks of the teacher that the student has."""
    return [index for index, fate in enumerate(plan) if fate != "gone"]


def grow(source: Any, tokens_RT: torch.Tensor, growth: Growth, work: Path, progress: Progress) -> tuple[Any, Any]:
    """The student and the record of how it came about.

    `source` computes what the teacher computes, in the student's own architecture and in float32 (see lfm2.py).
    """
    plan = choose(source, tokens_RT, growth, work, progress)
    student = _empty_student(source, plan, growth)

    def start(block: Any, original: Any, inputs_RTD: torch.Tensor, rotary: Any) -> None:
        """A convolution begins as near to the attention it replaces as closed-form fits bring it."""
        if hasattr(block, "conv"):
            with torch.no_grad():
                normed_RTD = block.operator_norm(inputs_RTD)
            fitted = short_conv.fit(block.conv.config, original.self_attn, normed_RTD, rotary)
            block.conv.load_state_dict(fitted.state_dict())

    errors = fit_in_turn(student, source, plan, tokens_RT, growth.fit, work, progress, start)
    student.tie_weights()
    return student, {"plan": plan, "relative_error": errors}


def fit_in_turn(
    student: Any,
    source: Any,
    plan: list[Fate],
    tokens_RT: torch.Tensor,
    how: Fit,
    work: Path,
    progress: Progress,
    start: Start = lambda *_: None,
) -> list[list[float]]:
    """Fit the student's blocks from the bottom up to what `source` computes where the next kept block begins.

    A student narrower than its source has the first of its hidden channels. Each block is kept in `work`; `start`
    prepares a block that is not there yet. Returns each block's relative error before and after.
    """
    teacher_RTD = blocks.embed(source, tokens_RT).detach()
    student_RTD = blocks.embed(student, tokens_RT).detach().clone()
    width = student_RTD.shape[-1]
    rotary = blocks.positions(source, teacher_RTD[:1])
    errors = []
    originals = [source.model.layers[layer] for layer in kept_blocks(plan)]
    for index, (span, block, original) in enumerate(zip(spans(plan), student.model.layers, originals, strict=True)):
        for layer in span:
            teacher_RTD = regression.advance(source.model.layers[layer], teacher_RTD, rotary, how.rows, how.precision)
        kept = work / f"block-{index:03d}"
        if not kept.with_suffix(".json").exists():
            start(block, original, student_RTD, rotary)
        errors.append(_fit_or_load(block, student_RTD, teacher_RTD[..., :width], rotary, how, kept))
        student_RTD = regression.advance(block, student_RTD, rotary, how.rows, how.precision)
        progress.update(index + 1, len(student.model.layers), "block fitted", error=round(errors[-1][1], 5))
    return errors


def _fit_or_load(
    block: Any, inputs_RTD: torch.Tensor, targets_RTD: torch.Tensor, rotary: Any, how: Fit, kept: Path
) -> list[float]:
    """Fit one block, or take it from `kept` (.safetensors and .json) where it has been fitted already."""
    weights, errors = kept.with_suffix(".safetensors"), kept.with_suffix(".json")
    if errors.exists():
        block.load_state_dict(load_file(weights))
        loaded: list[float] = json.loads(errors.read_text())
        return loaded
    before, after = regression.fit_block(block, inputs_RTD, targets_RTD, rotary, how)
    save_file(block.state_dict(), weights)
    write_json(errors, [round(before, 6), round(after, 6)])
    return [round(before, 6), round(after, 6)]
