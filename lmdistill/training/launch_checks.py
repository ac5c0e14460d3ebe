"""What can be known of a training of several processes before it starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.pipeline.launch_keys import LaunchSection
from lmdistill.pipeline.stage import PreflightContext
from lmdistill.training.config import DistillConfig


def check_launch(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    """Rows that cannot be shared out, devices there are too few of, ways that cannot be gone here."""
    launch = ctx.runtime.launch
    if launch is None:
        return []
    return [*_rows(ctx, launch), *_estimated(ctx, launch), *_devices(ctx, launch), *_way(ctx, launch)]


def _rows(ctx: PreflightContext[DistillConfig], launch: LaunchSection) -> Iterator[LmdistillError]:
    config, processes = ctx.config, launch.num_processes
    at_once = (config.micro_rows or 1) * processes
    if not config.batch_tokens and config.batch_rows % at_once:
        micro = f" × micro_rows {config.micro_rows}" if config.micro_rows else ""
        what = f"stage '{ctx.name}': num_processes {processes}{micro} does not divide batch_rows {config.batch_rows}"
        why = "every process takes the same share of a step's rows"
        yield PreflightError(what, why=why, fix="change runtime.launch.num_processes, micro_rows or batch_rows")


def _estimated(ctx: PreflightContext[DistillConfig], launch: LaunchSection) -> Iterator[LmdistillError]:
    if ctx.config.kd_weight == "auto" and launch.num_processes > 1:
        what = f"stage '{ctx.name}': `kd_weight: auto` is estimated by one process, and runtime.launch starts more"
        yield PreflightError(what, fix="run it once without `launch`, and write down the λ that it estimates")


def _devices(ctx: PreflightContext[DistillConfig], launch: LaunchSection) -> Iterator[LmdistillError]:
    import torch

    device, processes = ctx.runtime.resolve_device(), launch.num_processes
    if ":" in device:
        what = f"runtime.device is {device}, and runtime.launch gives every process a GPU of its own"
        yield PreflightError(what, fix="set runtime.device to cuda; CUDA_VISIBLE_DEVICES chooses among them")
    elif device == "cuda" and processes > torch.cuda.device_count():
        what = f"runtime.launch asks for {processes} processes, and there are {torch.cuda.device_count()} GPUs"
        yield PreflightError(what, why="each process takes one", fix="set num_processes to at most that many")
    elif device == "cpu" and launch.way in ("fsdp", "deepspeed"):
        what = f"runtime.launch.{launch.way} spreads a model over GPUs, and this run is on the CPU"
        yield PreflightError(what, fix=f"drop `{launch.way}`: processes on CPUs train with DDP")


def _on_a_grid(ctx: PreflightContext[DistillConfig]) -> bool:
    from lmdistill.quantization.planned import lies_on

    return ctx.config.quantize is not None or any(lies_on(one) is not None for one in ctx.inputs.get("student", ()))


def _way(ctx: PreflightContext[DistillConfig], launch: LaunchSection) -> Iterator[LmdistillError]:
    if launch.way == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        what = "runtime.launch.deepspeed needs the package deepspeed"
        yield PreflightError(what, why="not installed", fix="pip install 'lmdistill[deepspeed]', or use fsdp")
    if launch.config is not None and not Path(launch.config).is_file():
        what = f"runtime.launch.config names {launch.config}, and no such file is there"
        yield PreflightError(what, fix="write one with `accelerate config --config_file PATH`")
    spread = _spread_by(launch)
    if spread and ctx.config.intermediate:
        what = f"stage '{ctx.name}': `intermediate` reads blocks whose weights runtime.launch.{spread} spreads"
        yield PreflightError(what, why="its hooks and critics are not sharded", fix="use DDP: drop the key")
    if spread and _on_a_grid(ctx):
        what = f"stage '{ctx.name}': a student on a grid cannot be spread over processes by runtime.launch.{spread}"
        yield PreflightError(what, why="points need whole blocks with their scales", fix="use DDP: drop the key")
    if spread and ctx.config.optimizer != "adamw":
        what = f"stage '{ctx.name}': `optimizer: {ctx.config.optimizer}` cannot be spread over processes"
        why = "its blocks of 8-bit moments cross the borders of the shards"
        yield PreflightError(what, why=why, fix="use `optimizer: adamw` with it, or DDP")


def _spread_by(launch: LaunchSection) -> str:
    """The key that spreads the model itself over the processes; empty where each has the whole."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if launch.config is None or not Path(launch.config).is_file():
        return launch.way if launch.way in ("fsdp", "deepspeed") else ""
    try:
        settings = YAML(typ="safe").load(Path(launch.config).read_text("utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        what = f"{launch.config}, which runtime.launch.config names, is no YAML"
        fix = "write one with `accelerate config --config_file PATH`"
        raise PreflightError(what, why=str(error).strip().splitlines()[0], fix=fix) from error
    kind = str(settings.get("distributed_type", "")) if isinstance(settings, dict) else ""
    return "config" if kind.upper() in ("FSDP", "DEEPSPEED", "MEGATRON_LM") else ""
