"""The search stage on toys: what comes out is a student, the same every time, stopped or not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from supernet_toys import BLOCKS, KEYS, LENGTH, folder_bytes

from lmdistill.corpus.config import CorpusConfig
from lmdistill.errors import LmdistillError
from lmdistill.pipeline.stage import Planned, PreflightContext, SilentProgress, StageContext
from lmdistill.search import record
from lmdistill.search.candidate import Candidate
from lmdistill.search.profile import Measured, Profile, Request
from lmdistill.search.record import supernet_file
from lmdistill.search.run import begin
from lmdistill.search.scored import Scored
from lmdistill.stages.search import SearchStage

STAGE = SearchStage()
Make = Callable[..., StageContext[Any]]


def run(ctx: StageContext[Any]) -> dict[str, Any]:
    metrics = STAGE.run(ctx)
    STAGE.verify(ctx, metrics)
    return metrics


@pytest.fixture(scope="module")
def whole(context: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(context(folder))
    return folder


def test_a_search_ends_with_a_student_and_all_that_was_tried(whole: Path) -> None:
    from lmdistill.checkpoints import load_model

    found = json.loads((whole / "out" / "search.json").read_text())
    assert len(found["candidates"]) == 4 * 3
    assert found["winner"] == found["finalists"][0]["digest"]
    assert [len(one["rounds"]) for one in found["finalists"]] == [2, 2, 1]
    assert set(found["front"]) <= {one["digest"] for one in found["candidates"]}
    volumes = found["sub_spaces"][0]["hypervolume"]
    assert volumes == sorted(volumes)
    student = json.loads((whole / "out" / "student.json").read_text())
    winner = Candidate.from_json(student["candidate"])
    assert winner.digest == found["winner"] and len(student["plan"]) == BLOCKS
    model = load_model(whole / "out" / "model")
    assert sum(p.numel() for p in model.parameters()) == winner.parameters == student["parameters"]
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_the_disk_that_is_estimated_holds_all_that_is_left(whole: Path, context: Make) -> None:
    ctx = context(whole)
    corpus = CorpusConfig.model_validate({"sources": [{"source": "text.txt"}], "sequence_length": LENGTH})
    inputs = {"corpus": [Planned("corpus", "corpus", "corpus", "c" * 64, corpus)]}
    planned = PreflightContext("search", ctx.config, inputs, ctx.need_teacher(), whole)
    left = sum(len(content) for name in ("out", "work") for content in folder_bytes(whole / name).values())
    estimate = STAGE.estimate(planned).disk_bytes
    assert estimate is not None and left <= estimate <= 2 * left


def test_stopped_and_resumed_is_never_stopped(whole: Path, context: Make, tmp_path: Path) -> None:
    """What is left of a search that was stopped in its super-network's training, and in its finalists' rounds."""
    shutil.copytree(whole / "work", tmp_path / "work")
    training = tmp_path / "work" / "sub-all" / "training"
    for gone in ("trained.safetensors", "log.json"):
        (training / gone).unlink()
    newest = max(training.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(newest)
    scores = tmp_path / "work" / "sub-all" / "scores.jsonl"
    lines = scores.read_text().splitlines(keepends=True)
    scores.write_text("".join(lines[:3]) + lines[3][:20])  # the last line was being written
    for after in (tmp_path / "work" / "finalists").glob("*/after-*.json"):
        after.unlink()
    run(context(tmp_path))
    assert folder_bytes(tmp_path / "out") == folder_bytes(whole / "out")


def test_kept_shared_weights_are_those_that_candidates_are_cut_from(whole: Path, context: Make, tmp_path: Path) -> None:
    """With them any candidate of the search can be cut again; all else in the artefact is as without."""
    shutil.copytree(whole / "work", tmp_path / "work")
    ctx = context(tmp_path, supernet=KEYS["supernet"] | {"keep": True})
    run(ctx)
    kept = supernet_file(ctx.out, "all")
    files = folder_bytes(ctx.out)
    assert kept.read_bytes() == files.pop(kept.name)
    assert files == folder_bytes(whole / "out")
    found = json.loads((ctx.out / "search.json").read_text())
    for finalist in found["finalists"]:
        (one,) = (one for one in found["candidates"] if one["digest"] == finalist["digest"])
        cut = begin(ctx).extract(Scored(Candidate.from_json(one["candidate"]), {}, {}, {}), kept).state_dict()
        inherited = load_file(ctx.work / "finalists" / finalist["digest"][:16] / "inherited" / "model.safetensors")
        assert all(torch.equal(cut[name], tensor) for name, tensor in inherited.items())


def test_pruning_tries_each_shape_once_and_trains_no_shared_weights(context: Make, tmp_path: Path) -> None:
    keys = {"method": "prune", "selection_width": 0, "finalists": {"count": 1, "fit_steps": 0}}
    run(context(tmp_path, **keys, space={"depth": [2, 3], "intermediate_sizes": [64, 96]}))
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    shapes = [json.dumps([len(one["candidate"]["layers"]), one["parameters"]]) for one in found["candidates"]]
    assert len(shapes) == 4 and found["sub_spaces"][0]["curve"] == []
    assert found["finalists"][0]["rounds"] == []
    assert not list((tmp_path / "work").rglob("checkpoint-*"))


def of_the_same_numbers(*folders: Path) -> bool:
    """Whether two models have the same numbers in each tensor; an artefact has its units in the teacher's order."""
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name].flatten().sort().values, second[name].flatten().sort().values) for name in first)


