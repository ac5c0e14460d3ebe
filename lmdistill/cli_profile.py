"""`lmdistill profile-device`: how fast a device is at each kind of work, here or on a machine that is elsewhere."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lmdistill.search.keys import DeviceSearchConfig
    from lmdistill.search.profile import Profile, Request
    from lmdistill.search.space import Space


def profile_device(
    recipe: Annotated[str, typer.Argument(help="A recipe with a search stage: its space, format and prompts.")],
    request: Annotated[
        Path | None, typer.Option(help="Write a request and its script here, for another device; time nothing.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The profile to write, for the recipe's `device:`.")] = Path(
        "device_profile.json"
    ),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: stages.search.timing.rounds=4 (repeatable).")
    ] = None,
) -> None:
    """Time random-weight students of a recipe's search space on this machine, or ask another one to.

    Then says whether the recipe's budgets can be kept there. Killed, the same command goes on. Examples:
    lmdistill profile-device recipes/lfm_search.yaml;
    lmdistill profile-device recipes/lfm_search.yaml --request for_the_pi
    """
    from lmdistill.search import packages

    if request is None:
        for problem in packages.missing((*packages.TIMING, *packages.FITTING), "profile-device"):
            raise problem
    config, space, asked = _search_of(recipe, overrides or [])
    if request is not None:
        _ask(asked, request)
        return
    profile = _time(asked, out)
    _show(profile, out)
    _judge(profile, config, space)


def _time(asked: Request, out: Path) -> Profile:
    """Time what is asked and not in `out` yet; raises LmdistillError where `out` may not be written over."""
    from lmdistill.search.device import check_result, run

    def report(done: int, total: int) -> None:
        typer.echo(f"{done} of {total} timed", err=True)

    check_result(asked, out)
    with tempfile.TemporaryDirectory(prefix="profile-device-") as work:
        return run(asked, out, Path(work), report)


def _search_of(recipe: str, overrides: list[str]) -> tuple[DeviceSearchConfig, Space, Request]:
    """The recipe's search stage, its space and what of it is timed; raises RecipeError or PreflightError if none is."""
    import json

    from lmdistill.assets import model_folder
    from lmdistill.errors import PreflightError, RecipeError
    from lmdistill.pipeline.stage import SilentProgress
    from lmdistill.recipe import load_recipe
    from lmdistill.search.keys import DeviceSearchConfig
    from lmdistill.search.on_device import request_for
    from lmdistill.search.profile_checks import too_few
    from lmdistill.search.space_problems import open_space

    loaded = load_recipe(recipe, overrides)
    configs = [entry.config for entry in loaded.entries if isinstance(entry.config, DeviceSearchConfig)]
    if not configs or loaded.teacher is None:
        lacks = "search stage" if not configs else "teacher"
        raise RecipeError(f"{recipe} has no {lacks}", fix="take a recipe that searches, such as lfm_search")
    folder = model_folder(loaded.teacher, SilentProgress()).path
    config = configs[0]
    teacher = json.loads((folder / "config.json").read_text("utf-8"))
    space, found = open_space(config.space, teacher, config.timing.format)
    if space is None or found:
        raise PreflightError(
            "; ".join(what for what, _ in found), fix="; ".join(dict.fromkeys(fix for _, fix in found))
        )
    asked = request_for(space, config.timing)
    for problem in too_few(asked):
        raise problem
    return config, space, asked


def _ask(asked: Request, folder: Path) -> None:
    """Write what another device needs, and say what its owner does with it."""
    from lmdistill.search.portable import write_request

    written, script = write_request(asked, folder)
    typer.echo(f"{written}: {len(asked.candidates)} shapes to time, as {asked.plan.format}")
    typer.echo("on the device: pip install llama-cpp-python gguf")
    typer.echo(f"on the device: python {script.name} {written.name}")


def _judge(profile: Profile, config: DeviceSearchConfig, space: Space) -> None:
    """Say that the budgets can be kept by some candidate; raises the error of the first that cannot."""
    from lmdistill.search.profile_checks import problems_of

    for problem in problems_of(profile, config, space):
        raise problem
    if config.budgets:
        typer.echo(f"{' and '.join(config.budgets)}: some student of the space is foretold to keep that here")


def _show(profile: Profile, out: Path) -> None:
    from lmdistill.search.latency import LatencyModel

    model = LatencyModel.fit(profile)
    typer.echo(f"{out}: {len(profile.measured)} shapes on {profile.device['processor'] or profile.device['machine']}")
    for name, fit in (("decode", model.decode), ("first token", model.prefill), ("memory", model.memory)):
        typer.echo(f"{name}: nine of ten left-out shapes are foretold within {fit.half_width:.1%}")
