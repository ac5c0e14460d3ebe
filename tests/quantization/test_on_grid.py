"""A model on its grids under any trainer: what it computes, that it stays there, and where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.quantization.on_grid import OnGrids, Plan, handle_of, kept_on_its_grids, seen_weight
from lmdistill.quantization.placement import Placement
from lmdistill.quantization.registry import get


def _llama(**keys: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(shape | heads | keys))).eval()


def _everywhere(model: Any, grid: str = "q4_0", **options: Any) -> Placement:
    names = [name for name, weight in model.named_parameters() if weight.ndim == 2]
    return Placement(dict.fromkeys(names, grid), options=dict.fromkeys(names, options), preset=grid)


IDS = torch.arange(24)[None] % 64


def test_a_forward_pass_is_that_of_the_points_and_off_it_is_that_of_the_weights() -> None:
    model = _llama()
    whole = model(IDS).logits
    handle = OnGrids(model, Plan(_everywhere(model)))
    seen = model(IDS).logits
    with handle.off():
        assert torch.equal(model(IDS).logits, whole)
    assert torch.equal(model(IDS).logits, seen) and not torch.equal(seen, whole)
    handle.settle()
    assert torch.equal(model(IDS).logits, seen)
    assert handle_of(model) is None and not any("grid_" in name for name in model.state_dict())


def test_parameters_keep_their_names_their_tie_and_their_gradient() -> None:
    model = _llama()
    names = list(model.state_dict())
    OnGrids(model, Plan(_everywhere(model)))
    assert list(model.state_dict()) == names
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())
    weight = model.lm_head.weight
    assert torch.equal(seen_weight(model.lm_head), get("q4_0").fake_quantise(weight))
    assert torch.equal(seen_weight(nn.Linear(2, 2)).isfinite(), torch.ones(2, 2, dtype=torch.bool))


def test_looked_up_rows_are_those_of_the_whole_matrix_on_its_grid_with_learned_scales_too() -> None:
    for learned in (False, True):
        model = _llama()
        placement = _everywhere(model)
        scales = {
            name: placement.grid(name).start(weight) for name, weight in model.named_parameters() if weight.ndim == 2
        }
        OnGrids(model, Plan(placement.with_scales(scales), learned))
        rows = model.model.embed_tokens(IDS)
        assert torch.equal(rows, seen_weight(model.lm_head)[IDS])
        if learned:
            rows.sum().backward()
            assert model.model.embed_tokens.grid_d.grad[0].abs().sum() > 0


def test_points_of_weights_that_are_not_trained_are_found_once_until_these_change() -> None:
    model = _llama()
    handle = OnGrids(model, Plan(_everywhere(model)))
    head = model.lm_head
    trained = seen_weight(head)
    assert seen_weight(head) is not trained
    head.weight.requires_grad_(False)
    kept = seen_weight(head)
    assert seen_weight(head) is kept and torch.equal(kept, trained)
    with torch.no_grad():
        head.weight.mul_(1.5)
    assert torch.equal(seen_weight(head), get("q4_0").fake_quantise(head.weight))
    handle.settle()
    drawn = _llama()
    OnGrids(drawn, Plan(_everywhere(drawn, "uniform", bits=2, bucket=32, stochastic=True)))
    drawn.lm_head.weight.requires_grad_(False)
    assert not torch.equal(seen_weight(drawn.lm_head), seen_weight(drawn.lm_head))


def test_where_no_gradient_is_wanted_points_are_found_once_with_learned_scales_too() -> None:
    """A sampling model is called once a token; what it keeps is let go where training goes on."""
    model = _llama()
    placement = _everywhere(model)
    scales = {name: placement.grid(name).start(weight) for name, weight in model.named_parameters() if weight.ndim == 2}
    OnGrids(model, Plan(placement.with_scales(scales), learned=True))
    layer = model.model.layers[0].mlp.up_proj
    trained = seen_weight(layer)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            kept = seen_weight(layer)
            assert seen_weight(layer) is kept and torch.equal(kept, trained) and not kept.is_inference()
            layer.grid_d.mul_(1.1) if mode is torch.no_grad else None
            assert torch.equal(seen_weight(layer), kept) == (mode is torch.inference_mode)
        trained = seen_weight(layer)
        assert trained.requires_grad and not layer.seen._kept
    with torch.no_grad():
        seen_weight(layer)
    seen_weight(layer).sum().backward()
    assert layer.grid_d.grad.abs().sum() > 0 and layer.weight.grad is not None


@pytest.mark.parametrize("learned", [False, True])
def test_products_in_bfloat16_are_those_of_the_points_rounded_once(learned: bool) -> None:
    """Points leave the grid in the product's dtype: as if autocast had rounded them, forward and backward."""
    model = _llama()
    placement = _everywhere(model)
    scales = {name: placement.grid(name).start(weight) for name, weight in model.named_parameters() if weight.ndim == 2}
    OnGrids(model, Plan(placement.with_scales(scales), learned))
    layer, hidden = model.model.layers[0].mlp.up_proj, torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(hidden)
    points = seen_weight(layer)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.nn.functional.linear(hidden, points)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    leaves = [layer.weight, *([layer.grid_d] if learned else [])]
    ours, theirs = (torch.autograd.grad(one.float().square().sum(), leaves) for one in (found, expected))
    assert all(one.dtype == torch.float32 and torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_what_several_layers_see_is_summed_once_and_counted_for_each() -> None:
    from lmdistill.quantization.importance import Moments

    moments, hidden = Moments(whole=True), torch.randn(2, 5, 4)
    for _ in range(2):
        for name in ("q", "k"):
            moments.add(name, hidden)
        moments.add("k", hidden.clone())
    flat = hidden.flatten(0, 1)
    for name in ("q", "k"):
        torch.testing.assert_close(moments.second(name), flat.T @ flat / len(flat))
    assert moments.tokens == {"q": 20, "k": 40}


def test_8da4w_rounds_activations_of_linear_layers_too() -> None:
    from lmdistill.quantization.activations import fake_quantise_activations

    model = _llama()
    name = "model.layers.0.mlp.up_proj.weight"
    OnGrids(model, Plan(Placement({name: "8da4w"}, preset="8da4w")))
    layer, hidden = model.model.layers[0].mlp.up_proj, torch.randn(3, 32)
    expected = fake_quantise_activations(hidden) @ get("8da4w").fake_quantise(layer.weight).T
    assert torch.equal(layer(hidden), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_rounded_in_float32(dtype: torch.dtype) -> None:
    from lmdistill.quantization.activations import fake_quantise_activations

    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = fake_quantise_activations(hidden)
    assert found.dtype == dtype and torch.equal(found, fake_quantise_activations(hidden.float()).to(dtype))


def test_the_loss_at_the_head_sees_what_the_heads_own_forward_sees() -> None:
    """With embeddings on 8da4w the tied head rounds what enters it, and the fused loss does, too."""
    from lmdistill.losses import registry
    from lmdistill.losses.fused_head import Mix
    from lmdistill.training.student_forward import attach_loss, detach_loss

    model = _llama()
    OnGrids(model, Plan(_everywhere(model, "8da4w")))
    with torch.no_grad():
        logits = model(IDS).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, IDS[0, 1:]).item()
        mix = Mix(registry.get("decoupled_topk"), registry.LossOptions(), 0.5, 0.5)
        attach_loss(model, lambda: mix, 8)
        labels = torch.cat((IDS[:, 1:], torch.full((1, 1), -100)), 1)
        ids, logp = torch.zeros(1, 24, 1, dtype=torch.long), torch.full((1, 24, 1), -1.0)
        found = model(IDS, labels, torch.arange(23), ids, logp, logp[..., 0])
        detach_loss(model)
        assert found["ce"].item() == pytest.approx(expected, abs=1e-6)
        assert torch.equal(model(IDS).logits[0, :-1], logits), "the head has its own forward again"


def test_learned_points_of_a_tensor_stay_the_tensors() -> None:
    model = _llama()
    placement = _everywhere(model, "points", bits=2, bucket=32)
    scales = {name: grid.start(model.get_parameter(name)) for name, grid in placement.on_grids().items()}
    settled = OnGrids(model, Plan(placement.with_scales(scales), learned=True)).settle()
    assert {scale["p"].shape for scale in settled.scales.values()} == {(4,)}
    for name, grid in settled.on_grids().items():
        assert grid.pack_exactly(model.get_parameter(name), settled.scales[name]).numel()


def test_tensors_in_float16_settle_there() -> None:
    model = _llama(tie_word_embeddings=False)
    handle = OnGrids(model, Plan(Placement({"model.layers.0.mlp.up_proj.weight": "q4_0", "lm_head.weight": "f16"})))
    handle.settle()
    head = model.lm_head.weight
    assert torch.equal(head, head.half().float())
    assert not torch.equal(model.model.embed_tokens.weight, model.model.embed_tokens.weight.half().float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_settles_and_its_size_is_known() -> None:
    from lmdistill.training.on_grids import grid_record

    model = _llama().cuda()
    placement = OnGrids(model, Plan(_everywhere(model))).settle()
    assert grid_record(model, placement)["grid"]["bits"] == 4.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("grid", "keys"),
    [
        ("q4_0", {"start": "compensated", "scales": "learned"}),
        ("q4_1", {"start": "weighted", "scales": "learned"}),
        ("8da4w", {"start": "weighted", "scales": "learned"}),
        ("points", {"scales": "learned", "bucket": 32}),
        ("uniform", {"start": "fitted", "scales": "learned", "bucket": 32, "share_bits": "linear"}),
    ],
)
def test_a_gpu_computes_what_the_cpu_does(grid: str, keys: dict[str, Any], tmp_path: Path) -> None:
    """Start, points, gradients of weights and scales, and what is kept of the start."""
    from lmdistill.quantization.keys import QuantizeKeys
    from lmdistill.quantization.start import put_on_grids
    from lmdistill.quantization.wanted import wanted

    found = {}
    for device in ("cpu", "cuda"):
        model = _llama(max_position_embeddings=64).to(device)
        places = wanted(QuantizeKeys(grid=grid, **keys), model.config.to_dict())
        rows = [IDS.to(device)]
        handle = put_on_grids(model, QuantizeKeys(grid=grid, **keys), places, rows, tmp_path / device)
        loss = model(IDS.to(device), labels=IDS.to(device)).loss
        loss.backward()
        scales = torch.cat([scale.grad.flatten().cpu() for scale in handle.learned_scales()])
        found[device] = (loss.item(), scales, model.model.layers[0].mlp.up_proj.weight.grad.cpu())
        handle.settle()
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-2)
    for ours, theirs in zip(found["cuda"][1:], found["cpu"][1:], strict=True):
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.95


