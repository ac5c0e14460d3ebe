"""Weights of tokens: what each weighting does, mean 1 in every row, the gradient, and what cannot be is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from training_toys import LENGTH, train_toy

from lmdistill.errors import IntegrityError, LmdistillError, RecipeError
from lmdistill.losses import registry
from lmdistill.losses.fused_head import Mix, fused_head_loss
from lmdistill.losses.registry import LossOptions, Targets
from lmdistill.pipeline.keys import semantic
from lmdistill.pipeline.stage import Artefact, Planned, PreflightContext
from lmdistill.signals.reader import SignalsReader
from lmdistill.stages.corpus import CorpusConfig
from lmdistill.stages.distill import DistillStage
from lmdistill.training.config import DistillConfig
from lmdistill.training.data import SignalsCollator
from lmdistill.training.token_keys import TokenWeights
from lmdistill.training.token_weights import TokenView, find_weighting, weightings, weights_of

VOCAB, K = 30, 4


def view(row_N: list[int], seed: int = 0, student: bool = True) -> TokenView:
    """Positions of some rows, with a random teacher and student."""
    generator = torch.Generator().manual_seed(seed)
    count = len(row_N)
    logp_NV = (2 * torch.randn(count, VOCAB, generator=generator)).log_softmax(-1)
    next_N = torch.randint(VOCAB, (count,), generator=generator)
    logp_NK, ids_NK = logp_NV.topk(K)
    tail_N = logp_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1)
    student_N = torch.randn(count, VOCAB, generator=generator).log_softmax(-1)[torch.arange(count), next_N]

    def student_next() -> torch.Tensor:
        assert student, "this weighting has no need of the student"
        return student_N

    targets = Targets(next_N, ids_NK, logp_NK, tail_N)
    teacher_next_N = logp_NV[torch.arange(count), next_N]
    return TokenView(targets, teacher_next_N, student_next, torch.tensor(row_N), max(row_N, default=0) + 1)


ROWS = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(sorted)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from(sorted(weightings())), st.integers(0, 3))
def test_the_mean_weight_of_every_row_is_one(rows: list[int], name: str, seed: int) -> None:
    seen = view(rows, seed)
    weights_2N = weights_of(seen, TokenWeights(by=name))
    assert (weights_2N >= 0).all()
    for row in set(rows):
        mean = weights_2N[:, seen.row_N == row].mean(-1)
        assert torch.allclose(mean, torch.ones(2), atol=1e-5) or (name == "no_outliers" and (mean == 0).all())


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from(sorted(weightings())))
def test_a_row_has_the_weights_it_has_alone(rows: list[int], name: str) -> None:
    """However a step's rows are shared out among small batches."""
    seen, keys = view(rows), TokenWeights(by=name)
    together_2N = weights_of(seen, keys)
    for row in set(rows):
        mine_N = seen.row_N == row
        targets = Targets(*(getattr(seen.targets, f.name)[mine_N] for f in dataclasses.fields(Targets)[:4]))
        student_N = seen.student_next()[mine_N]
        places = torch.zeros(int(mine_N.sum()), dtype=torch.long)
        alone = TokenView(targets, seen.teacher_next_N[mine_N], lambda found=student_N: found, places, 1)
        torch.testing.assert_close(weights_of(alone, keys), together_2N[:, mine_N])


@pytest.mark.parametrize("name", ["uniform", "teacher_entropy", "teacher_confidence", "no_outliers"])
def test_a_weighting_by_the_teacher_alone_does_not_run_the_head_again(name: str) -> None:
    weights_of(view([0, 0, 1], student=False), TokenWeights(by=name))


def test_uniform_weights_are_all_one() -> None:
    assert torch.equal(weights_of(view([0, 0, 1]), TokenWeights(by="uniform")), torch.ones(2, 3))


