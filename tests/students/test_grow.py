"""Growing a student: what must stay the same, what must get better, and that a kill changes nothing.

Axes: R rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdistill.checkpoints import load_model
from lmdistill.pipeline.stage import SilentProgress
from lmdistill.students import blocks, lfm2, parameters, selection, short_conv
from lmdistill.students.grow import Growth, grow
from lmdistill.students.regression import Fit

GROWTH = Growth("lfm2", 3, 1, 3, 2, 3, Fit(6, 4, 5e-3, "float32", 0))


@pytest.fixture(scope="module")
def teacher(toy_llama: Callable[..., Path]) -> Any:
    return load_model(toy_llama(vocab_size=512))


@pytest.fixture(scope="module")
def tokens_RT() -> torch.Tensor:
    return torch.randint(512, (8, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source(teacher: Any, tokens_RT: torch.Tensor) -> Any:
    return lfm2.from_llama(teacher, tokens_RT)


def _kl(reference: Any, other: Any, tokens_RT: torch.Tensor) -> float:
    with torch.inference_mode():
        return blocks.KlReference(reference(tokens_RT).logits.flatten(0, 1)).mean_kl(
            other(tokens_RT).logits.flatten(0, 1)
        )


def test_an_all_attention_lfm2_computes_what_the_llama_computes(
    teacher: Any, source: Any, tokens_RT: torch.Tensor
) -> None:
    random = type(source)(source.config)
    assert _kl(teacher, source, tokens_RT) < 1e-4 < _kl(teacher, random, tokens_RT)


def test_scaling_by_powers_of_two_keeps_every_digit_of_the_weights(teacher: Any, source: Any) -> None:
    for ours, theirs in zip(source.model.layers, teacher.model.layers, strict=True):
        ratio = ours.self_attn.q_proj.weight / theirs.self_attn.q_proj.weight
        assert (ratio == ratio.flatten()[0]).all() and torch.frexp(ratio.flatten()[0]).mantissa == 0.5
        assert (ours.feed_forward.w2.weight == theirs.mlp.down_proj.weight * lfm2.RESIDUAL_SCALE).all()


def test_blocks_one_by_one_are_the_model(source: Any, tokens_RT: torch.Tensor) -> None:
    with torch.inference_mode():
        hidden = blocks.embed(source, tokens_RT)
        rotary = blocks.positions(source, hidden)
        for block in source.model.layers:
            hidden = blocks.run_block(block, hidden, rotary)
        assert torch.equal(blocks.logits(source, hidden), source(tokens_RT).logits)


def test_kl_by_one_pass_is_kl_by_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 30, generator=generator) for _ in range(2))
    expected = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean().item()
    assert blocks.KlReference(p).mean_kl(q) == pytest.approx(expected, rel=1e-4)


def test_greedy_takes_the_cheapest_change_when_all_are_tried(source: Any, tokens_RT: torch.Tensor) -> None:
    scorer = selection.PlanScorer(source, tokens_RT)
    full: list[selection.Fate] = ["full"] * 4
    costs = [scorer.score([*full[:i], "gone", *full[i + 1 :]]) for i in range(4)]
    plan = selection.greedy(scorer, full, "gone", 1, 4, lambda *_: None)
    assert plan.index("gone") == min(range(4), key=costs.__getitem__)
    assert scorer.score(plan) == pytest.approx(min(costs), rel=1e-5)
    assert scorer.score(full) == pytest.approx(0, abs=1e-5)  # though the base has lost a block


def test_a_fitted_convolution_is_nearer_to_its_attention_than_none(source: Any, tokens_RT: torch.Tensor) -> None:
    config = lfm2.config_like(source.config, ["conv"], 3, source.config.norm_eps)
    with torch.no_grad():
        hidden = blocks.embed(source, tokens_RT)
        rotary = blocks.positions(source, hidden)
        block = source.model.layers[0]
        normed = block.operator_norm(hidden)
        wanted = block.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
        fitted = short_conv.fit(config, block.self_attn, normed, rotary)(normed)
    assert (fitted - wanted).pow(2).sum() < 0.8 * wanted.pow(2).sum()


@pytest.mark.parametrize("architecture", ["lfm2", "llama"])
def test_a_grown_student_has_its_shape_its_parameters_and_learns_its_blocks(
    architecture: str, teacher: Any, source: Any, tokens_RT: torch.Tensor, tmp_path: Path
) -> None:
    growth = replace(GROWTH, architecture=architecture, attention_layers=1 if architecture == "lfm2" else 3)
    student, record = grow(source if architecture == "lfm2" else teacher, tokens_RT, growth, tmp_path, SilentProgress())
    assert student.config.num_hidden_layers == 3
    assert parameters.count(student.config) == sum(p.numel() for p in student.parameters())
    if architecture == "lfm2":
        assert student.config.layer_types.count("conv") == 2
    assert all(after < before for before, after in record["relative_error"] if before > 1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_growth_stopped_after_any_step_ends_with_the_same_weights(
    precision: str, source: Any, tokens_RT: torch.Tensor, tmp_path: Path
) -> None:
    growth = replace(GROWTH, fit=replace(GROWTH.fit, precision=precision))
    before = {name: tensor.clone() for name, tensor in [*source.named_parameters(), *source.named_buffers()]}
    (tmp_path / "whole").mkdir()
    whole, _ = grow(source, tokens_RT, growth, tmp_path / "whole", SilentProgress())
    for name, tensor in [*source.named_parameters(), *source.named_buffers()]:
        assert torch.equal(tensor, before[name]), f"growing changed the source's {name}"
    for kept in range(3):
        work = tmp_path / f"stopped-{kept}"
        work.mkdir()
        for name in ["plan.json", *(f"block-{i:03d}.{end}" for i in range(kept) for end in ("json", "safetensors"))]:
            (work / name).write_bytes((tmp_path / "whole" / name).read_bytes())
        resumed, _ = grow(source, tokens_RT, growth, work, SilentProgress())
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("layers", "parameters_of_lfm2"), [("350M", 354_483_968), ("1.2B", 1_170_340_608), ("2.6B", 2_569_272_320)]
)
def test_formula_gives_the_published_counts(layers: str, parameters_of_lfm2: int) -> None:
    from transformers import Lfm2Config

    shapes = {"350M": (1024, 16, 6, 16, 4608), "1.2B": (2048, 16, 6, 32, 8192), "2.6B": (2048, 30, 8, 32, 10752)}
    width, depth, attention, heads, inner = shapes[layers]
    config = Lfm2Config(
        vocab_size=65536,
        hidden_size=width,
        intermediate_size=inner,
        block_auto_adjust_ff_dim=False,
        num_attention_heads=heads,
        num_key_value_heads=8,
        num_hidden_layers=depth,
        layer_types=["full_attention"] * attention + ["conv"] * (depth - attention),
    )
    assert parameters.count(config) == parameters_of_lfm2


def test_a_student_may_begin_at_any_block_of_the_teacher(source: Any, tokens_RT: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('["gone", "full", "local", "gone"]')
    student, record = grow(source, tokens_RT, replace(GROWTH, layers=2), tmp_path, SilentProgress())
    assert student.config.layer_types == ["full_attention", "conv"]
    first, second = record["relative_error"]
    assert first[0] > 1e-4  # it stands for two blocks, so it does not begin as their equal
    assert second[1] < second[0]
