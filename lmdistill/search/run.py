"""What the search stage does: makes the super-network, tries candidates, trains finalists, hands the winner on.

Everything that is measured or trained is kept in the work folder as it comes; the device's profile goes into the
artefact, and is what the rest is a function of.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from lmdistill.errors import StageError
from lmdistill.pipeline.files import write_json
from lmdistill.search import record
from lmdistill.search.bridging import bridge
from lmdistill.search.costs import PROFILE, ModelledDevice, open_device
from lmdistill.search.finalists import Finalist, Halving, halve, prepare, written
from lmdistill.search.heldout import HeldOutLoss, TrainingRows
from lmdistill.search.methods import Found, Ground, find_method
from lmdistill.search.ranking import Ranking, rank
from lmdistill.search.scored import Scored
from lmdistill.search.shortlist import Shortlist, shortlist
from lmdistill.search.space import Space
from lmdistill.search.sub_space import SubSpace, sub_spaces

if TYPE_CHECKING:
    import torch

    from lmdistill.pipeline.stage import StageContext
    from lmdistill.search.config import SearchConfig
    from lmdistill.search.supernet import SuperNet

    Context = StageContext[SearchConfig]

SPLIT = "train"
INITIAL = "initial.safetensors"


@dataclass(frozen=True)
class World:
    """What a search works with, before any candidate is tried."""

    subs: Sequence[SubSpace]
    costs: ModelledDevice
    reader: TrainingRows
    heldout: HeldOutLoss
    ranking: Ranking
    net: SuperNet
    initial: Path  # the super-network's weights as they were made
    tokenizer: Path
    tokens_RT: torch.Tensor  # rows of the corpus, but for those held out

    def extract(self, scored: Scored, state: Path) -> Any:
        """A candidate's model with the weights in a file of the super-network's."""
        self.net.load_state_dict(load_file(state, device=self.net.device))
        return self.net.extract(scored.candidate)


@dataclass(frozen=True)
class Tried:
    """A sub-space and what was found in it."""

    sub: SubSpace
    found: Found

    @property
    def scored(self) -> list[Scored]:
        """All candidates that were tried, in order."""
        return [one for generation in self.found.generations for one in generation]


def search(ctx: Context) -> dict[str, Any]:
    """Write out/model, out/student.json and out/search.json; the metrics hold the winner's size."""
    world = begin(ctx)
    tried = explore(ctx, world)
    found = _shortlist(ctx, world, tried)
    finalists = finals(ctx, world, tried, found)
    write_json(ctx.out / PROFILE, world.costs.profile.to_json())  # with the finalists' timings: it repeats the search
    return record.write(ctx, tried, finalists, world, found)


def begin(ctx: Context) -> World:
    """Time the device, look whether the budgets can be kept, rank the teacher's blocks, make the super-network."""
    import torch

    from lmdistill.corpus.format import CorpusReader

    if ctx.runtime.threads:
        torch.set_num_threads(ctx.runtime.threads)
    config, device = ctx.config, ctx.runtime.resolve_device()
    corpus = CorpusReader(ctx.one("corpus").out)
    teacher = json.loads((ctx.need_teacher().path / "config.json").read_text())
    space = Space(config.space, teacher, config.timing.format)
    reader = TrainingRows(ctx.one("signals").out, SPLIT, config.heldout_rows)  # too few rows are said before timing
    costs = open_device(config, space, ctx.out, ctx.work, ctx.progress)
    subs = costs.within_budgets(sub_spaces(space, costs.cost), ctx.progress.note)
    heldout = HeldOutLoss(reader, config.distilling(1), device)
    split = corpus.split(SPLIT)
    rows_RT = split.tokens_RT[: max(1, len(split) - config.heldout_rows)].astype("int64")
    tokens_RT = torch.from_numpy(rows_RT).to(device)
    net, ranking = _made(ctx, space, subs, tokens_RT)
    initial = ctx.work / INITIAL
    if not initial.exists():
        partial = initial.with_suffix(".tmp")
        save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, partial)
        partial.rename(initial)
    return World(subs, costs, reader, heldout, ranking, net, initial, corpus.tokenizer_folder, tokens_RT)


