"""The evaluate stage on small real artefacts: who stands on the ladder, what is measured, and resuming after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_world import LENGTH, ROWS, World, build_world, save_corpus

from lmdistill.corpus.format import LOSS, CorpusReader
from lmdistill.errors import StageError
from lmdistill.evaluation import heldout as heldout_module
from lmdistill.evaluation.heldout import chosen_rows, read_heldout
from lmdistill.evaluation.ladder import assemble
from lmdistill.evaluation.run import timed_targets
from lmdistill.evaluation.runtimes import RuntimeOptions, runtime_class
from lmdistill.evaluation.scorer import score, summarise
from lmdistill.pipeline.stage import Artefact
from lmdistill.stages.evaluate import EvaluateStage

Measured = tuple[dict[str, Any], dict[str, Any]]  # the stage's metrics, evaluation.json


def evaluate(world: World, config: Any, folder: str) -> Measured:
    """Run the stage; its metrics and evaluation.json."""
    ctx = world.context(config, folder)
    metrics = EvaluateStage().run(ctx)
    return metrics, json.loads((ctx.out / "evaluation.json").read_text())


@pytest.fixture(scope="session")
def measured(world: World) -> Measured:
    """The stage run once with everything on."""
    from lmdistill.stages.evaluate import EvaluateConfig

    gates = [{"of": "export/f32", "metric": "kl_to_parent", "at_most": 1e-6}]
    speed = {"prefill": 8, "decode": 4, "repeats": 2}
    return evaluate(world, EvaluateConfig(suite="quick", speed=speed, gates=gates), "measured")


def test_rows_roles_and_parents(measured: Measured) -> None:
    rows = measured[1]["quality"]["ladder"]
    assert [(row["name"], row["role"], row["parent"]) for row in rows] == [
        ("teacher", "teacher", None),
        ("teacher_files/f16", "file", "teacher"),
        ("student", "student", "teacher"),
        ("distill", "student", "teacher"),
        ("export/f32", "file", "distill"),
        ("export/f16", "file", "distill"),
        ("ce", "baseline", "teacher"),
    ]
    assert {row["runtime"] for row in rows if row["role"] == "file"} == {"llama.cpp"}
    assert {(row["runtime"], row["format"]) for row in rows if row["role"] != "file"} == {("transformers", "float32")}
    assert len({row["params"] for row in rows}) == 1


def test_params_count_every_weight_once(world: World) -> None:
    from lmdistill.checkpoints import load_model

    subjects = assemble(world.teacher, [], [])
    assert subjects[0].params == sum(weight.numel() for weight in load_model(world.teacher.path).parameters())


def test_figures_equal_a_plain_float64_computation(world: World, measured: Measured) -> None:
    """NLL, bits a byte, KL and agreement of a checkpoint, from whole logits in float64 over the LOSS positions."""
    import torch

    from lmdistill.checkpoints import load_model

    split = CorpusReader(world.corpus.out).split("valid")
    tokens_RT = torch.from_numpy(split.tokens_RT.astype(np.int64))
    counts_RT = torch.from_numpy((split.flags_RT & LOSS) != 0)
    logs = {}
    for name, folder in {"teacher": world.teacher.path, "distill": world.models[1].model().path}.items():
        with torch.inference_mode():
            logs[name] = load_model(folder)(input_ids=tokens_RT).logits.double().log_softmax(-1)[counts_RT]
    targets_N = tokens_RT.roll(-1, 1)[counts_RT]
    nll_N = -logs["distill"].gather(-1, targets_N[:, None])[:, 0]
    kl_N = (logs["teacher"].exp() * (logs["teacher"] - logs["distill"])).sum(-1)
    row = next(row for row in measured[1]["quality"]["ladder"] if row["name"] == "distill")
    assert row["nll"] == pytest.approx(float(nll_N.mean()), abs=2e-6)
    assert row["bits_per_byte"] == pytest.approx(float(nll_N.sum()) / np.log(2) / split.bytes_R.sum(), abs=2e-6)
    assert row["kl_to_teacher"] == row["kl_to_parent"] == pytest.approx(float(kl_N.mean()), rel=1e-5)
    agreement = (logs["teacher"].argmax(-1) == logs["distill"].argmax(-1)).double().mean()
    assert row["top1_to_parent"] == pytest.approx(float(agreement))
    assert measured[1]["quality"]["predictions"] == len(targets_N)


def test_the_f32_file_is_its_parent(measured: Measured) -> None:
    """llama.cpp and transformers agree through the one scorer; a file of another model would not."""
    rows = {row["name"]: row for row in measured[1]["quality"]["ladder"]}
    assert 0 <= rows["export/f32"]["kl_to_parent"] < 1e-6
    assert rows["export/f32"]["kl_to_parent"] <= rows["export/f16"]["kl_to_parent"] < 1e-3
    assert rows["export/f32"]["top1_to_parent"] == 1.0
    assert rows["export/f32"]["kl_to_teacher"] > 0.1  # the toy student is another random model
    assert rows["export/f32"]["nll"] == pytest.approx(rows["distill"]["nll"], abs=1e-5)
    assert measured[1]["gates"] == [
        {
            "gate": "export/f32 kl_to_parent ≤ 1e-06",
            "measured": rows["export/f32"]["kl_to_parent"],
            "limit": 1e-6,
            "passed": True,
            "quartiles": None,
        }
    ]


def test_files_of_one_format_are_timed_one_after_the_other(world: World) -> None:
    subjects = assemble(world.teacher, world.models, world.deployments)
    formats = [target.path.stem.rsplit("-", 1)[-1] for target in timed_targets(subjects, checkpoints=False)]
    assert formats == ["f16", "f16", "f32"]


def test_speeds_of_files_only(measured: Measured) -> None:
    timed = measured[1]["speed"]["rows"]
    assert set(timed) == {"teacher_files/f16", "export/f16", "export/f32"}
    for row in timed.values():
        for phase in ("prefill_tps", "decode_tps"):
            spread = row[phase]
            assert 0 < spread["min"] <= spread["q1"] <= spread["median"] <= spread["q3"] <= spread["max"]
        assert 10e6 < row["peak_rss_bytes"] < 4e9


def test_quality_is_the_same_on_every_run(world: World, measured: Measured, config: Callable[..., Any]) -> None:
    """Metrics and the `quality` part do not depend on the run; without `speed` and `kl` those figures are null."""
    metrics, record = evaluate(world, config(metrics=["kl"]), "again")
    assert metrics == measured[0]
    assert record["quality"] == measured[1]["quality"] and record["curves"] == measured[1]["curves"]
    assert record["speed"]["rows"] == {}
    _, plain = evaluate(world, config(metrics=[]), "plain")
    assert {row["kl_to_teacher"] for row in plain["quality"]["ladder"]} == {None}
    assert [row["nll"] for row in plain["quality"]["ladder"]] == [row["nll"] for row in record["quality"]["ladder"]]
    assert not list((world.root / "plain" / "work").rglob("*.ref"))


def test_the_cache_and_the_scorer_tell_the_same_loss(world: World, config: Callable[..., Any]) -> None:
    """The teacher's NLL in the cache of a split equals the ladder's on the same split: same positions, same shift."""
    from lmdistill.stages.teach import TeachConfig, TeachStage

    teach = world.context(TeachConfig(k=8, splits=("valid",)), "06-teach-123")
    metrics = TeachStage().run(teach) | {"parity": {"nll_cost": 0.25}}
    (teach.out.parent / "manifest.json").write_text(json.dumps({"metrics": metrics}))
    ctx = world.context(config(metrics=[]), "with-cache")
    cache = Artefact("teach", "teach", "signals", "digest-of-teach", teach.out.parent)
    ctx.inputs = {**ctx.inputs, "signals": [cache]}
    EvaluateStage().run(ctx)
    record = json.loads((ctx.out / "evaluation.json").read_text())
    assert record["signals"]["teacher_nll"] == pytest.approx(record["quality"]["ladder"][0]["nll"], abs=1e-4)
    assert record["signals"]["k"] == 8 and record["signals"]["folder"] == "06-teach-123"
    assert 0 < record["signals"]["head_mass"] < 1 and record["signals"]["proof"] == {"nll_cost": 0.25}


def test_checkpoints_are_timed_where_asked(world: World, config: Callable[..., Any]) -> None:
    alone = World(world.root, world.teacher, world.corpus, [], [])
    _, record = evaluate(alone, config(checkpoint_speed=True, metrics=["speed"]), "checkpoints")
    assert record["speed"]["rows"]["teacher"]["decode_tps"]["median"] > 0


def test_a_broken_gate_is_in_the_record_and_lets_the_report_out(world: World, config: Callable[..., Any]) -> None:
    gates = [{"of": "teacher", "metric": "nll", "at_most": 0.001}]
    ctx = world.context(config(metrics=[], gates=gates), "gates")
    EvaluateStage().verify(ctx, EvaluateStage().run(ctx))
    [result] = json.loads((ctx.out / "evaluation.json").read_text())["gates"]
    assert result["passed"] is False and result["limit"] == 0.001


def test_a_file_of_an_unknown_model_is_refused(world: World) -> None:
    with pytest.raises(StageError, match="come from 'distill', which is not evaluated"):
        assemble(world.teacher, [world.models[0]], world.deployments)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from toy_world import build_world
from lmdistill.stages.evaluate import EvaluateConfig, EvaluateStage
world = build_world(Path(sys.argv[2]))
print("built", flush=True)
EvaluateStage().run(world.context(EvaluateConfig(suite="quick", metrics=["kl"])))
"""


