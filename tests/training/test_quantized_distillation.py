"""Quantized distillation: points in the forward pass, gradients to full precision, a model that lies on its grid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from training_toys import folder_bytes, train_toy

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.pipeline.stage import Artefact
from lmdistill.quantization.placement import Placement
from lmdistill.training.config import DistillConfig

SHORT: dict[str, Any] = {"tokens": 32 * 8 * 6, "lr": 0.05}
NARROW = {"grid": "uniform", "bits": 2, "bucket": 16}
Q8 = {"grid": "q8_0", "keep": ["*down_proj*"]}  # 48 inputs are no whole blocks
OWN: dict[str, Any] = {"quantize": {"self_teacher": "frozen"}}


def _model(artefact: Artefact) -> Path:
    return artefact.out / "model"


def _output(folder: Path, name: str = "model") -> Artefact:
    return Artefact(name, "distill", "model", "f" * 64, folder)


def _off_grid(model: Path) -> list[str]:
    """Tensors of a model folder with weights that do not lie where its record says."""
    placement = Placement.load(model)
    assert placement is not None and placement.on_grids()
    tensors = load_file(model / "model.safetensors")
    points = {
        name: grid.fake_quantise(tensors[name], placement.scales[name]) for name, grid in placement.on_grids().items()
    }
    return [name for name, lain in points.items() if not torch.equal(lain, tensors[name])]


@pytest.mark.parametrize(
    "keys",
    [
        NARROW,
        Q8,
        {"grid": "q4_0", "keep": ["*down_proj*"], "scales": "learned", "scale_lr": 0.02},
        {"grid": "q4_1", "keep": ["*down_proj*"], "scales": "learned", "start": "weighted"},
        {"grid": "8da4w", "group": 16, "scales": "fixed", "start": "compensated"},
        {**NARROW, "scales": "learned", "start": "fitted"},
        {"grid": "points", "bits": 2, "bucket": 16, "scales": "learned", "scale_lr": 0.02},
        {"grid": "points", "bits": 2, "bucket": 16, "points_of": "bucket", "scales": "fixed"},
        {"grid": "uniform", "bits": 3, "bucket": 16, "share_bits": "logarithmic"},
        {**NARROW, "stochastic": True},
    ],
    ids=lambda keys: "-".join(str(value) for value in keys.values()),
)
def test_the_trained_model_lies_on_its_grid_and_learnt_there(
    keys: dict[str, Any], signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    record = train_toy(tmp_path, signals, student, quantize=keys, lr=0.1)
    assert record["log"][-1]["kd"] < 0.97 * record["log"][0]["kd"]
    assert record["grid"]["preset"] == keys["grid"]
    assert 1 < record["grid"]["huffman_bits"] <= record["grid"]["bits"]
    assert _off_grid(tmp_path / "out/model") == []
    before, after = (
        load_file(_model(student) / "model.safetensors"),
        load_file(tmp_path / "out/model/model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "proj" in name)


def test_learned_scales_move_and_stay_what_a_file_can_hold(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    keys = {"grid": "q4_0", "keep": ["*down_proj*"], "scales": "learned", "scale_lr": 0.05}
    train_toy(tmp_path, signals, student, quantize=keys, freeze=("*.weight",), **SHORT)
    placement = Placement.load(tmp_path / "out/model")
    assert placement is not None
    before = load_file(_model(student) / "model.safetensors")
    for name, grid in placement.on_grids().items():
        found = placement.scales[name]["d"]
        assert found.dtype == torch.float16
        if name != "model.embed_tokens.weight":
            assert not torch.equal(found, grid.quantise(before[name]).scales["d"])
    assert _off_grid(tmp_path / "out/model") == []


def test_points_are_learned_alone(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    """Polino's algorithm 2: the weights are fixed, and only the points that they are put on move."""
    keys = {"grid": "points", "bits": 2, "bucket": 16, "scales": "learned", "scale_lr": 0.1}
    record = train_toy(tmp_path, signals, student, quantize=keys, freeze=("*.weight",), lr=0.1)
    assert record["log"][-1]["kd"] < 0.985 * record["log"][0]["kd"]
    before, placement = load_file(_model(student) / "model.safetensors"), Placement.load(tmp_path / "out/model")
    after = load_file(tmp_path / "out/model/model.safetensors")
    assert placement is not None and placement.on_grids()
    for name, grid in placement.on_grids().items():
        assert torch.equal(after[name], grid.fake_quantise(before[name], placement.scales[name]))
        assert not torch.equal(after[name], grid.fake_quantise(before[name], grid.start(before[name])))
    others = (name for name in before if name not in placement.on_grids())
    assert all(torch.equal(after[name].half(), before[name].half()) for name in others)  # `save_grid: float16`


