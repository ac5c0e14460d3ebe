"""`intermediate:` in the distill stage: every loss learns, a stop changes nothing, what cannot be is said before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_toys import LENGTH, SHAPE, save_word_tokenizer

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.intermediate.registry import catalogue
from lmdistill.pipeline.keys import semantic
from lmdistill.pipeline.stage import Artefact, ModelRef, Planned, PreflightContext, Runtime, StageContext
from lmdistill.stages.distill import DistillStage
from lmdistill.stages.student import StudentConfig
from lmdistill.stages.teach import TeachConfig, TeachStage
from lmdistill.training.config import DistillConfig

STAGE = DistillStage()
KEYS = {
    "tokens": LENGTH * 8 * 6,
    "batch_rows": 8,
    "lr": 0.05,
    "precision": "float32",
    "log_steps": 2,
    "checkpoint_steps": 2,
}


@pytest.fixture(scope="module")
def states(teacher: ModelRef, corpus: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """The toy teacher's cache with the hidden states of all its layers."""
    path = tmp_path_factory.mktemp("states")
    (path / "out").mkdir()
    config = TeachConfig(k=8, precision="float32", shard_rows=8, batch_rows=4, hidden_layers=(0, 1, 2))
    place = (path / "out", path / "work")
    TeachStage().run(StageContext("teach", config, {"corpus": [corpus]}, teacher, *place, runtime=Runtime("cpu", 1)))
    return Artefact("teach", "teach", "signals", "e" * 64, path)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """A student of another width, depth and number of heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("narrow")
    shape = SHAPE | {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(path / "out" / "model")
    save_word_tokenizer(path / "out" / "model")
    return Artefact("student", "student", "student", "b" * 64, path)


def _train(
    folder: Path, rows: Artefact, student: Artefact, teacher: ModelRef | None, entry: Any, **keys: Any
) -> dict[str, Any]:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    entries = entry if isinstance(entry, list) else [entry]
    config = DistillConfig.model_validate({**KEYS, "intermediate": entries, **keys})
    inputs = {"signals": [rows], "student": [student]}
    ctx = StageContext("distill", config, inputs, teacher, folder / "out", folder / "work", runtime=Runtime("cpu", 1))
    STAGE.verify(ctx, STAGE.run(ctx))
    record: dict[str, Any] = json.loads((folder / "out/training.json").read_text())
    return record


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", catalogue())
def test_every_intermediate_loss_falls_by_itself(
    name: str, states: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    """With no loss at the head; the curve has it under its name, and no figure of a head that was not computed."""
    log = _train(tmp_path, states, student, teacher, {"loss": name, "layers": "uniform"}, loss="none")["log"]
    assert log[-1][name] < log[0][name]
    assert set(log[0]) == {"step", "tokens", "loss", name, "grad_norm", "learning_rate"}
    assert log[0]["loss"] == pytest.approx(log[0][name], abs=1e-4)


def test_what_is_learned_beside_the_student_trains_and_is_not_in_the_model(
    states: Artefact, narrow: Artefact, tmp_path: Path
) -> None:
    entry = [{"loss": "mi_alpha", "layers": {-1: 2}, "critic_width": 8}, {"loss": "hidden_mse", "layers": {1: 1}}]
    record = _train(tmp_path, states, narrow, None, entry)
    before, after = (load_file(folder / "out/model/model.safetensors") for folder in (narrow.path, tmp_path))
    assert set(after) == set(before)
    assert record["parameters"] == sum(tensor.numel() for tensor in after.values())
    newest = sorted((tmp_path / "work/checkpoints").glob("checkpoint-*"))[-1]
    kept = load_file(newest / "model.safetensors")
    heads = {name for name in kept if "intermediate_heads" in name}
    assert len([name for name in heads if "critic" in name]) == 8 and any(name.endswith("map.weight") for name in heads)
    older = load_file(sorted((tmp_path / "work/checkpoints").glob("checkpoint-*"))[0] / "model.safetensors")
    assert all(not torch.equal(kept[name], older[name]) for name in heads if "scale" not in name)
    assert [one["pairs"] for one in record["intermediate"]] == [[[3, 2]], [[1, 1]]]


@pytest.mark.parametrize(
    ("entry", "keys"),
    [
        ([{"loss": "mi_alpha", "critic_width": 8}, {"loss": "hidden_mse", "projection": True}], {}),
        ([{"loss": "relation_kl"}, {"loss": "block_local", "layers": "uniform", "block_input": "teacher"}], {}),
        ([{"loss": "hidden_mse", "live": True}], {"loss": "none", "precision": "bfloat16"}),
    ],
    ids=["critic", "live", "no-head"],
)
def test_stopped_and_resumed_with_intermediate_losses_is_never_stopped(
    entry: Any, keys: dict[str, Any], states: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    _train(tmp_path / "whole", states, student, teacher, entry, **keys)
    kept = tmp_path / "whole/work/checkpoints"
    newest = max(kept.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(kept, tmp_path / "resumed/work/checkpoints")
    shutil.rmtree(tmp_path / "resumed/work/checkpoints" / newest.name)
    _train(tmp_path / "resumed", states, student, teacher, entry, **keys)
    assert _files(tmp_path / "whole/out") == _files(tmp_path / "resumed/out")


@pytest.mark.parametrize("name", [name for name, one in catalogue().items() if one.reads != "relations"])
def test_a_live_teacher_gives_what_the_cache_holds(
    name: str, states: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    logs = [
        _train(tmp_path / str(live), states, student, teacher, {"loss": name, "live": live}, loss="none")["log"]
        for live in (False, True)
    ]
    for cached, live in zip(*logs, strict=True):
        assert cached[name] == pytest.approx(live[name], rel=1e-2, abs=1e-3)


def test_accumulating_small_batches_changes_nothing_but_rounding(
    states: Artefact, narrow: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    """Every loss is a sum over rows: negative samples and alignments stay within a row."""
    entry = [{"loss": "mi_alpha", "critic_width": 8}, {"loss": "hidden_cka"}, {"loss": "relation_mse", "weight": 0.1}]
    logs = [_train(tmp_path / str(rows), states, narrow, teacher, entry, micro_rows=rows)["log"] for rows in (None, 2)]
    for whole, parts in zip(*logs, strict=True):
        for term in entry:
            assert whole[term["loss"]] == pytest.approx(parts[term["loss"]], rel=2e-3, abs=1e-4)


def test_one_live_teacher_serves_the_head_and_the_layers(
    states: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmdistill.training.live_teacher import LiveEngine

    runs = []
    plain = LiveEngine.run
    monkeypatch.setattr(LiveEngine, "run", lambda self, *args: runs.append(1) or plain(self, *args))
    record = _train(tmp_path, states, student, teacher, {"loss": "relation_kl"}, loss="full_kl")
    assert len(runs) == 1 + record["steps"]  # the first measures scales


def test_the_block_local_gradient_stays_in_its_block(states: Artefact, student: Artefact, tmp_path: Path) -> None:
    for source in ("student", "teacher"):
        entry = {"loss": "block_local", "layers": {1: 1, 2: 2}, "block_input": source}
        only = entry | {"layers": {2: 2} if source == "student" else {1: 1}}
        frozen = "model.layers.0." if source == "student" else "model.layers.1."
        _train(tmp_path / source, states, student, None, only, loss="none", save_grid="float32")
        before, after = (load_file(f / "out/model/model.safetensors") for f in (student.path, tmp_path / source))
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and not [name for name in moved if name.startswith(frozen) or "embed" in name]


def test_scales_of_a_rescaled_student_are_found_and_its_loss_is_the_same(
    states: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    """A stream sixteen times as large, as in grown Lfm2 students, is no error of the hidden states."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(teacher.path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "o_proj" in name or "down_proj" in name:
                parameter.mul_(16)
            if name == "model.norm.weight":
                parameter.div_(16)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= 256
    model.config.rms_norm_eps *= 256
    model.save_pretrained(tmp_path / "scaled/out/model")
    save_word_tokenizer(tmp_path / "scaled/out/model")
    scaled = Artefact("student", "student", "student", "d" * 64, tmp_path / "scaled")
    entry = {"loss": "hidden_mse", "layers": {0: 0, 1: 1, 2: 2}}
    record = _train(tmp_path / "run", states, scaled, None, entry, loss="none", lr=1e-9)
    assert record["intermediate"][0]["scales"] == pytest.approx([1 / 16, 1 / 16, 16], rel=0.02)
    assert record["log"][0]["hidden_mse"] < 1e-4


