"""What every grid promises: fake quantisation is the file's content, nothing is lost by packing, errors are bounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from quantization.conftest import ALL_GRIDS, GGML_GRIDS, bits, drawn_weights, grid_of, weights

from lmdistill.errors import IntegrityError, PreflightError, RecipeError
from lmdistill.quantization.grid import Grid
from lmdistill.quantization.registry import catalogue, get

# The searches of the K-quants and 8da4w's cut at 7 of 7.5 steps find other scales in their own points.
IDEMPOTENT = ("q4_0", "q4_1", "q5_0", "q8_0", "uniform 4 bits", "uniform 3 bits", "uniform 1 bit")
every_grid = pytest.mark.parametrize("label", ALL_GRIDS)
few = settings(max_examples=10, deadline=None)


def test_labels_cover_the_catalogue() -> None:
    assert {label.split()[0] for label in ALL_GRIDS} == set(catalogue())


@every_grid
@few
@given(values=drawn_weights())
def test_fake_quantised_weights_are_the_dequantised_bytes(label: str, values: torch.Tensor) -> None:
    grid = grid_of(label)
    packed = grid.pack(grid.quantise(values))
    assert bits(grid.fake_quantise(values)) == bits(grid.dequantise(grid.unpack(packed)))
    assert packed.shape == (24, 768 // grid.block * grid.block_bytes)
    assert grid.bits_per_weight == 8 * packed.numel() / values.numel()


@every_grid
@few
@given(values=drawn_weights())
def test_unpack_reverses_pack(label: str, values: torch.Tensor) -> None:
    grid = grid_of(label)
    quantised = grid.quantise(values)
    again = grid.unpack(grid.pack(quantised))
    assert torch.equal(again.codes, quantised.codes) and again.codes.dtype == quantised.codes.dtype
    assert again.scales.keys() == quantised.scales.keys() == grid.scale_dtypes().keys()
    for name, scale in quantised.scales.items():
        assert again.scales[name].dtype == scale.dtype == grid.scale_dtypes()[name]
        assert torch.equal(again.scales[name], scale)


@every_grid
@few
@given(values=drawn_weights())
def test_weights_on_a_grid_are_packed_without_loss_given_its_scales(label: str, values: torch.Tensor) -> None:
    """Codes come back but where two of them stand for one weight, and the packed weights are the same everywhere."""
    grid = grid_of(label)
    quantised = grid.quantise(values)
    points = grid.dequantise(quantised)
    packed = grid.pack_exactly(points, quantised.scales)
    assert torch.equal(grid.dequantise(grid.unpack(packed)), points)
    again = grid.quantise(points, quantised.scales)
    other = again.codes != quantised.codes
    assert torch.equal(points[other], grid.dequantise(again)[other])


@every_grid
def test_codes_come_back_exactly_given_the_scales(label: str) -> None:
    grid, values = grid_of(label), weights("normal", 1)
    quantised = grid.quantise(values)
    again = grid.quantise(grid.dequantise(quantised), quantised.scales)
    assert torch.equal(again.codes, quantised.codes)


@pytest.mark.parametrize("label", IDEMPOTENT)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "above zero", "few values"])
def test_quantising_points_again_gives_the_same_codes(label: str, kind: str) -> None:
    grid = grid_of(label)
    once = grid.quantise(weights(kind, 2))
    twice = grid.quantise(grid.dequantise(once))
    assert torch.equal(twice.codes, once.codes)
    if label in GGML_GRIDS:
        assert all(torch.equal(twice.scales[name], scale) for name, scale in once.scales.items())


@pytest.mark.parametrize("label", sorted(set(ALL_GRIDS) - set(IDEMPOTENT)))
def test_where_that_does_not_hold_the_scales_are_needed(label: str) -> None:
    grid = grid_of(label)
    points = grid.fake_quantise(weights("heavy tails", 2))
    assert not torch.equal(grid.fake_quantise(points), points)
    with pytest.raises(IntegrityError, match="do not lie on grid"):
        grid.pack_exactly(points)


@every_grid
def test_training_on_knows_of_scales_that_points_do_not_bring_back(label: str) -> None:
    grid = grid_of(label)
    assert grid.searches or grid.finds_again == (label in IDEMPOTENT)


def test_a_step_that_was_learned_beyond_zero_is_one_that_xnnpack_takes() -> None:
    grid, values = get("8da4w"), weights("normal", 3, (1, 64))
    found = grid.quantise(values, {"d": torch.tensor([[-0.1, 0.1]])})
    assert (found.scales["d"] > 0).all() and found.scales["d"][0, 1] == torch.tensor(0.1).bfloat16()
    assert torch.isfinite(grid.dequantise(found)).all()


def _bound(grid: Grid, values: torch.Tensor) -> torch.Tensor:
    """The largest error that a grid's docstring allows, `[R, W / B, 1]`."""
    scales = {name: scale.float().unsqueeze(-1) for name, scale in grid.quantise(values).scales.items()}
    blocks = values.unflatten(-1, (-1, grid.block))
    half_ulp = 2.0**-11 * blocks.abs().amax(-1, keepdim=True) + 2.0**-25  # of float16
    if grid.name in ("q4_0", "q5_0"):
        return scales["d"].abs() + half_ulp
    if grid.name == "q8_0":
        return scales["d"] / 2 + half_ulp
    if grid.name == "q4_1":
        return scales["d"] / 2 + 3 * half_ulp
    if grid.name == "8da4w":
        return scales["d"] * (0.53 if grid.scale_dtypes()["d"] == torch.bfloat16 else 0.5 + 1e-6)
    return scales["alpha"] / (2**grid.bits - 1) * (0.5 + 1e-5) + 1e-6 * scales["beta"].abs()  # type: ignore[attr-defined]