def _made(ctx: Context, space: Space, subs: Sequence[SubSpace], tokens_RT: torch.Tensor) -> tuple[SuperNet, Ranking]:
    """The super-network and the ranking of the teacher's blocks, both measured on rows of the corpus."""
    from lmdistill.checkpoints import load_model
    from lmdistill.search.make_supernet import make
    from lmdistill.students import lfm2
    from lmdistill.students.grow import in_precision

    config, making = ctx.config, record.making(ctx.config, space, subs)
    few_RT = tokens_RT[: config.selection_rows]
    source = load_model(ctx.need_teacher().path, device=str(tokens_RT.device))
    if making.hybrid:
        source = lfm2.from_llama(source, few_RT, making.kernel).to(tokens_RT.device)
    rounded, kept = in_precision(source, config.precision), ctx.work / "ranking.json"
    ranking = rank(rounded, few_RT, space, config.selection_width, kept, ctx.progress)
    return make(source, tokens_RT, making, ctx.work, ctx.progress), ranking


def explore(ctx: Context, world: World) -> list[Tried]:
    """Each sub-space with what the method found in it."""
    from lmdistill.training.run import Place

    tried, device = [], world.net.device
    for sub in world.subs:
        world.net.load_state_dict(load_file(world.initial, device=device))
        work, own = ctx.work / f"sub-{sub.name}", record.identity(ctx, sub)
        place = Place(world.initial, ctx.out, work, device, own, live_teacher=ctx.need_teacher())
        ground = Ground(
            ctx.config, sub, world.net, world.ranking, world.reader, world.heldout, world.costs, place, ctx.progress
        )
        tried.append(Tried(sub, find_method(ctx.config.method)(ground)))
    return tried


def _shortlist(ctx: Context, world: World, tried: Sequence[Tried]) -> Shortlist:
    """Who is to be trained; StageError where no candidate that was tried keeps the budgets as foretold."""
    everyone = [one for each in tried for one in each.scored]
    count, note = ctx.config.finalists.count, ctx.progress.note
    found = shortlist(everyone, ctx.config.objectives, count, world.costs, ctx.work, note)
    if not found.best:
        raise _nothing_feasible(everyone)
    return found


def finals(ctx: Context, world: World, tried: Sequence[Tried], found: Shortlist) -> list[Finalist]:
    """The finalists, the winner first."""
    config, best = ctx.config, found.best

    def cut(scored: Scored) -> Any:
        """With the weights of the sub-space that it was scored in: another one may have tried it too."""
        own = next(each for each in tried if any(one is scored for one in each.scored))
        return world.extract(scored, own.found.state or world.initial)

    finalists = prepare(best, ctx.work / "finalists", cut, world.tokenizer)
    if config.finalists.fit_steps and config.weights != "fitted":
        _bridge(ctx, world, finalists)
    training = config.distilling(config.finalists.tokens)
    halved = halve(finalists, Halving(world.reader, training, world.heldout, world.net.device, ctx.progress))
    if config.weights == "fitted":
        winner = halved[0]
        written(winner.cut, lambda: world.extract(winner.scored, world.initial), world.tokenizer)
        _bridge(ctx, world, [winner])
    return halved


def _bridge(ctx: Context, world: World, finalists: Sequence[Finalist]) -> None:
    """Fit the blocks of finalists to the teacher's."""
    config = ctx.config
    world.net.load_state_dict(load_file(world.initial, device=world.net.device))
    rows_RT = world.tokens_RT[: config.supernet.fit_rows]
    how = record.fit_of(config, config.finalists.fit_steps)
    bridge(finalists, world.net, rows_RT, how, world.heldout, world.tokenizer, ctx.progress)


def _nothing_feasible(everyone: Sequence[Scored]) -> StageError:
    nearest = min(everyone, key=lambda one: (max(one.excess.values()), one.candidate.digest))
    missed = max(nearest.excess, key=lambda name: nearest.excess[name])
    return StageError(
        f"none of {len(everyone)} candidates keeps the budgets",
        why=f"the nearest misses `{missed}` by {100 * nearest.excess[missed]:.1f}%",
        fix="raise `evolution.generations` or `evolution.population`, or loosen that budget",
    )
