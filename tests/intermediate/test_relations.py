"""Relations of queries, keys and values: their definition, gradients made by hand, masks, and heads split anew."""

from __future__ import annotations

import math

import pytest
import torch

from lmdistill.intermediate import relations
from lmdistill.intermediate.keys import IntermediateKeys
from lmdistill.intermediate.registry import Positions, Sides, entry

FORMS = ("relation_mse", "relation_kl")
COUNTS = torch.tensor([[True] * 7 + [False] * 2, [False, True, True, True, False, True, False, True, True]])
DOCUMENTS = torch.tensor([[1] * 4 + [2] * 5, [1] * 9])


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _loss(name: str, student: torch.Tensor, teacher: torch.Tensor, positions: Positions, heads: int) -> torch.Tensor:
    sides = Sides(student.shape[2], teacher.shape[2], heads)
    value: torch.Tensor = entry(name).make(sides, IntermediateKeys(loss=name))(student, teacher, positions)
    return value


def _by_definition(
    name: str, student: torch.Tensor, teacher: torch.Tensor, positions: Positions, heads: int
) -> torch.Tensor:
    """Pair by pair, with autograd's gradient."""
    total = student.new_zeros(())
    for row, query in positions.counts_RT.nonzero().tolist():
        document = None if positions.document_RT is None else positions.document_RT[row]
        keys = [k for k in range(query + 1) if document is None or document[k] == document[query]]
        for head in range(heads):
            scores = []
            for side in (student, teacher):
                width = side.shape[2] // heads
                x_TE = side[row, :, head * width : (head + 1) * width]
                scores.append(torch.stack([x_TE[query] @ x_TE[key] for key in keys]) / math.sqrt(width))
            if name == "relation_mse":
                total = total + (scores[0] - scores[1]).pow(2).mean() / heads
            else:
                log_q, log_p = (one.log_softmax(0) for one in scores)
                total = total + (log_p.exp() * (log_p - log_q)).sum() / heads
    return total


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("chunk", [256, 4])
def test_value_and_gradient_by_hand_are_the_definitions(
    name: str, documents: torch.Tensor | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other widths on both sides, with two heads, whole and by chunks of queries."""
    monkeypatch.setattr(relations, "CHUNK", chunk)
    positions = Positions(COUNTS, documents)
    student, teacher = _random(2, 9, 6).requires_grad_(), _random(2, 9, 8, seed=1)
    expected, found = (one(name, student, teacher, positions, 2) for one in (_by_definition, _loss))
    torch.testing.assert_close(found, expected)
    wanted, given = (torch.autograd.grad(3 * value, student)[0] for value in (expected, found))
    torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_no_query_sees_what_comes_after_it_nor_another_document(name: str) -> None:
    positions = Positions(torch.tensor([[False] * 5 + [True] + [False] * 3]), DOCUMENTS[:1])
    student, teacher = _random(1, 9, 6).requires_grad_(), _random(1, 9, 6, seed=1)
    (grad,) = torch.autograd.grad(_loss(name, student, teacher, positions, 3), student)
    reached = (grad[0] != 0).any(-1).nonzero()[:, 0].tolist()
    assert reached == [4, 5]


@pytest.mark.parametrize("name", FORMS)
def test_the_same_values_lose_nothing_whatever_the_heads(name: str) -> None:
    same = _random(2, 9, 12)
    for heads in (1, 2, 3, 4, 6):
        assert _loss(name, same, same, Positions(COUNTS), heads).item() == pytest.approx(0, abs=1e-12)


def test_heads_of_the_recipe_come_before_the_teachers() -> None:
    keys = IntermediateKeys(loss="relation_kl", relation_heads=3)
    student, teacher = _random(2, 9, 6), _random(2, 9, 12, seed=1)
    chosen = entry("relation_kl").make(Sides(6, 12, 2), keys)(student, teacher, Positions(COUNTS))
    torch.testing.assert_close(chosen, _loss("relation_kl", student, teacher, Positions(COUNTS), 3))