@pytest.mark.parametrize("kind", ["single", "full"])
def test_the_start_is_measured_on_text_alone(kind: str) -> None:
    """Padding is no input: rows that have it are cut, others stay together."""
    from types import SimpleNamespace

    import numpy as np

    from lmdistill.corpus.format import LOSS, PAD
    from lmdistill.training.on_grids import _rows

    tokens = np.arange(24, dtype=np.uint16).reshape(3, 8)
    flags = np.full(tokens.shape, LOSS, np.uint8)
    if kind == "single":
        flags[1, 5:] = PAD
    reader: Any = SimpleNamespace(
        rows=3, row_tokens=8, read=lambda rows: SimpleNamespace(tokens_RT=tokens[rows], flags_RT=flags[rows])
    )
    whole, parts = tokens.tolist(), [[row] for row in tokens.tolist()]
    if kind == "single":
        parts[1] = [whole[1][:5]]
    for asked, rows in ((24, 3), (14, 3 if kind == "single" else 2), (13, 2)):
        found = [one.tolist() for one in _rows(reader, asked, torch.device("cpu"))]
        assert found == ([whole[:rows]] if kind == "full" else parts[:rows])


@pytest.mark.parametrize(
    "keys",
    [NARROW, {**NARROW, "scales": "learned", "start": "fitted"}, {**NARROW, "stochastic": True}],
    ids=["follow", "learned", "stochastic"],
)
def test_stopped_and_resumed_is_never_stopped_on_a_grid(
    keys: dict[str, Any], signals: Artefact, student: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmdistill.training.trainer import DistillationTrainer

    every = {"quantize": keys, "checkpoint_steps": 2, **SHORT}
    train_toy(tmp_path / "whole", signals, student, **every)

    class Killed(Exception):
        pass

    plain = DistillationTrainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise Killed
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "training_step", killed)
    with pytest.raises(Killed):
        train_toy(tmp_path / "parts", signals, student, **every)
    monkeypatch.undo()
    train_toy(tmp_path / "parts", signals, student, **every)
    assert folder_bytes(tmp_path / "parts/out") == folder_bytes(tmp_path / "whole/out")
    shutil.rmtree(tmp_path / "parts/out")  # killed after the last step: what is left is to lie down
    train_toy(tmp_path / "parts", signals, student, **every)
    assert folder_bytes(tmp_path / "parts/out") == folder_bytes(tmp_path / "whole/out")