def test_weights_go_by_the_teachers_entropy_and_against_it() -> None:
    seen = view([0] * 12)
    order_N = seen.entropy_N.argsort()
    for name, rising in (("teacher_entropy", True), ("teacher_confidence", False)):
        weight_N = weights_of(seen, TokenWeights(by=name))[0][order_N]
        assert (weight_N.diff() >= 0).all() if rising else (weight_N.diff() <= 0).all()


def test_the_entropy_is_that_of_the_entries_and_the_rest() -> None:
    seen = view([0] * 6)
    cells_NC = torch.cat([seen.targets.logp_NK, seen.targets.tail_N[:, None]], 1).double()
    torch.testing.assert_close(seen.entropy_N.double(), -(cells_NC.exp() * cells_NC).sum(-1), rtol=1e-5, atol=1e-6)
    whole = dataclasses.replace(seen, targets=dataclasses.replace(seen.targets, tail_N=torch.full((6,), -torch.inf)))
    assert torch.isfinite(whole.entropy_N).all()


def test_outliers_have_no_weight_and_a_row_of_them_is_left_out() -> None:
    seen = dataclasses.replace(view([0, 0, 0, 1]), teacher_next_N=torch.tensor([-1.0, -9.0, -2.0, -50.0]))
    weights_2N = weights_of(seen, TokenWeights(by="no_outliers", nats=5.0))
    assert weights_2N[0].tolist() == [1.5, 0.0, 1.5, 0.0]


def test_the_gap_weighs_what_the_teacher_knows_and_the_student_does_not() -> None:
    seen = dataclasses.replace(
        view([0, 0, 0]), teacher_next_N=torch.tensor([-1.0] * 3), student_next=lambda: torch.tensor([-9.0, -1.0, -0.1])
    )
    weight_N = weights_of(seen, TokenWeights(by="gap"))[0]
    assert weight_N[0] > 5 * weight_N[1] > 5 * 1.2 * weight_N[2]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.floats(0.05, 1))
def test_the_largest_gaps_of_a_row_are_trained_on(rows: list[int], share: float) -> None:
    seen = view(rows)
    kept_N = weights_of(seen, TokenWeights(by="top_gap", share=share))[0] > 0
    for row in set(rows):
        mine_N = seen.row_N == row
        count = int(mine_N.sum())
        assert int(kept_N[mine_N].sum()) == int(np.ceil(np.float32(share) * np.float32(count)))
        dropped = seen.gap_N[mine_N & ~kept_N]
        assert not len(dropped) or seen.gap_N[mine_N & kept_N].min() >= dropped.max()


@pytest.mark.parametrize(("of", "weighted"), [("both", [True, True]), ("kd", [True, False]), ("ce", [False, True])])
def test_the_named_loss_is_weighted(of: Any, weighted: list[bool]) -> None:
    weights_2N = weights_of(view([0] * 5), TokenWeights(by="gap", of=of))
    assert [not torch.equal(weight_N, torch.ones(5)) for weight_N in weights_2N] == weighted


@pytest.mark.parametrize("name", ["decoupled_topk", "reverse_kl", "topk_renormalised"])
def test_a_weighted_loss_has_the_gradient_of_weighted_terms(name: str) -> None:
    """Against the sum of one fused call a position, each scaled by autograd."""
    generator = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(7, 8, generator=generator)
    head_VD = torch.randn(VOCAB, 8, generator=generator)
    targets, scale_2N = view([0] * 7).targets, torch.rand(2, 7, generator=generator) * 2

    def gradients(weighted: bool) -> list[torch.Tensor]:
        hidden, head = hidden_ND.clone().requires_grad_(), head_VD.clone().requires_grad_()
        kd, ce = (Mix(registry.get(name), LossOptions(), *weights) for weights in ((0.7, 0.0), (0.0, 0.3)))
        if weighted:
            mix = Mix(registry.get(name), LossOptions(), 0.7, 0.3)
            total = fused_head_loss(hidden, head, dataclasses.replace(targets, scale_2N=scale_2N), mix, chunk=3).total
        else:
            total = sum(
                scale * fused_head_loss(hidden[at : at + 1], head, targets.rows(slice(at, at + 1)), mix).total
                for at in range(7)
                for scale, mix in zip(scale_2N[:, at], (kd, ce), strict=True)
            )
        total.backward()
        return [total.detach(), hidden.grad, head.grad]

    for ours, wanted in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