@pytest.mark.parametrize("label", [label for label in ALL_GRIDS if not label.endswith("_k") and "points" not in label])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "above zero", "below zero"])
def test_the_error_is_within_the_grids_bound(label: str, kind: str) -> None:
    grid, values = grid_of(label), weights(kind, 4)
    error = (grid.fake_quantise(values) - values).abs().unflatten(-1, (-1, grid.block))
    assert (error <= _bound(grid, values)).all()


@pytest.mark.parametrize(("name", "error"), [("q4_k", 0.075), ("q6_k", 0.02), ("q4_0", 0.095), ("q8_0", 0.0065)])
def test_the_mean_error_of_normal_weights_is_as_small_as_the_bits_allow(name: str, error: float) -> None:
    values = weights("normal", 6, (64, 1024))
    relative = (get(name).fake_quantise(values) - values).norm() / values.norm()
    assert 0.7 * error < relative < error


@every_grid
def test_the_gradient_passes_straight_through(label: str) -> None:
    values = weights("normal", 7).requires_grad_()
    factor = torch.randn_like(values)
    (grid_of(label).fake_quantise(values) * factor).sum().backward()
    assert values.grad is not None and torch.equal(values.grad, factor)


def test_points_are_differentiable_in_scales() -> None:
    grid = get("q4_0")
    quantised = grid.quantise(weights("normal", 8))
    learned = quantised.scales["d"].float().requires_grad_()
    grid.dequantise(type(quantised)(quantised.codes, {"d": learned})).sum().backward()
    expected = (quantised.codes.float() - 8).unflatten(-1, (-1, 32)).sum(-1)
    assert learned.grad is not None and torch.allclose(learned.grad, expected)


@every_grid
def test_scales_of_ones_own_are_kept_and_give_the_nearest_points(label: str) -> None:
    """Float16 and its like are rounded as the file does; no code is nearer than the one chosen."""
    grid, values = grid_of(label), weights("normal", 9)
    found = grid.quantise(values).scales
    own = {name: scale.float() * 0.9 if scale.is_floating_point() else scale for name, scale in found.items()}
    quantised = grid.quantise(values, own)
    for name, scale in own.items():
        assert torch.equal(quantised.scales[name], scale.to(found[name].dtype))
    error = (grid.dequantise(quantised) - values).abs()
    for step in (-1, 1):
        codes = quantised.codes.to(torch.int16) + step
        low, high = quantised.codes.min(), quantised.codes.max()  # normal weights use both ends of every grid
        other = grid.dequantise(type(quantised)(codes.clamp(low, high), quantised.scales))
        assert (error <= (other - values).abs() * (1 + 1e-5) + 1e-9).all()
    assert bits(grid.fake_quantise(values, own)) == bits(grid.dequantise(quantised))