@pytest.mark.parametrize("scored", [1, 4])
def test_killed_and_run_again(tmp_path: Path, measured: Measured, scored: int) -> None:
    """kill -9 after the first or fourth score: the next run takes over what is there and ends with the same figures."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None and process.stdout.readline() == b"built\n"
    scores = tmp_path / "evaluate" / "work" / "scores"
    deadline = time.monotonic() + 60
    while len(list(scores.glob("*.score.json"))) < scored and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in scores.glob("*.score.json")}
    assert len(kept) >= scored

    from lmdistill.stages.evaluate import EvaluateConfig

    metrics, record = evaluate(build_world(tmp_path), EvaluateConfig(suite="quick", metrics=["kl"]), "evaluate")
    assert metrics == measured[0]
    assert record["quality"] == measured[1]["quality"]
    untouched = [path for path, at in kept.items() if path.stat().st_mtime_ns == at]
    assert len(untouched) >= len(kept) - 1  # at most the one parent whose reference went with the killed run


def test_chosen_rows_are_spread_and_bounded() -> None:
    for rows in (1, 3, 10, 1000):
        for tokens in (1, 100, 2560, 10**9):
            chosen = chosen_rows(rows, 256, tokens)
            assert len(chosen) == max(1, min(rows, tokens // 256)) == len(set(chosen))
            assert chosen[0] == 0 and chosen[-1] < rows and (len(chosen) == 1 or chosen[-1] == rows - 1)


def test_sequences_are_what_counts(tmp_path: Path) -> None:
    """Concatenated rows are whole sequences without their padding; isolated documents are sequences of their own."""
    whole = read_heldout(save_corpus(tmp_path / "concat"), "valid", 10_000)
    apart = read_heldout(save_corpus(tmp_path / "isolate", "isolate"), "valid", 10_000)
    assert [len(one.tokens_T) for one in whole.sequences] == [LENGTH] * (ROWS - 1) + [19]
    assert [len(one.tokens_T) for one in apart.sequences] == [LENGTH, 10, LENGTH - 10, LENGTH, 19]
    assert whole.predictions == apart.predictions == int(whole.bytes_R.sum())
    targets = [np.concatenate([one.targets_N for one in held.sequences]) for held in (whole, apart)]
    np.testing.assert_array_equal(*targets)


def test_isolation_changes_the_context(world: World, tmp_path: Path) -> None:
    """A document scored alone does not see the one before it."""
    model = runtime_class("transformers").open(world.teacher.path, RuntimeOptions(LENGTH, 1), exact=True)
    figures = []
    for packing in ("concat", "isolate"):
        held = read_heldout(save_corpus(tmp_path / packing, packing), "valid", 10_000)
        figures.append(summarise(score(model, held))["nll"])
    assert abs(figures[0] - figures[1]) > 1e-4


def test_an_empty_split_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_corpus(tmp_path)
    monkeypatch.setattr(heldout_module, "LOSS", 64)  # a flag that no position carries
    with pytest.raises(StageError, match="no prediction to score"):
        read_heldout(folder, "valid", 100)
