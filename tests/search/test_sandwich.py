"""Sandwich training: whose gradients a step adds up, and that the same ones are chosen everywhere and every time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sandwich_process import train
from supernet_toys import BLOCKS, KEYS

from lmdistill.pipeline.jobs import artefact_to_json
from lmdistill.pipeline.stage import Artefact, ModelRef, SilentProgress, StageContext
from lmdistill.search import run
from lmdistill.search.candidate import Candidate
from lmdistill.search.heldout import TrainingRows
from lmdistill.search.ranking import Ranking
from lmdistill.search.sandwich import TRAINED, Sandwich, rows_from_the_end, train_supernet
from lmdistill.search.space import shape_of
from lmdistill.search.sub_space import SubSpace
from lmdistill.training.data import row_order
from lmdistill.training.ranks import Ranks
from lmdistill.training.run import Place

RANKING = Ranking(gone=(1, 3, 0, 2), local=(2, 0, 3, 1))


@pytest.fixture(scope="module")
def world(context: Callable[..., StageContext[Any]], tmp_path_factory: pytest.TempPathFactory) -> run.World:
    return run.begin(context(tmp_path_factory.mktemp("world")))


def test_a_step_has_the_largest_the_smallest_and_random_ones_by_seed_and_number(world: run.World) -> None:
    sub = world.subs[0]
    one, same, other = (Sandwich(sub, RANKING, 2, 1.0, seed) for seed in (3, 3, 4))
    for step in range(5):
        found = one.candidates(step)
        assert [shape_of(each) for each in found[:2]] == [shape_of(sub.largest()), shape_of(sub.smallest())]
        assert found == same.candidates(step) and len(found) == 4
        assert all(sub.problems(each) == [] for each in found)
    assert one.candidates(0)[:2] == one.candidates(1)[:2] and one.candidates(0)[2:] != one.candidates(1)[2:]
    assert one.candidates(0)[2:] != other.candidates(0)[2:]


@pytest.mark.parametrize("seed", [0, 5])
def test_its_rows_are_those_that_a_distillation_of_the_same_seed_sees_last(world: run.World, seed: int) -> None:
    reader = world.reader
    whole = reader.rows + reader.held_out
    distilled = row_order(whole, whole, seed).tolist()
    found = rows_from_the_end(reader, 2 * reader.rows, seed).tolist()
    first, again = found[: reader.rows], found[reader.rows :]
    assert sorted(first) == sorted(again) == list(range(reader.rows)) and first != again
    for wanted in range(1, reader.rows):
        assert found[:wanted] == rows_from_the_end(reader, wanted, seed).tolist()
        assert not set(found[:wanted]) & set(distilled[: reader.rows - wanted])


def _one_step(
    world: run.World, teacher: ModelRef, folder: Path, candidates: list[Candidate], relations: Any = None
) -> dict[str, Any]:
    """The names of the weights that one step moves, and the curve."""
    from lmdistill.search.config import SearchConfig

    keys = {**KEYS, "supernet": {**KEYS["supernet"], "relations": relations}}
    config = SearchConfig.model_validate(keys)
    world.net.load_state_dict(load_file(world.initial))
    place = Place(world.initial, folder, folder / "work", "cpu", "toy", live_teacher=teacher)
    distilling = config.distilling(world.reader.row_tokens * 4).model_copy(update={"log_steps": 1})
    before = {name: tensor.clone() for name, tensor in world.net.state_dict().items()}
    curve = train_supernet(
        world.net,
        lambda step: candidates,
        world.reader,
        distilling,
        place,
        SilentProgress(),
        config.supernet.relations,
    )
    moved = {name for name, tensor in world.net.state_dict().items() if not torch.equal(tensor, before[name])}
    return {"moved": moved, "curve": curve}


def test_a_step_moves_the_weights_of_all_its_candidates_and_no_others(
    world: run.World, teacher: ModelRef, tmp_path: Path
) -> None:
    sandwich = Sandwich(world.subs[0], RANKING, 0, 0.0, 0)
    candidates = sandwich.candidates(0)
    found = _one_step(world, teacher, tmp_path, candidates)
    sources = {layer.source for one in candidates for layer in one.layers}
    convolved = {layer.source for one in candidates for layer in one.layers if layer.operator == "conv"}
    moved = {int(name.split(".")[2]) for name in found["moved"] if name.startswith("body.layers.")}
    assert moved == sources and len(sources) < BLOCKS
    assert {int(name.split(".")[1]) for name in found["moved"] if name.startswith("convolutions.")} == convolved


def test_the_loss_of_a_step_is_the_mean_over_its_candidates(
    world: run.World, teacher: ModelRef, tmp_path: Path
) -> None:
    first, second = Sandwich(world.subs[0], RANKING, 0, 0.0, 0).candidates(0)
    losses = [
        _one_step(world, teacher, tmp_path / str(number), candidates)["curve"][0]["loss"]
        for number, candidates in enumerate(([first], [second], [first, second]))
    ]
    alone, both = losses[:2], losses[2]
    assert both == pytest.approx(sum(alone) / 2, rel=1e-3) and alone[0] != alone[1]


def test_two_processes_train_the_same_candidates_as_one_does(
    context: Callable[..., StageContext[Any]], profile: Path, tmp_path: Path
) -> None:
    """Half of a step's rows each; were a random candidate another one in either process, the weights would differ."""
    ctx = context(tmp_path / "begun")
    before = load_file(run.begin(ctx).initial)
    job = {
        "begun": str(tmp_path / "begun"),
        "config": {**KEYS, "device": str(profile)},
        "inputs": {role: artefact_to_json(given[0]) for role, given in ctx.inputs.items()},
        "teacher": str(ctx.need_teacher().path),
        "work": str(tmp_path / "two"),
    }
    train({**job, "work": str(tmp_path / "one")}, Ranks())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(__file__).parent / "sandwich_process.py"), json.dumps(job)]
    running = [
        subprocess.Popen(
            command, env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=900)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    one, two = (load_file(tmp_path / name / TRAINED) for name in ("one", "two"))
    assert sum(not torch.equal(one[name], before[name]) for name in one) > len(one) / 2
    for name, tensor in one.items():  # sums of other order move a weight with hardly any gradient either way
        apart, moved = (two[name] - tensor).abs().mean(), (tensor - before[name]).abs().mean()
        assert apart <= 0.02 * moved, name


def test_the_extremes_are_looked_for_once(world: run.World, monkeypatch: pytest.MonkeyPatch) -> None:
    sub, seen = SubSpace("again", world.subs[0].space, world.subs[0].shapes), list[SubSpace]()
    every = SubSpace.one_of_each_shape

    def counted(self: SubSpace) -> Iterator[Candidate]:
        seen.append(self)
        return every(self)

    monkeypatch.setattr(SubSpace, "one_of_each_shape", counted)
    sandwich = Sandwich(sub, RANKING, 1, 1.0, 0)
    for step in range(5):
        sandwich.candidates(step)
    assert seen == [sub]
    sizes = [candidate.parameters for candidate in every(sub)]
    assert (sub.smallest().parameters, sub.largest().parameters) == (min(sizes), max(sizes))


def test_rows_that_are_held_out_are_never_trained_on(signals: Artefact) -> None:
    whole, held = TrainingRows(signals.out, "train", 0), TrainingRows(signals.out, "train", 4)
    assert held.rows == len(held) == whole.rows - 4
    first = whole.read(list(range(held.rows)))
    assert (held.read(slice(None)).tokens_RT == first.tokens_RT).all()


def test_attention_relations_of_every_candidate_join_the_loss(
    world: run.World, teacher: ModelRef, tmp_path: Path
) -> None:
    candidates = Sandwich(world.subs[0], RANKING, 1, 1.0, 0).candidates(0)
    keys = {"loss": "relation_kl", "weight": 0.5}
    plain = _one_step(world, teacher, tmp_path / "plain", candidates)["curve"][0]
    related = _one_step(world, teacher, tmp_path / "related", candidates, keys)["curve"][0]
    assert related["relations"] > 0 and related["kd"] == pytest.approx(plain["kd"], rel=1e-4)
    assert related["loss"] == pytest.approx(plain["loss"] + 0.5 * related["relations"], rel=1e-3)
