"""A student that the search may propose: its shape, and which of the teacher's blocks each layer inherits from.

Only what can ship can be said: transformers keeps one intermediate size, one number of key heads and one kernel for
all layers of an Lfm2 or Llama model, so these belong to the candidate; layers differ in source and operator.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, Literal

from lmdistill.errors import IntegrityError

Operator = Literal["attention", "conv"]
ArchitectureName = Literal["lfm2", "llama"]
Problem = tuple[str, str]  # what, what to do

_LAYER_TYPES: dict[Operator, str] = {"attention": "full_attention", "conv": "conv"}
_ROPE_THETA, _CONTEXT = 10_000.0, 8_192  # of a candidate that is only timed or counted


@dataclass(frozen=True, order=True)
class Layer:
    """One layer: the teacher's block (from 0) it inherits from, and what mixes positions in it."""

    source: int
    operator: Operator


@dataclass(frozen=True)
class Candidate:
    """A student's architecture; heads times head_dim is the width of queries together."""

    architecture: ArchitectureName
    layers: tuple[Layer, ...]
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    kernel: int  # taps of every convolution; of no account where all layers attend
    vocab_size: int

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def operators(self) -> tuple[Operator, ...]:
        """The operator of each layer, first to last."""
        return tuple(layer.operator for layer in self.layers)

    @property
    def sources(self) -> tuple[int, ...]:
        """The teacher's block of each layer, first to last."""
        return tuple(layer.source for layer in self.layers)

    @property
    def attention_layers(self) -> int:
        """How many layers attend."""
        return self.operators.count("attention")

    @property
    def parameters(self) -> int:
        """Number of parameters of the model with this config, the tied head counted once."""
        from lmdistill.students import parameters

        return parameters.count(SimpleNamespace(**self.shape_config()))

    @property
    def digest(self) -> str:
        """sha256 of what the candidate is, by which measurements and scores are kept."""
        return _digest(self.to_json())

    @property
    def shape_digest(self) -> str:
        """The same without the layers' sources and order: candidates that share it are equally fast and large."""
        return _digest({**self.to_json(), "layers": sorted(self.operators)})

    def to_json(self) -> dict[str, Any]:
        """The candidate as JSON; layers as [source, operator]."""
        return {**asdict(self), "layers": [[layer.source, layer.operator] for layer in self.layers]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        """What `to_json` wrote; raises IntegrityError for anything else."""
        try:
            layers = tuple(Layer(int(source), _operator(operator)) for source, operator in data["layers"])
            return cls(**{**data, "layers": layers})
        except (TypeError, ValueError, KeyError) as error:
            raise IntegrityError("this is no candidate of a search", why=repr(error)) from error

    def shape_config(self) -> dict[str, Any]:
        """What `lmdistill.deployment.architectures` reads of a config.json, without a teacher."""
        return {
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "layer_types": [_LAYER_TYPES[operator] for operator in self.operators],
            "conv_L_cache": self.kernel,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": True,
            "max_position_embeddings": _CONTEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": _ROPE_THETA},
            "rms_norm_eps": 1e-5,
            "norm_eps": 1e-5,
        }

    def config(self, teacher: Any, norm_eps: float | None = None) -> Any:
        """The transformers config, with the teacher's context, rotary embeddings and special tokens.

        `norm_eps` defaults to the teacher's; an Lfm2 model made by `students.lfm2.from_llama` has a larger one.
        """
        from lmdistill.students.lfm2 import config_like
        from lmdistill.students.shape import llama_config

        like = llama_config(
            teacher,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            layers=self.depth,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
        )
        like.rope_parameters = dict(teacher.rope_parameters)  # its weights have learnt with these
        if norm_eps is not None:
            like.rms_norm_eps = norm_eps
        if self.architecture == "llama":
            return like
        return config_like(like, self.shape_config()["layer_types"], self.kernel, like.rms_norm_eps)

    def problems(self, format_name: str) -> list[Problem]:
        """What keeps it from being exported and quantised to a format, as (what, what to do); empty where nothing."""
        found = _operator_problems(self)
        if self.heads % self.kv_heads:
            found.append(
                (f"{self.heads} query heads are not whole groups of {self.kv_heads} key heads", "let kv_heads divide")
            )
        if self.head_dim % 2:
            found.append((f"heads of width {self.head_dim} have no rotary pairs", "make head_dim even"))
        if self.architecture == "lfm2" and self.heads * self.head_dim != self.hidden_size:
            found.append(
                (
                    f"lfm2 heads fill the width; {self.heads} × {self.head_dim} is not {self.hidden_size}",
                    "make hidden_size a multiple of head_dim",
                )
            )
        if any(a >= b for a, b in zip(self.sources, self.sources[1:], strict=False)):
            found.append(("the teacher's blocks are not in their order, or one is there twice", "sort them"))
        return found + _block_problems(self, format_name)


def of_unlike_shapes(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The first candidate of every shape, in order."""
    first: dict[str, Candidate] = {}
    for candidate in candidates:
        first.setdefault(candidate.shape_digest, candidate)
    return list(first.values())


def _operator(name: str) -> Operator:
    if name not in _LAYER_TYPES:
        raise ValueError(f"no operator '{name}'")
    return "attention" if name == "attention" else "conv"


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _operator_problems(candidate: Candidate) -> list[Problem]:
    """An lfm2 has both operators in llama.cpp; a llama attends throughout."""
    attention = candidate.attention_layers
    if candidate.architecture == "llama" and attention < candidate.depth:
        return [("a llama candidate convolves in some layers", "take lfm2 for a hybrid")]
    if candidate.architecture == "lfm2" and attention in (0, candidate.depth):
        return [
            (
                f"an lfm2 candidate attends in {attention} of {candidate.depth} layers",
                "llama.cpp's lfm2 needs layers of both kinds",
            )
        ]
    return []


def _block_problems(candidate: Candidate, format_name: str) -> list[Problem]:
    """Rows of matrices in whole blocks of the format; the head may take llama.cpp's larger type."""
    from lmdistill.deployment.formats import FORMATS

    block = FORMATS[format_name].block
    rows = {
        "hidden_size": candidate.hidden_size,
        "intermediate_size": candidate.intermediate_size,
        "heads × head_dim": candidate.heads * candidate.head_dim,
    }
    return [
        (f"{name} {size} is not whole blocks of {format_name}", f"make it a multiple of {block}")
        for name, size in rows.items()
        if size % block
    ]
