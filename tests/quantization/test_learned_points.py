"""Points and scales that are learned: their gradients, their start, their bytes, and the bits that codes take."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.errors import PreflightError
from lmdistill.quantization.fitting import compensated, fitted_scales
from lmdistill.quantization.grid import Grid
from lmdistill.quantization.learned_scales import learned_points
from lmdistill.quantization.placement import Placement
from lmdistill.quantization.registry import catalogue, get
from lmdistill.quantization.size import huffman_bits, shared_bits, sizes

NAMES = [name for name in catalogue() if name != "points"]


def _weights(rows: int = 6, width: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(rows, width, generator=generator) * (1 + torch.rand(rows, 1, generator=generator))


def _learnable(name: str, weights: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(learned, fixed) scales of a grid."""
    start = get(name).start(weights)
    learned = {key: scale.float().requires_grad_() for key, scale in start.items() if scale.is_floating_point()}
    return learned, {key: scale for key, scale in start.items() if key not in learned}


@pytest.mark.parametrize("name", NAMES)
def test_learned_scales_give_the_grids_own_points(name: str) -> None:
    weights = _weights()
    learned, fixed = _learnable(name, weights)
    moved = {key: scale.detach() * 0.9 for key, scale in learned.items()}
    expected = get(name).fake_quantise(weights, {**moved, **fixed})
    assert torch.equal(learned_points(get(name), weights, moved, fixed), expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_short_way_to_points_is_that_by_codes_bit_for_bit(name: str) -> None:
    grid, weights = get(name), _weights()
    scales = {key: scale * 0.8 if scale.is_floating_point() else scale for key, scale in grid.start(weights).items()}
    for scale in scales.values():
        scale.view(-1)[:3] = 0  # a scale of zero leaves one point
    found = grid.fake_quantise(weights, scales)
    assert found.numpy().tobytes() == grid.dequantise(grid.quantise(weights, scales)).numpy().tobytes()
    assert torch.equal(grid.fake_quantise(weights, scales, torch.bfloat16), found.bfloat16())


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q8_0", "8da4w"])
def test_gradients_written_out_are_those_of_the_general_formula(name: str) -> None:
    grid, weights = get(name), _weights()
    scales = {"d": grid.by_block(grid.start(weights))["d"].float() * 0.7}
    scales["d"][:3] = 0
    blocks_NB = weights.reshape(-1, grid.block)
    grad_NB = torch.randn(blocks_NB.shape, generator=torch.Generator().manual_seed(2))
    [found_N] = grid.scale_gradients(grad_NB, blocks_NB, scales, ("d",))
    [expected_N] = Grid.scale_gradients(grid, grad_NB, blocks_NB, scales, ("d",))
    torch.testing.assert_close(found_N[3:], expected_N[3:], rtol=1e-3, atol=1e-3)
    assert (found_N[:3] == 0).all()  # nothing lies on a step of zero: it has no direction


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_a_scale_is_that_of_the_straight_through_formula(name: str) -> None:
    """With round(x) = x + constant and the clamp as it is: written out with autograd, for scales that cut some off."""
    grid, weights = get(name), _weights().requires_grad_()
    learned, fixed = _learnable(name, weights)
    learned = {key: (scale * 0.7).detach().requires_grad_() for key, scale in learned.items()}
    upstream = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
    learned_points(grid, weights, learned, fixed).backward(upstream)
    found = {key: scale.grad for key, scale in learned.items()}
    assert torch.equal(weights.grad, upstream)

    stored = {key: scale.detach().float().requires_grad_() for key, scale in grid.stored(learned).items()}
    blocks_NB = weights.detach().reshape(-1, grid.block)
    by_block = grid.by_block({**stored, **fixed})
    low_NB = grid.points(torch.zeros_like(blocks_NB), by_block)
    step_NB = grid.points(torch.ones_like(blocks_NB), by_block) - low_NB
    codes_NB = grid.quantise(weights, learned | fixed).codes.reshape(blocks_NB.shape).float()
    first = (grid.points(codes_NB, by_block) - low_NB).detach() / step_NB.detach()  # codes from the lowest, as floats
    steps_NB = (blocks_NB - low_NB) / step_NB
    inside_NB = (steps_NB - first).abs().detach() < 0.501
    rounded_NB = torch.where(inside_NB, steps_NB + (first - steps_NB).detach(), first)
    (low_NB + rounded_NB * step_NB).backward(upstream.reshape(blocks_NB.shape))
    assert 0.01 < 1 - inside_NB.float().mean() < 0.6  # both kinds of weights are there
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, stored[key].grad, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("of", ["tensor", "bucket"])
def test_the_gradient_of_a_point_sums_those_of_its_weights_times_their_range(of: str) -> None:
    grid, weights = get("points", bits=2, bucket=64, of=of), _weights()
    start = grid.start(weights)
    point = start["p"].clone().requires_grad_()
    fixed = {key: scale for key, scale in start.items() if key != "p"}
    upstream = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
    points = learned_points(grid, weights, {"p": point}, fixed)
    points.backward(upstream)
    assert torch.equal(points, grid.fake_quantise(weights, start))
    codes = grid.quantise(weights, start).codes.view(-1, 64)
    weighted = upstream.view(-1, 64) * start["alpha"].view(-1, 1)
    by_bucket = torch.stack([(weighted * (codes == code)).sum(1) for code in range(4)], 1)
    expected = by_bucket.sum(0) if of == "tensor" else by_bucket.view(start["p"].shape)
    assert point.shape == ((4,) if of == "tensor" else (6, 4, 4))
    torch.testing.assert_close(point.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of", ["tensor", "bucket"])
def test_points_begin_at_percentiles_and_each_stands_for_as_many_weights(of: str) -> None:
    grid = get("points", bits=3, bucket=256, of=of)
    weights = _weights(64)
    codes = grid.quantise(weights).codes
    shares = codes.flatten().to(torch.int64).bincount(minlength=8) / codes.numel()
    assert shares.min() > 0.06 and shares.max() < 0.22


@pytest.mark.parametrize("of", ["tensor", "bucket"])
def test_learned_points_survive_their_bytes(of: str) -> None:
    grid, weights = get("points", bits=2, bucket=64, of=of), _weights()
    quantised = grid.quantise(weights)
    packed = grid.pack(quantised)
    assert packed.shape[-1] == 4 * grid.block_bytes
    points = grid.fake_quantise(weights)
    assert torch.equal(grid.dequantise(grid.unpack(packed)), points)
    assert torch.equal(grid.fake_quantise(points, quantised.scales), points)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0", "q4_k", "8da4w", "uniform"])
def test_fitted_scales_have_no_larger_error_in_any_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are they others where blocks are gone through some at a time."""
    grid, weights = get(name), _weights()
    importance = torch.rand(256, generator=torch.Generator().manual_seed(2)) ** 4
    for weight in (None, importance):
        scales = fitted_scales(grid, weights, weight)
        with monkeypatch.context() as few:
            few.setattr("lmdistill.quantization.grid._CPU_CHUNK", 512)
            apart = fitted_scales(grid, weights, weight)
        assert all(torch.equal(apart[one], scale) for one, scale in scales.items())
        errors = [
            ((grid.fake_quantise(weights, one) - weights) ** 2 * (1 if weight is None else weight))
            .view(-1, grid.block)
            .sum(1)
            for one in (scales, grid.quantise(weights).scales)
        ]
        assert (errors[0] <= errors[1] * (1 + 1e-5)).all() and errors[0].sum() < errors[1].sum()


def test_points_of_compensated_weights_keep_outputs_nearer_and_weights_lie_between_points() -> None:
    grid, weights = get("q4_0"), _weights(32)
    mixing = torch.randn(256, 256, generator=torch.Generator().manual_seed(3)) / 16
    inputs = torch.randn(2000, 256, generator=torch.Generator().manual_seed(4)) @ (mixing + torch.eye(256))
    inputs[:, 7] = 0.0  # one that never is anything
    scales = grid.quantise(weights).scales
    found = compensated(grid, weights, scales, inputs.T @ inputs / len(inputs))
    points = grid.fake_quantise(found, scales)
    off = (found - points).abs() / scales["d"].float().abs().repeat_interleave(32, 1)
    assert 0.2 < off.mean() < 0.3  # of a step: as evenly as any weights lie
    errors = [((inputs @ (one - weights).T) ** 2).mean() for one in (points, grid.fake_quantise(weights))]
    assert errors[0] < 0.7 * errors[1]


def test_inputs_of_a_block_are_compensated_alike_in_whatever_order_they_are_written() -> None:
    """The largest goes first, with nobody's error to make good: last, it would find no column for its own."""
    grid, weights = get("q4_0"), _weights(32)
    generator = torch.Generator().manual_seed(5)
    size = torch.rand(256, generator=generator) ** 3 + 0.01
    mixing = torch.randn(256, 256, generator=generator) / 16 + torch.eye(256)
    inputs = torch.randn(2000, 256, generator=generator) @ mixing * size
    shuffled = torch.cat([32 * block + torch.randperm(32, generator=generator) for block in range(8)])
    scales = grid.quantise(weights).scales
    errors = []
    for order in (
        torch.arange(256),
        shuffled,
        size.view(8, 32).argsort(1).add(32 * torch.arange(8)[:, None]).flatten(),
    ):
        seen, weights_OD = inputs[:, order], weights[:, order]
        found = compensated(grid, weights_OD, scales, seen.T @ seen / len(seen))
        first = seen.pow(2).mean(0).argmax()
        assert torch.equal(found[:, first], weights_OD[:, first])
        errors.append(((seen @ (grid.fake_quantise(found, scales) - weights_OD).T) ** 2).mean().item())
    assert errors[1:] == pytest.approx([errors[0]] * 2, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=6))
def test_huffmans_mean_length_is_the_least_of_all_prefix_codes(counts: list[int]) -> None:
    found, real = huffman_bits(counts), sorted((count for count in counts if count), reverse=True)
    if len(real) < 2:
        assert found == len(real)
        return
    total = sum(real)
    lengths = (
        one
        for one in itertools.combinations_with_replacement(range(1, len(real)), len(real))
        if sum(2.0**-length for length in one) <= 1
    )
    best = min(sum(count * length for count, length in zip(real, one, strict=True)) for one in lengths)
    assert math.isclose(found, best / total)
    entropy = -sum(count / total * math.log2(count / total) for count in real)
    assert entropy - 1e-9 <= found < entropy + 1


def test_huffman_bits_of_a_model_are_those_of_its_codes_and_its_scales() -> None:
    weights = _weights()
    placement = Placement({"w": "uniform", "n": "f32"}, options={"w": {"bits": 2, "bucket": 64}})
    grid = placement.grid("w")
    found = sizes({"w": weights, "n": torch.ones(4)}, placement)
    counts = grid.quantise(weights).codes.flatten().to(torch.int64).bincount().tolist()
    assert found["weights"] == weights.numel() and found["bits"] == 3.0
    assert found["huffman_bits"] == pytest.approx(huffman_bits(counts) + 1.0, abs=1e-4)
    assert found["huffman_bits"] <= found["bits"]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-6, 1.0), st.integers(1, 50)), min_size=2, max_size=12),
    st.sampled_from([2, 3, 4, 5.5]),
    st.sampled_from(["linear", "logarithmic"]),
)
def test_shared_bits_stay_in_the_budget_and_follow_the_gradient(
    tensors: list[tuple[float, int]], mean: float, way: str
) -> None:
    norms = {str(i): norm for i, (norm, _) in enumerate(tensors)}
    weights = {str(i): 32 * count for i, (_, count) in enumerate(tensors)}
    bits = shared_bits(norms, weights, mean, way)  # type: ignore[arg-type]
    spent = sum(bits[name] * weights[name] for name in bits)
    assert spent <= mean * sum(weights.values()) and all(1 <= one <= 8 for one in bits.values())
    for name, other in itertools.permutations(bits, 2):
        if norms[name] > norms[other] and weights[name] == weights[other]:
            assert bits[name] >= bits[other]


def test_a_doubled_gradient_is_worth_one_bit_or_twice_the_bits() -> None:
    weights = dict.fromkeys("abc", 100)
    norms = {"a": 1.0, "b": 2.0, "c": 4.0}
    assert shared_bits(norms, weights, 3, "logarithmic") == {"a": 2, "b": 3, "c": 4}
    assert shared_bits(norms, weights, 7 / 3, "linear") == {"a": 1, "b": 2, "c": 4}
    with pytest.raises(PreflightError, match="cannot be shared out"):
        shared_bits(norms, weights, 0.5, "linear")
    with pytest.raises(PreflightError, match="no tensor on the grid has a gradient"):
        shared_bits(dict.fromkeys(norms, 0.0), weights, 3, "linear")