def test_without_convolutions_the_student_is_a_llama_that_attends_throughout(context: Make, tmp_path: Path) -> None:
    from lmdistill.checkpoints import load_model

    ctx = context(tmp_path, space={**KEYS["space"], "operators": ["attention"]}, weights="tuned")
    run(ctx)
    student = json.loads((ctx.out / "student.json").read_text())
    model = load_model(ctx.out / "model")
    assert model.config.model_type == "llama" and set(student["layer_types"]) == {"full_attention"}
    found = json.loads((ctx.out / "search.json").read_text())
    tuned = ctx.work / "finalists" / found["winner"][:16] / f"after-{len(found['finalists'][0]['rounds'])}"
    assert of_the_same_numbers(ctx.out / "model", tuned)


def test_fitted_weights_are_the_teachers_and_not_those_that_were_shared(context: Make, tmp_path: Path) -> None:
    """The shared weights have ranked the winner; its embeddings, which no fit touches, are as the teacher has them."""
    ctx = context(tmp_path, weights="fitted")
    run(ctx)
    found = json.loads((ctx.out / "search.json").read_text())
    first, *others = found["finalists"]
    assert first["digest"] == found["winner"] and first["fitted"] and first["rounds"]
    assert others and not any(one["fitted"] for one in others)
    fitted = ctx.work / "finalists" / found["winner"][:16] / "fitted"
    assert of_the_same_numbers(ctx.out / "model", fitted)
    embedded = load_file(fitted / "model.safetensors")["model.embed_tokens.weight"]
    made, shared = (
        load_file(ctx.work / name)["body.embed_tokens.weight"][:, : embedded.shape[1]]
        for name in ("initial.safetensors", "sub-all/training/trained.safetensors")
    )
    assert torch.equal(embedded, made) and not torch.equal(embedded, shared)


def test_sub_spaces_are_searched_each_with_weights_of_its_own(context: Make, tmp_path: Path) -> None:
    """Two bands, that meet nowhere, in one search: candidates stay in theirs, and finalists take its weights."""
    bands = {"small": {"parameters": [0, 0.06]}, "base": {"parameters": [0.06, 1]}}
    ctx = context(tmp_path, space={**KEYS["space"], "sub_spaces": bands}, evolution={"population": 3, "generations": 2})
    run(ctx)
    found = json.loads((ctx.out / "search.json").read_text())
    assert [each["name"] for each in found["sub_spaces"]] == ["small", "base"]
    for name, band in bands.items():
        sizes = [one["parameters"] / 1e6 for one in found["candidates"] if one["sub_space"] == name]
        low, high = band["parameters"]
        assert len(sizes) == 6 and all(low <= size <= high for size in sizes)
    trained = [load_file(ctx.work / f"sub-{name}" / "training" / "trained.safetensors") for name in bands]
    assert not torch.equal(*(state["body.embed_tokens.weight"] for state in trained))
    for finalist in found["finalists"]:
        (one,) = {one["sub_space"] for one in found["candidates"] if one["digest"] == finalist["digest"]}
        model = load_file(ctx.work / "finalists" / finalist["digest"][:16] / "inherited" / "model.safetensors")
        width = model["model.embed_tokens.weight"].shape[1]
        state = trained[list(bands).index(one)]["body.embed_tokens.weight"]
        assert torch.equal(model["model.embed_tokens.weight"], state[:, :width])


