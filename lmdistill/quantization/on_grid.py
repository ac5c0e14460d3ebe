"""A model that lies on grids while it is trained: every forward pass sees points, the gradient goes to full precision.

`OnGrids(model, plan)` works under any trainer: parameters keep their names, places and ties, only the layers' forwards
look at them through the grid (Polino et al., ICLR 2018, algorithm 1). Scales that are kept or learned are buffers or
parameters of the layer, `grid_<scale>`, so checkpoints hold them. `settle` ends it: the weights become their points.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.quantization.activations import fake_quantise_activations
from lmdistill.quantization.grid import Grid
from lmdistill.quantization.learned_scales import learned_points
from lmdistill.quantization.placement import Placement

PREFIX = "grid_"
HANDLE = "lies_on"


@dataclass(frozen=True)
class Plan:
    """Where the tensors of a model shall lie, by the names of its parameters."""

    placement: Placement  # with the scales that are given; those of other tensors follow their weights
    learned: bool = False  # whether given scales are trained


@dataclass
class Seen:
    """How one parameter is seen."""

    tensor: str
    grid: Grid
    owner: torch.nn.Module  # has the scales
    names: tuple[str, ...] = ()  # of scales that do not follow the weights
    on: bool = True
    _kept: dict[Any, torch.Tensor] = field(default_factory=dict)  # where no gradient is wanted, at the weights' version

    def scales(self) -> dict[str, torch.Tensor]:
        """Those that do not follow the weights; none where they do."""
        return {name: getattr(self.owner, PREFIX + name) for name in self.names}

    def points(
        self, weights: torch.Tensor, rows: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The points of `weights`, or of some of its `rows` `[…]`, differentiable in weights and learned scales.

        In the dtype of `weights`, or rounded to `dtype`.
        """
        if rows is not None:
            weights = functional.embedding(rows, weights)
        if not self.on:
            return weights
        scales = self.scales()
        if rows is not None:
            scales = {name: scale if scale.ndim == 1 else scale[rows] for name, scale in scales.items()}
        trained = torch.is_grad_enabled() and any(one.requires_grad for one in (weights, *scales.values()))
        if trained:
            self._kept.clear()
        elif rows is None and self.grid.repeats:
            return self._found_once(weights, scales, dtype)
        learned = {name: scale for name, scale in scales.items() if trained and scale.requires_grad}
        if learned:
            fixed = {name: scale for name, scale in scales.items() if name not in learned}
            return learned_points(self.grid, weights, learned, fixed, dtype)
        return self.grid.fake_quantise(weights, scales or None, dtype)

    def _found_once(
        self, weights: torch.Tensor, scales: dict[str, torch.Tensor], dtype: torch.dtype | None
    ) -> torch.Tensor:
        """The points of a whole tensor, from the last call where neither it nor its scales have changed since.

        Sampling calls once a token. Tensors of inference mode count no versions, and must not meet a gradient later.
        """
        if torch.is_inference_mode_enabled() and any(one.is_inference() for one in (weights, *scales.values())):
            return self.grid.fake_quantise(weights, scales or None, dtype)
        key = (dtype, weights.data_ptr(), *(one._version for one in (weights, *scales.values())))
        if key not in self._kept:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = {key: self.grid.fake_quantise(weights, scales or None, dtype)}
        return self._kept[key]