def test_a_plain_trainer_leaves_a_model_on_the_grids_it_lay_on(tmp_path: Path) -> None:
    """What later training needs: two calls around any trainer of transformers or TRL."""
    from transformers import Trainer, TrainingArguments

    model = _llama()
    OnGrids(model, Plan(_everywhere(model))).settle().save(_saved(model, tmp_path / "grid"))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    handle = kept_on_its_grids(model, tmp_path / "grid")
    assert handle is not None
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    keys = {"max_steps": 3, "learning_rate": 0.1, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    Trainer(model, TrainingArguments(str(tmp_path / "work"), **keys), train_dataset=rows).train()
    handle.settle().save(_saved(model, tmp_path / "later"))
    placement = Placement.load(tmp_path / "later")
    assert placement is not None and placement.preset == "q4_0"
    for name, grid in placement.on_grids().items():
        weight = model.state_dict()[name]
        assert torch.equal(grid.fake_quantise(weight, placement.scales[name]), weight)
        assert not torch.equal(weight, before[name])
    assert kept_on_its_grids(_llama(), tmp_path) is None


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_options_of_grids_survive_the_folder(tmp_path: Path) -> None:
    weights = {"w": torch.randn(4, 64)}
    placement = Placement({"w": "uniform"}, options={"w": {"bits": 3, "bucket": 32}}, preset="uniform")
    scales = {"w": placement.grid("w").start(weights["w"])}
    placement.with_scales(scales).save(tmp_path)
    loaded = Placement.load(tmp_path)
    assert loaded is not None and loaded.grid("w") == get("uniform", bits=3, bucket=32)
    assert (loaded.preset, loaded.options) == ("uniform", placement.options)


def test_a_compiled_block_trains_on_its_grid() -> None:
    model, plain = _llama(), _llama()
    for one in (model, plain):
        OnGrids(one, Plan(_everywhere(one)))
    for block in model.model.layers:
        block.compile(dynamic=False, backend="aot_eager")
    losses = [one(IDS, labels=IDS).loss for one in (model, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(*(one.get_parameter(name).grad for one in (model, plain)))


def test_what_has_no_linear_layer_and_widths_without_whole_blocks_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taps = nn.Conv1d(32, 32, 3)
            self.short = nn.Linear(33, 32)

    with pytest.raises(LmdistillError, match=r"taps.weight cannot be trained on grid 'q4_0'"):
        OnGrids(Odd(), Plan(Placement({"taps.weight": "q4_0"})))
    with pytest.raises(PreflightError, match=r"short.weight with rows of 33 weights"):
        OnGrids(Odd(), Plan(Placement({"short.weight": "q4_0"})))