def test_a_candidate_of_two_sub_spaces_takes_the_weights_that_it_was_scored_with(context: Make, tmp_path: Path) -> None:
    bands = {"one": {"parameters": [0, 1]}, "two": {"parameters": [0, 1]}}
    ctx = context(tmp_path, space={**KEYS["space"], "sub_spaces": bands}, evolution={"population": 3, "generations": 1})
    run(ctx)
    found = json.loads((ctx.out / "search.json").read_text())
    both = 0
    for digest in (each["digest"] for each in found["finalists"]):
        losses = {one["sub_space"]: one["loss"]["kd"] for one in found["candidates"] if one["digest"] == digest}
        both += len(losses) == 2
        state = load_file(ctx.work / f"sub-{min(losses, key=losses.__getitem__)}" / "training" / "trained.safetensors")
        model = load_file(ctx.work / "finalists" / digest[:16] / "inherited" / "model.safetensors")
        own = model["model.embed_tokens.weight"]
        assert torch.equal(own, state["body.embed_tokens.weight"][:, : own.shape[1]])
    assert both


def test_what_was_trained_belongs_to_a_profiles_content_and_not_to_its_place(
    context: Make, profile: Path, tmp_path: Path
) -> None:
    moved, other = tmp_path / "moved.json", tmp_path / "other.json"
    shutil.copyfile(profile, moved)
    other.write_text(profile.read_text().replace('"toy"', '"another"'))
    sub = SimpleNamespace(name="all")
    ids = [
        record.identity(context(tmp_path / str(n), device=str(one)), sub)
        for n, one in enumerate((profile, moved, other))
    ]
    assert ids[0] == ids[1] != ids[2]