def _grown(path: Path, student: Artefact, plan: list[str]) -> Artefact:
    shutil.copytree(student.path, path)
    (path / "out/student.json").write_text(json.dumps({"init": "grow", "plan": plan}))
    return Artefact("student", "student", "student", "d" * 64, path)


def test_a_grown_students_own_map_is_used_and_handed_on(states: Artefact, student: Artefact, tmp_path: Path) -> None:
    grown = _grown(tmp_path / "grown", student, ["full", "full"])
    entry = {"loss": "hidden_cosine", "layers": "grown"}
    record = _train(tmp_path / "first", states, grown, None, entry)
    assert record["intermediate"][0]["pairs"] == [[1, 1], [2, 2]]
    trained = Artefact("first", "distill", "model", "9" * 64, tmp_path / "first")
    again = _train(tmp_path / "second", states, trained, None, entry)
    assert again["intermediate"] == record["intermediate"]
    with pytest.raises(PreflightError, match="needs the record of how the student was grown"):
        _train(tmp_path / "third", states, student, None, entry)


def test_without_intermediate_losses_nothing_is_recorded_or_fingerprinted(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    record = _train(tmp_path, signals, student, None, [])
    assert not {"intermediate", "plan"} & set(record)
    assert "intermediate" not in record["settings"] and "intermediate" not in semantic(DistillConfig(), str)


def _objections(
    folder: Path, teacher: ModelRef | None, entry: Any, teach: dict[str, Any] | None = None, **student: Any
) -> list[LmdistillError]:
    shape = {"init": "random", "architecture": "llama", "layers": 3, "attention_layers": 0, **student}
    inputs = {
        "signals": [Planned("teach", "teach", "signals", "e" * 64, TeachConfig.model_validate(teach or {}))],
        "student": [Planned("student", "student", "student", "d" * 64, StudentConfig.model_validate(shape))],
    }
    config = DistillConfig.model_validate({"intermediate": [entry]})
    return STAGE.preflight(PreflightContext("distill", config, inputs, teacher, folder))


ALL = {"hidden_layers": (0, 1, 2)}
NARROW = {"hidden_size": 24, "heads": 3, "kv_heads": 3}


@pytest.mark.parametrize(
    ("entry", "teach", "student", "named", "fix"),
    [
        ({"loss": "hidden_mes"}, ALL, {}, "did you mean 'hidden_mse'", "hidden_mse"),
        ({"loss": "hidden_cka", "alpha": 0.5}, ALL, {}, "does not read `alpha`", "mi_alpha"),
        ({"loss": "hidden_mse"}, {}, {}, "the cache lacks 2", "hidden_layers: [2]"),
        ({"loss": "hidden_mse", "layers": "uniform"}, {"hidden_layers": (-1,)}, {}, "lacks 1", "hidden_layers: [1, 2]"),
        ({"loss": "hidden_mse", "layers": {4: 1}}, ALL, {}, "layer 4 is not one of the student's", "`layers`"),
        ({"loss": "hidden_mse", "layers": {1: 5}}, ALL, {}, "layer 5 is not one of the teacher's", "`layers`"),
        ({"loss": "hidden_mse", "layers": {-1: 1, 3: 2}}, ALL, {}, "names a layer of the student twice", "once"),
        ({"loss": "relation_kl", "layers": {0: 1}}, ALL, {}, "layer 0 is not one of the student's", "`layers`"),
        ({"loss": "relation_kl", "relation_heads": 5}, ALL, {}, "5 relation heads do not divide", "relation_heads"),
        (
            {"loss": "relation_kl"},
            ALL,
            {"hidden_size": 18, "heads": 2, "kv_heads": 1},
            "do not divide",
            "relation_heads",
        ),
        ({"loss": "hidden_mse", "layers": "grown"}, ALL, {}, "needs the record", "uniform"),
        ({"loss": "block_local"}, ALL, NARROW, "blocks of one width", "hidden_mse"),
        (
            {"loss": "block_local", "layers": {3: 2}, "block_input": "teacher"},
            ALL,
            {},
            "which state of the teacher block 3 begins",
            "block_input: student",
        ),
    ],
)
def test_what_cannot_be_is_said_before_work(
    entry: Any, teach: Any, student: Any, named: str, fix: str, teacher: ModelRef, tmp_path: Path
) -> None:
    [problem] = _objections(tmp_path, teacher, entry, teach, **student)
    assert named in problem.what and fix in problem.fix and problem.what.startswith("stage 'distill': ")


@pytest.mark.parametrize(
    "entry",
    [
        {"loss": "hidden_mse", "layers": {0: 0, -1: -1, 2: 1}},
        {"loss": "hidden_mse", "layers": "uniform", "live": True},
        {"loss": "relation_mse", "layers": "last", "relation_heads": 2},
        {"loss": "mi_alpha", "alpha": 0.5, "group": 16},
    ],
)
def test_what_can_be_is_not_objected_to(entry: Any, teacher: ModelRef, tmp_path: Path) -> None:
    assert _objections(tmp_path, teacher, entry, ALL) == []
    assert _objections(tmp_path, None, entry, ALL) == []


def test_a_cache_that_lacks_the_states_is_refused_when_it_runs(
    signals: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    with pytest.raises(PreflightError, match="it holds no hidden states"):
        _train(tmp_path, signals, student, teacher, {"loss": "hidden_mse"})


def test_the_teacher_runs_where_a_loss_needs_it_and_only_there() -> None:
    def config(*entries: dict[str, Any], loss: str = "decoupled_topk") -> DistillConfig:
        return DistillConfig.model_validate({"loss": loss, "intermediate": entries})

    for name, one in catalogue().items():
        assert STAGE.uses_teacher(config({"loss": name})) == (one.reads == "relations")
        assert STAGE.uses_teacher(config({"loss": name, "live": True}))
    live, cached = {"loss": "hidden_cka", "live": True}, {"loss": "hidden_cka"}
    kinds = [
        STAGE.inputs_for(one)[0].kinds
        for one in (config(live, loss="none"), config(live), config(cached, loss="none"), config(live, cached))
    ]
    assert kinds == [("signals", "corpus"), ("signals",), ("signals",), ("signals",)]


def test_no_loss_at_all_is_refused_before_work(tmp_path: Path) -> None:
    [problem] = STAGE.preflight(PreflightContext("distill", DistillConfig(loss="none"), {}, None, tmp_path))
    assert "nothing to learn from" in problem.what and "intermediate" in problem.fix


def test_intermediate_losses_are_listed_with_the_keys_they_read() -> None:
    listed = STAGE.choices()["intermediate[].loss"]
    assert set(listed) == set(catalogue())
    assert "[alpha, critic_width, group, head_lr]" in listed["mi_alpha"]