SHORT = {"tokens": LENGTH * 8 * 2}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "out/model/model.safetensors")
    return found


def test_uniform_weights_train_the_same_model(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    train_toy(tmp_path / "plain", signals, student, **SHORT)
    train_toy(tmp_path / "uniform", signals, student, **SHORT, token_weights={"by": "uniform"})
    plain, uniform = _weights(tmp_path / "plain"), _weights(tmp_path / "uniform")
    assert all(torch.allclose(plain[name], uniform[name], atol=1e-4) for name in plain)


@pytest.mark.parametrize("name", ["gap", "teacher_entropy"])
def test_accumulating_small_batches_changes_nothing_but_rounding(
    name: str, signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    keys = {**SHORT, "token_weights": {"by": name}}
    train_toy(tmp_path / "whole", signals, student, **keys)
    train_toy(tmp_path / "parts", signals, student, **keys, micro_rows=2, chunk=7)
    train_toy(tmp_path / "plain", signals, student, **SHORT)
    whole, parts, plain = (_weights(tmp_path / name) for name in ("whole", "parts", "plain"))
    assert all(torch.allclose(whole[name], parts[name], atol=2e-3) for name in whole)
    assert any(not torch.allclose(whole[name], plain[name], atol=2e-3) for name in whole)


def test_without_the_teachers_word_on_the_text_a_batch_is_refused(signals: Artefact) -> None:
    class Untold(SignalsReader):
        def read(self, rows: Any) -> Any:
            batch = super().read(rows)
            batch.lp_next_RT[0, 3] = np.nan
            return batch

    collator = SignalsCollator(Untold(signals.out), isolate=False)
    assert "teacher_next" not in collator([0, 1])
    collator.need_next = True
    with pytest.raises(IntegrityError, match=r"does not say how likely(.|\n)*set no `token_weights`"):
        collator([0, 1])


def _preflight(folder: Path, signals: Planned | None = None, **keys: Any) -> list[LmdistillError]:
    inputs = {"signals": [signals]} if signals else {}
    ctx = PreflightContext("distill", DistillConfig.model_validate(keys), inputs, None, folder)
    return DistillStage().preflight(ctx)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"token_weights": {"by": "gapp"}}, "did you mean 'gap'"),
        ({"token_weights": {"by": "gap", "share": 0.5}}, "'gap' do not read `share`"),
        ({"loss": "ce", "token_weights": {"by": "gap", "of": "kd"}}, "nothing that `token_weights` could weigh"),
    ],
)
def test_weights_that_cannot_be_are_named_before_work(keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    [problem] = _preflight(tmp_path, **keys)
    assert named in problem.what


def test_weights_without_a_cache_are_refused_before_work(tmp_path: Path) -> None:
    config = CorpusConfig.model_validate({"sources": [{"source": "data.jsonl"}]})
    planned = Planned("text", "corpus", "corpus", "c" * 64, config)
    [problem] = _preflight(tmp_path, planned, loss="full_kl", token_weights={"by": "gap"})
    assert "`token_weights` read a teacher cache" in problem.what


def test_a_key_at_its_default_is_no_mistake() -> None:
    for name in weightings():
        assert find_weighting(TokenWeights.model_validate(TokenWeights(by=name).model_dump()))
    with pytest.raises(RecipeError, match="do not read `nats`"):
        find_weighting(TokenWeights(by="uniform", nats=3))


def test_weights_are_in_the_fingerprint_only_where_there_are_any() -> None:
    assert "token_weights" not in semantic(DistillConfig(), str)