@every_grid
def test_any_leading_shape_is_kept(label: str) -> None:
    grid, values = grid_of(label), weights("normal", 10)
    folded = values.view(4, 6, 768)
    assert torch.equal(grid.fake_quantise(folded), grid.fake_quantise(values).view(4, 6, 768))
    assert torch.equal(grid.pack(grid.quantise(folded)).flatten(0, 1), grid.pack(grid.quantise(values)))
    across = grid.quantise(values.T.contiguous().T)
    assert torch.equal(across.codes, grid.quantise(values).codes)


def test_bfloat16_weights_are_quantised_from_their_float32_values() -> None:
    values = weights("normal", 11).bfloat16()
    assert torch.equal(get("q4_0").quantise(values).codes, get("q4_0").quantise(values.float()).codes)
    assert get("q4_0").fake_quantise(values).dtype == torch.bfloat16


@every_grid
def test_a_width_that_does_not_fit_is_refused(label: str) -> None:
    grid = grid_of(label)
    with pytest.raises(PreflightError, match=f"blocks have {grid.block} weights"):
        grid.quantise(torch.zeros(2, grid.block + 1))
    with pytest.raises(PreflightError, match="q_proj"):
        grid.check_width(grid.block - 1, "q_proj")


def test_weights_off_their_grid_are_told(label: str = "q8_0") -> None:
    grid, values = get(label), weights("normal", 12)
    points = grid.fake_quantise(values)
    points[3, 5] *= 1.001
    with pytest.raises(IntegrityError, match=r"1 of the 18432 weights of model\.x"):
        grid.pack_exactly(points, grid.quantise(values).scales, "model.x")


def test_unknown_names_and_options_are_told_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'q4_0'"):
        get("q40")
    with pytest.raises(RecipeError, match="did you mean 'bits'"):
        get("uniform", bit=2)
    with pytest.raises(RecipeError, match="it has none"):
        get("q4_0", bits=2)
    with pytest.raises(RecipeError, match="1 to 8 bits"):
        get("uniform", bits=9)
    with pytest.raises(RecipeError, match="even number"):
        get("8da4w", group=33)


def test_stochastic_rounding_is_unbiased_and_between_neighbours() -> None:
    grid, values = get("uniform", bits=2, bucket=32, stochastic=True), weights("normal", 13, (1, 32))
    torch.manual_seed(0)
    points = grid.fake_quantise(values.expand(20_000, 32))
    step = (values.max() - values.min()) / 3
    assert ((points - values).abs() <= step * (1 + 1e-5)).all()
    assert torch.allclose(points.mean(0), values[0], atol=float(step) * 0.02)
    assert len(points.unique(dim=0)) > 100


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_stochastic_points_are_packed_as_they_are(bits: int) -> None:
    grid = get("uniform", bits=bits, bucket=32, stochastic=True)
    for kind in ("normal", "heavy tails", "wide", "few values"):
        once = grid.quantise(weights(kind, 5))
        again = grid.quantise(grid.dequantise(once), once.scales)
        assert torch.equal(again.codes, once.codes)
        grid.pack_exactly(grid.dequantise(once), once.scales)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_grid
def test_a_gpu_gives_the_same_bytes(label: str) -> None:
    grid = grid_of(label)
    for kind in ("normal", "heavy tails", "many zeros", "ties"):
        values = weights(kind, 14)
        assert torch.equal(grid.pack(grid.quantise(values.cuda())).cpu(), grid.pack(grid.quantise(values)))
        assert bits(grid.fake_quantise(values.cuda()).cpu()) == bits(grid.fake_quantise(values))