def test_a_training_that_goes_on_does_not_measure_its_start_again(
    signals: Artefact, student: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmdistill.quantization import start

    keys = {"grid": "uniform", "bits": 3, "bucket": 16, "scales": "learned", "start": "compensated"}
    every = {"quantize": keys | {"share_bits": "linear"}, "checkpoint_steps": 2, **SHORT}
    train_toy(tmp_path / "once", signals, student, **every)
    shutil.copytree(tmp_path / "once/work", tmp_path / "again/work")

    def measured(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(start, "measure", measured)
    monkeypatch.setattr(start, "gradient_norms", measured)
    for last in (4, 6):
        shutil.rmtree(tmp_path / f"again/work/checkpoints/checkpoint-{last}")
    train_toy(tmp_path / "again", signals, student, **every)
    assert folder_bytes(tmp_path / "again/out") == folder_bytes(tmp_path / "once/out")


def test_the_longer_of_two_trainings_goes_on_from_where_the_shorter_goes_down(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    """`warmup_stable_decay`: warm-up and level stretch are the same, whatever the number of steps."""
    keys = {"schedule": "warmup_stable_decay", "decay": 0.5, "checkpoint_steps": 2, "log_steps": 1, "lr": 0.05}
    for steps in (4, 8):
        train_toy(
            tmp_path / str(steps), signals, student, **keys, quantize=NARROW, tokens=steps * 256, warmup=1 / steps
        )
    first, second = (json.loads((tmp_path / f"{steps}/out/training.json").read_text())["log"] for steps in (4, 8))
    assert [line["loss"] for line in first[:2]] == [line["loss"] for line in second[:2]]
    rates = [[line["learning_rate"] for line in log] for log in (first, second)]
    assert rates[0][1] == rates[1][1] == rates[1][3] > rates[1][5] > rates[1][7] > 0
    assert rates[0][3] == pytest.approx(rates[0][1] / 2)


@pytest.mark.parametrize("which", ["frozen", "moving"])
def test_the_student_in_full_precision_teaches_itself(
    which: str, corpus: Artefact, student: Artefact, tmp_path: Path
) -> None:
    keys = {**NARROW, "scales": "learned", "scale_lr": 0.01, "self_teacher": which}
    record = train_toy(tmp_path, corpus, student, loss="full_kl", kd_weight=1.0, quantize=keys, lr=0.005)
    assert 0 < record["log"][-1]["kd"] < 0.8 * record["log"][0]["kd"]


@pytest.mark.parametrize("loss", ["decoupled_topk", "full_kl", "none"])
def test_the_student_in_full_precision_teaches_its_layers_too(
    loss: str, signals: Artefact, corpus: Artefact, student: Artefact, tmp_path: Path
) -> None:
    """Each of its layers what that layer was, beside whatever is learned at the head."""
    keys = {**NARROW, "scales": "learned", "scale_lr": 0.01, "self_teacher": "frozen"}
    layers = {"loss": "hidden_mse", "layers": "uniform", "live": True, "weight": 10.0}
    given = signals if loss == "decoupled_topk" else corpus
    record = train_toy(tmp_path, given, student, loss=loss, quantize=keys, intermediate=[layers], lr=0.005)
    first, last = (record["log"][at]["hidden_mse"] for at in (0, -1))
    assert 0 < last < 0.8 * first
    [compared] = record["intermediate"]
    assert [pair[0] == pair[1] for pair in compared["pairs"]] == [True, True]
    assert compared["scales"] == [1.0, 1.0], "it learns its own length back, too"
    assert _off_grid(tmp_path / "out/model") == []


def test_a_student_on_a_grid_stays_there_when_trained_again(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    train_toy(tmp_path / "qad", signals, student, quantize=Q8, **SHORT)
    train_toy(tmp_path / "later", signals, _output(tmp_path / "qad"), loss="ce", **SHORT)
    before, after = (Placement.load(tmp_path / name / "out/model") for name in ("qad", "later"))
    assert before is not None and after is not None
    assert (after.grids, after.preset) == (before.grids, "q8_0")
    assert _off_grid(tmp_path / "later/out/model") == []
    weights = [load_file(tmp_path / name / "out/model/model.safetensors") for name in ("qad", "later")]
    assert not torch.equal(*(one["model.layers.0.self_attn.q_proj.weight"] for one in weights))


def test_a_converted_checkpoint_is_refused(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    train_toy(tmp_path / "qad", signals, student, quantize=Q8, **SHORT)
    with pytest.raises(PreflightError, match="converted: it lies on 'q8_0', not on 'q4_0'"):
        train_toy(tmp_path / "x", signals, _output(tmp_path / "qad"), quantize={"grid": "q4_0"}, **SHORT)
    config = tmp_path / "qad/out/model/config.json"
    packed = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    config.write_text(json.dumps(packed))
    with pytest.raises(PreflightError, match="weights are packed integers"):
        train_toy(tmp_path / "y", signals, _output(tmp_path / "qad"), quantize=Q8, **SHORT)


def test_training_on_where_a_student_lies_asks_for_the_same_places(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    own = {"grid": "8da4w", "group": 16, "scales": "fixed"}
    train_toy(tmp_path / "qad", signals, student, quantize=own, **SHORT)
    lain = _output(tmp_path / "qad")
    with pytest.raises(PreflightError, match="`scales: follow` would put it on another such grid"):
        train_toy(tmp_path / "a", signals, lain, quantize=own | {"scales": "follow"}, **SHORT)
    with pytest.raises(PreflightError, match=r"lies on 8da4w {'group': 16}\n.*asks for 8da4w {'group': 8}"):
        train_toy(tmp_path / "b", signals, lain, quantize=own | {"group": 8}, **SHORT)
    with pytest.raises(PreflightError, match=r"embed_tokens.weight lies on f32\n.*asks for 8da4w"):
        train_toy(tmp_path / "c", signals, lain, quantize=own | {"embeddings": "8da4w"}, **SHORT)
    train_toy(tmp_path / "d", signals, lain, quantize=own, **SHORT)
    assert _off_grid(tmp_path / "d/out/model") == []


def test_scales_that_the_quantiser_would_not_find_again_are_not_let_go(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    """Learned ones, and those that follow where the weights were trained on under fixed ones."""
    learned = Q8 | {"scales": "learned", "scale_lr": 0.05}
    train_toy(tmp_path / "qad", signals, student, quantize=learned, **SHORT)
    lain = _output(tmp_path / "qad")
    with pytest.raises(PreflightError, match=r"scales: follow` would put it on another such grid(.|\n)*first: model"):
        train_toy(tmp_path / "a", signals, lain, quantize=Q8, **SHORT)
    train_toy(tmp_path / "b", signals, lain, quantize=learned, **SHORT)
    assert _off_grid(tmp_path / "b/out/model") == []
    train_toy(tmp_path / "followed", signals, student, quantize=Q8, **SHORT)
    train_toy(tmp_path / "c", signals, _output(tmp_path / "followed"), quantize=Q8, **SHORT)
    assert _off_grid(tmp_path / "c/out/model") == []


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_range_that_comes_back_but_for_its_last_digit_is_the_same(
    bits: int, signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    """The largest point of a bucket is rounded, so the range found of points is not always the one they have."""
    keys = NARROW | {"bits": bits}
    train_toy(tmp_path / "qad", signals, student, quantize=keys, **SHORT)
    lain = Placement.load(tmp_path / "qad/out/model")
    tensors = load_file(tmp_path / "qad/out/model/model.safetensors")
    assert lain is not None
    again = {name: grid.fake_quantise(tensors[name]) for name, grid in lain.on_grids().items()}
    assert any(not torch.equal(points, tensors[name]) for name, points in again.items())
    train_toy(tmp_path / "on", signals, _output(tmp_path / "qad"), quantize=keys, **SHORT)
    assert _off_grid(tmp_path / "on/out/model") == []


def test_a_student_on_a_grid_has_nothing_to_teach_itself(
    signals: Artefact, corpus: Artefact, student: Artefact, tmp_path: Path
) -> None:
    train_toy(tmp_path / "qad", signals, student, quantize=Q8, **SHORT)
    own = Q8 | {"self_teacher": "frozen"}
    with pytest.raises(PreflightError, match=r"`quantize.self_teacher: frozen` has nothing to teach it"):
        train_toy(tmp_path / "a", corpus, _output(tmp_path / "qad"), loss="full_kl", quantize=own)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"grid": "q4_0"}, "rows of 48 weights cannot be put on grid 'q4_0'"),
        ({"grid": "8da4w"}, "rows of 48 weights cannot be put on grid '8da4w'"),
        ({"grid": "q4_9"}, "no grid is called 'q4_9'"),
        ({"grid": "q4_k"}, "no grid is called 'q4_k'; did you mean 'q4_k_m'"),
        ({**Q8, "head": "q4_0"}, "tied head with unequal grids"),
        ({**Q8, "head": "q4_0", "embeddings": "q8_0"}, "tied head with unequal grids"),
        ({**Q8, "embeddings": "8da4w"}, "`quantize.embeddings: 8da4w` lies in no file together with grid 'q8_0'"),
        ({**Q8, "embeddings": "uniform"}, "`quantize.embeddings: uniform` lies in no file together"),
        ({"grid": "8da4w", "group": 16, "head": "q8_0", "embeddings": "q8_0"}, "embeddings: q8_0` lies in no file"),
        ({**Q8, "keep": ["*up_porj*"]}, "`quantize.keep: .*up_porj.*` matches no tensor"),
    ],
)
def test_what_no_grid_holds_is_refused_before_training(
    keys: dict[str, Any], message: str, signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    with pytest.raises(LmdistillError, match=message):
        train_toy(tmp_path, signals, student, quantize=keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quantize": {"grid": "q4_0", "bits": 3}}, "grid 'q4_0' has no such option"),
        ({"quantize": {"start": "weighted"}}, "`scales: follow` forgets them"),
        (
            {"quantize": {"start": "compensated", "scales": "fixed", "self_teacher": "moving"}, "loss": "full_kl"},
            "would teach what `start: compensated` has moved",
        ),
        ({"quantize": {}, "lora": {}}, "drop one"),
        ({"quantize": {"self_teacher": "frozen"}}, "needs a loss that runs a teacher"),
        (OWN | {"intermediate": [{"loss": "hidden_mse", "layers": "uniform"}]}, "`live: true`"),
        (OWN | {"intermediate": [{"loss": "hidden_mse", "layers": "grown", "live": True}]}, "`layers: uniform`"),
        (
            {"quantize": {"self_teacher": "moving"}, "intermediate": [{"loss": "hidden_mse", "live": True}]},
            "moving has no layers of its own",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused_by_the_recipe(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DistillConfig.model_validate(keys)


def test_the_recipes_teacher_does_not_run_where_the_student_teaches_itself() -> None:
    beside = {"intermediate": [{"loss": "hidden_mse", "layers": "uniform", "live": True}]}
    for own in ({"loss": "full_kl"}, {"loss": "full_kl", **beside}, {"loss": "none", **beside}):
        config = DistillConfig.model_validate(OWN | own)
        assert not config.runs_teacher and not config.needs_cache
    assert DistillConfig.model_validate(OWN | beside).needs_cache
    assert DistillConfig(loss="full_kl").runs_teacher