@torch.compiler.disable(recursive=True)  # type: ignore[untyped-decorator]
def _points(
    seen: Seen, weights: torch.Tensor, rows: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Out of the compiled graph: the grid goes through the weights by chunks that a core's cache holds."""
    return seen.points(weights, rows, dtype)


def _linear(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    seen: Seen = self.seen
    hidden = seen_input(self, hidden)
    kind = hidden.device.type
    # Points leave the cache in the dtype that the product is made in, not to be read and written once more for it.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return functional.linear(hidden, _points(seen, self.weight, None, dtype), self.bias)


def _embedding(self: Any, ids: torch.Tensor) -> torch.Tensor:
    return _points(self.seen, self.weight, ids)


_FORWARDS = {torch.nn.Linear: _linear, torch.nn.Embedding: _embedding}


def seen_weight(module: Any) -> torch.Tensor:
    """The weight of a layer as its forward sees it."""
    weight: torch.Tensor = _points(module.seen, module.weight) if "seen" in module.__dict__ else module.weight
    return weight


def seen_input(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What enters a layer, as its forward sees it: rounded where its grid rounds activations too."""
    seen: Seen | None = module.__dict__.get("seen")
    rounds = seen is not None and seen.on and seen.grid.dynamic_activations
    return fake_quantise_activations(hidden) if rounds else hidden


class _SeenHead:
    """A head for those who multiply with its `weight` themselves, as TRL's trainers do: it has points.

    What they multiply it with is theirs: where its grid rounds activations too, they do not.

    Made anew for each forward pass, in which they are found once.
    """

    def __init__(self, head: Any) -> None:
        self._head = head

    @cached_property
    def weight(self) -> torch.Tensor:
        """As the head's own forward sees it."""
        return seen_weight(self._head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)

    def __call__(self, *args: Any, **keys: Any) -> Any:
        return self._head(*args, **keys)


def _output_embeddings(self: Any) -> Any:
    return _SeenHead(type(self).get_output_embeddings(self))


@dataclass
class OnGrids:
    """The handle of a model on grids; `model.lies_on` is it, until `settle`."""

    model: Any
    plan: Plan
    _seen: dict[str, Seen] = field(default_factory=dict)
    _modules: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Give the layers their forwards; LmdistillError for a tensor that no linear layer or embedding has."""
        parameters = dict(self.model.named_parameters())
        grids = self.plan.placement.on_grids()
        owners = {id(parameters[name]): name for name in grids}
        for module in self.model.modules():
            name = owners.get(id(getattr(module, "weight", None)))
            if name is not None and type(module) in _FORWARDS:
                self._attach(module, name, grids[name])
        if lost := sorted(set(grids) - set(self._seen)):
            raise LmdistillError(
                f"{lost[0]} cannot be trained on grid '{grids[lost[0]].name}'",
                why="only weights of linear layers and embeddings are seen through a grid",
                fix="leave it out with `quantize.keep`",
            )
        self.model.__dict__[HANDLE] = self
        if any(module is self._head() for module in self._modules):
            self.model.get_output_embeddings = types.MethodType(_output_embeddings, self.model)

    def _head(self) -> Any:
        """The module that a causal LM's logits come from; None for other models."""
        return self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None

    def _attach(self, module: Any, name: str, grid: Grid) -> None:
        weight = module.weight
        if name not in self._seen:
            grid.check_width(weight.shape[-1], name)
            scales = self.plan.placement.scales.get(name, {})
            self._seen[name] = Seen(name, grid, module, tuple(scales))
            for scale_name, scale in scales.items():
                learned = self.plan.learned and (grid.learnable is None or scale_name in grid.learnable)
                _keep_scale(module, scale_name, scale.to(weight.device), learned)
        module.seen = self._seen[name]
        module.forward = types.MethodType(_FORWARDS[type(module)], module)
        self._modules.append(module)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model in full precision, for as long as the `with` lasts."""
        for seen in self._seen.values():
            seen.on = False
        try:
            yield
        finally:
            for seen in self._seen.values():
                seen.on = True

    def learned_scales(self) -> list[torch.nn.Parameter]:
        """The scales that are trained."""
        scales = (scale for seen in self._seen.values() for scale in seen.scales().values())
        return [scale for scale in scales if isinstance(scale, torch.nn.Parameter)]

    def settle(self) -> Placement:
        """Write the points into the parameters, take everything else away, and say where they lie."""
        parameters = dict(self.model.named_parameters())
        scales: dict[str, dict[str, torch.Tensor]] = {}
        with torch.no_grad():
            for name, seen in self._seen.items():
                given = seen.grid.stored({key: one.detach() for key, one in seen.scales().items()}) or None
                quantised = seen.grid.settled().quantise(parameters[name], given)
                parameters[name].copy_(seen.grid.dequantise(quantised))
                scales[name] = {key: one.cpu() for key, one in quantised.scales.items()}
            for name, kind in self.plan.placement.grids.items():
                if kind == "f16" and name in parameters:
                    _to_halves(parameters[name])
        for module in self._modules:
            module.__dict__.pop("forward", None)
            del module.seen
        for seen in self._seen.values():
            for name in seen.names:
                delattr(seen.owner, PREFIX + name)
        self.model.__dict__.pop("get_output_embeddings", None)
        del self.model.__dict__[HANDLE]
        return self.plan.placement.with_scales(scales)


def _to_halves(weight: torch.Tensor) -> None:
    """Round to float16, which a file has it in; left as it is where that cannot hold it, for the export to say."""
    halves = weight.half()
    if torch.isfinite(halves).all():
        weight.copy_(halves)


def _keep_scale(module: torch.nn.Module, name: str, scale: torch.Tensor, learned: bool) -> None:
    """As a float32 parameter where it is learned, else as a buffer in the file's dtype."""
    if learned and scale.is_floating_point():
        module.register_parameter(PREFIX + name, torch.nn.Parameter(scale.float()))
    else:
        module.register_buffer(PREFIX + name, scale)


def handle_of(model: Any) -> OnGrids | None:
    """The handle of a model on grids."""
    handle: OnGrids | None = model.__dict__.get(HANDLE)
    return handle


def kept_on_its_grids(model: Any, folder: Any) -> OnGrids | None:
    """Have `model`, loaded from the model folder `folder`, stay on the grids it lies on; None where there are none.

    Its scales stay those of the folder. Raises PreflightError where the weights are of a dtype without room for points.
    """
    placement = Placement.load(folder)
    if placement is None:
        return None
    narrow = [name for name in placement.on_grids() if model.get_parameter(name).dtype != torch.float32]
    if narrow:
        raise PreflightError(
            f"{narrow[0]} is loaded in {str(model.get_parameter(narrow[0]).dtype).removeprefix('torch.')}",
            why=f"the model in {folder} lies on grids, and only float32 holds every point of them",
            fix="load it with `dtype=torch.float32`; `bf16: true` of a trainer still multiplies in bfloat16",
        )
    return OnGrids(model, Plan(placement))