def test_an_artefact_that_lost_a_file_is_searched_again_with_its_own_profile(
    context: Make, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its work folder is gone, with all timings; timed again, another student might win."""
    from lmdistill.search import device
    from lmdistill.search.costs import open_device
    from lmdistill.search.space import Space

    monkeypatch.setattr(device, "describe", lambda: {"machine": "toy"})
    monkeypatch.setattr(device, "_time_group", lambda *_: pytest.fail("timed again"))
    ctx = context(tmp_path, device="local")
    shutil.copyfile(profile, ctx.out / "profile.json")
    teacher = json.loads((ctx.need_teacher().path / "config.json").read_text())
    space = Space(ctx.config.space, teacher, ctx.config.timing.format)
    opened = open_device(ctx.config, space, ctx.out, ctx.work, SilentProgress())
    assert opened.profile == Profile.read(profile)


CHEAP = {"method": "prune", "evolution": {"population": 6}, "finalists": {"count": 1, "fit_steps": 0}}


def with_checked(profile: Path, folder: Path, shapes: list[Candidate], slower: float) -> str:
    """The profile with shapes that were timed beside the teacher, so many times as slow as it."""
    read = Profile.read(profile)
    seconds = {task: [slower] for task in read.plan.tasks}
    reference = {task: [1.0] for task in read.plan.tasks}
    read.checked = {each.shape_digest: Measured(each, seconds, reference, 1, 1) for each in shapes}
    file = folder / "checked.json"
    file.write_text(json.dumps(read.to_json()))
    return str(file)


def winner_of(ctx: StageContext[Any]) -> Candidate:
    run(ctx)
    return Candidate.from_json(json.loads((ctx.out / "student.json").read_text())["candidate"])


SLOW = 30.0  # times the teacher: what is foretold does not make up for it


def test_a_shape_that_misses_a_budget_once_timed_is_set_aside(
    context: Make, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Foretold it keeps it, and would win; it is judged by the mean of that and of its time beside the teacher."""
    told: list[str] = []
    monkeypatch.setattr(SilentProgress, "note", lambda self, text: told.append(text))
    keys = {**CHEAP, "budgets": ["decode >= 1.01x teacher"]}
    best = winner_of(context(tmp_path / "foretold", **keys))
    assert not any("set aside" in text for text in told)
    file = with_checked(profile, tmp_path, [best], slower=SLOW)
    ctx = context(tmp_path / "timed", **keys, device=file)
    assert winner_of(ctx).shape_digest != best.shape_digest
    (note,) = (text for text in told if text.startswith("set aside: "))
    found = json.loads((ctx.out / "search.json").read_text())
    own, timed = found["teacher"]["decode_tps"], found["timed"][best.shape_digest]
    assert timed["measured"]["decode_tps"] == pytest.approx(own / SLOW, rel=1e-5)
    (foretold,) = (one["predicted"]["decode_tps"] for one in found["candidates"] if one["digest"] == best.digest)
    missed = 1 - math.sqrt(foretold * own / SLOW) / (1.01 * own)
    assert timed["excess"] == {"decode >= 1.01x teacher": pytest.approx(missed, abs=2e-6)}
    assert f"miss `decode >= 1.01x teacher` by {missed:.1%}, timed and foretold together" in note
    assert json.loads((ctx.out / "profile.json").read_text()) == json.loads(Path(file).read_text())


def test_where_no_shape_keeps_a_budget_once_timed_the_nearest_one_goes_on_and_that_is_told(
    context: Make, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(SilentProgress, "note", lambda self, text: told.append(text))
    keys = {**CHEAP, "budgets": ["decode >= 1.01x teacher"]}
    ctx = context(tmp_path / "all", **keys)
    run(ctx)
    tried = [
        Candidate.from_json(one["candidate"]) for one in json.loads((ctx.out / "search.json").read_text())["candidates"]
    ]
    file = with_checked(profile, tmp_path, tried, slower=SLOW)
    assert winner_of(context(tmp_path / "slow", **keys, device=file)).digest in {one.digest for one in tried}
    assert told[-1].startswith("no shape of ") and "keeps the budgets once timed; the nearest: " in told[-1]


def test_finalists_are_timed_beside_the_teacher(
    context: Make, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the reference's own drift since then nothing can be judged that is relative to the teacher."""
    from lmdistill.search import on_device

    asked: list[Request] = []

    def timed(request: Request, result: Path, work: Path, *_: Any) -> Profile:
        asked.append(request)
        seconds = {task: [1.0] for task in request.plan.tasks}
        measured = [Measured(one, seconds, {t: [2.0] for t in seconds}, 1, 1) for one in request.candidates]
        found = Profile(request.plan, request.reference, {})
        found.add(measured)
        return found

    monkeypatch.setattr(on_device, "profile_of", lambda *_: Profile.read(profile))
    monkeypatch.setattr("lmdistill.search.device.run", timed)
    ctx = context(tmp_path, **CHEAP, device="local")
    shutil.copyfile(profile, ctx.work / "profile.json")
    winner = winner_of(ctx)
    (request,) = asked
    assert request.candidates == (winner,) and len(request.reference.layers) == BLOCKS
    found = json.loads((ctx.out / "search.json").read_text())
    assert found["finalists"][0]["measured"]["decode_tps"] == pytest.approx(
        2 * found["teacher"]["decode_tps"], rel=1e-5
    )
    assert Profile.read(ctx.out / "profile.json").checked[winner.shape_digest].ratio("decode") == 0.5


def test_budgets_that_nothing_keeps_are_refused_before_anything_is_trained(context: Make, tmp_path: Path) -> None:
    with pytest.raises(LmdistillError, match="nearest point"):
        run(context(tmp_path, budgets=["decode_tps >= 1e9"]))
    assert not list((tmp_path / "work").iterdir())


def test_a_sub_space_that_cannot_keep_the_budgets_is_left_out_and_said(
    context: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(SilentProgress, "note", lambda self, text: told.append(text))
    bands = {"small": {"parameters": [0, 0.06]}, "base": {"parameters": [0.06, 1]}}
    keys = {"method": "prune", "finalists": {"count": 1, "fit_steps": 0}, "budgets": ["file_mb <= 0.06"]}
    run(context(tmp_path, **keys, space={**KEYS["space"], "sub_spaces": bands}))
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    assert [each["name"] for each in found["sub_spaces"]] == ["small"]
    assert {one["sub_space"] for one in found["candidates"]} == {"small"}
    (note,) = (text for text in told if text.startswith("not searched: "))
    assert "no candidate of sub-space 'base' keeps the budgets 'file_mb <= 0.06'" in note
    assert "the nearest point is file_mb" in note


def test_the_winner_keeps_the_budgets(context: Make, tmp_path: Path) -> None:
    keys = {"method": "prune", "evolution": {"population": 6}, "finalists": {"count": 1, "fit_steps": 0}}
    free = context(tmp_path / "free", **keys)
    run(free)
    figures = [one["predicted"] for one in json.loads((free.out / "search.json").read_text())["candidates"]]
    bound = sorted(one["decode_tps"] for one in figures)[len(figures) // 2]
    bounded = context(tmp_path / "bounded", **keys, budgets=[f"decode_tps >= {bound:.0f}"])
    run(bounded)
    found = json.loads((bounded.out / "search.json").read_text())
    (winner,) = (one for one in found["candidates"] if one["digest"] == found["winner"])
    assert winner["feasible"] and winner["predicted"]["decode_tps"] >= bound * 0.999
