"""What the student's completions are sampled with: one decorated function a sampler.

A sampler is TRL's: the function says with which arguments of `trl.DistillationConfig` it is chosen. TRL then pads,
generates and stops at the end-of-sequence tokens, and for vLLM loads the student's weights into it before every step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmdistill.errors import PreflightError, nearest
from lmdistill.on_policy.config import OnPolicyConfig

AUTO = "auto"
Arguments = Callable[[OnPolicyConfig], dict[str, Any]]


@dataclass(frozen=True)
class Sampler:
    """A sampler with what is known of it before it runs."""

    arguments: Arguments
    packages: tuple[str, ...]  # what it imports beside trl
    tools: tuple[str, ...]  # distributions whose version changes what is sampled
    gpu: bool  # runs on a GPU only

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return next(iter((self.arguments.__doc__ or "").strip().splitlines()), "")


SAMPLERS: dict[str, Sampler] = {}


def sampler(
    name: str, packages: tuple[str, ...] = (), tools: tuple[str, ...] = (), gpu: bool = False
) -> Callable[[Arguments], Arguments]:
    """Register a sampler under `name`, the value of `sampler:` in a recipe; the rest as in `Sampler`."""

    def register(arguments: Arguments) -> Arguments:
        SAMPLERS[name] = Sampler(arguments, packages, tools, gpu)
        return arguments

    return register


@sampler("transformers")
def with_transformers(config: OnPolicyConfig) -> dict[str, Any]:
    """transformers' generate on the student itself, on any device."""
    return {"use_vllm": False}


@sampler("vllm", packages=("vllm",), tools=("vllm",), gpu=True)
def with_vllm(config: OnPolicyConfig) -> dict[str, Any]:
    """vLLM beside the student on its GPU, given the student's weights before every step."""
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": config.vllm_memory,
        "vllm_max_model_length": config.max_prompt_tokens + config.max_new_tokens,
    }


def tools_of(name: str) -> tuple[str, ...]:
    """Distributions whose version is part of the result; for auto those of every sampler it may choose."""
    chosen = SAMPLERS.values() if name == AUTO else [SAMPLERS[name]] if name in SAMPLERS else []
    return tuple(sorted({tool for one in chosen for tool in one.tools}))


def choose(name: str, device: str, on_grid: bool = False) -> str:
    """The sampler that `name` means on this device; PreflightError where there is none such, or it cannot run here.

    A student on a grid is sampled where it is trained: others are sent its weights, which are not its points.
    """
    if name == AUTO:
        usable = device != "cpu" and not on_grid
        return next((one for one in ("vllm",) if usable and not _missing(one)), "transformers")
    if name not in SAMPLERS:
        raise PreflightError(
            f"no sampler is called '{name}'{nearest(name, (AUTO, *SAMPLERS))}",
            fix=f"one of: {', '.join((AUTO, *sorted(SAMPLERS)))}",
        )
    if on_grid and name == "vllm":
        raise PreflightError(
            "the student lies on a grid, and vLLM would sample from another model",
            why="it is sent the weights that the gradient goes to, not the points that the student is trained at",
            fix="set `sampler: transformers`",
        )
    if missing := _missing(name):
        raise PreflightError(
            f"sampler '{name}' needs {', '.join(missing)}",
            fix=f"pip install {' '.join(missing)}, name an interpreter that has it in runtime.python, "
            "or set `sampler: transformers`",
        )
    if SAMPLERS[name].gpu and device == "cpu":
        raise PreflightError(f"sampler '{name}' needs a GPU", fix="set `sampler: transformers`")
    return name


def _missing(name: str) -> list[str]:
    return [package for package in SAMPLERS[name].packages if importlib.util.find_spec(package) is None]
