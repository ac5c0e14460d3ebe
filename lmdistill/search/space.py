"""The keys of `search.space`, and every shape they allow that can be exported and quantised.

A null width is the teacher's own. What is wrong with a space is said by lmdistill.search.space_problems.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lmdistill.search.candidate import Candidate, Layer, Operator, Problem
from lmdistill.search.placement import spread

Cost = Callable[[Candidate], float]  # seconds a token, by a latency model
Sizes = tuple[Annotated[int, Field(ge=1)], ...]
MOST_SHAPES = 100_000


def _file_name(name: str) -> str:
    """Folders and files of a sub-space are called by its name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"'{name}' cannot name a sub-space: take letters, digits, - and _")
    return name


class BandConfig(BaseModel):
    """A sub-space by what its candidates cost: between two bounds, both within."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: tuple[float, float] | None = Field(default=None, description="of a candidate, in millions: [from, to]")
    decode_ms: tuple[float, float] | None = Field(
        default=None, description="predicted time of a token on the device, in milliseconds: [from, to]"
    )

    @model_validator(mode="after")
    def _bounded(self) -> BandConfig:
        if self.parameters is None and self.decode_ms is None:
            raise ValueError("a sub-space needs `parameters` or `decode_ms`")
        for low, high in filter(None, (self.parameters, self.decode_ms)):
            if low > high:
                raise ValueError(f"[{low}, {high}] is empty: write the smaller number first")
        return self

    def holds(self, candidate: Candidate, cost: Cost | None) -> bool:
        """Whether the candidate is between the bounds; `cost` is needed for `decode_ms`."""
        values = []
        if self.parameters is not None:
            values.append((self.parameters, candidate.parameters / 1e6))
        if self.decode_ms is not None:
            assert cost is not None, "a sub-space by decode_ms needs a latency model"
            values.append((self.decode_ms, cost(candidate) * 1e3))
        return all(low <= value <= high for (low, high), value in values)


class SpaceConfig(BaseModel):
    """Which students may be proposed; all inherit from blocks of one teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        default=None, description="layers: [from, to]; null: from half of the teacher's to all of them"
    )
    operators: tuple[Operator, ...] = Field(
        default=("attention", "conv"), description="what may mix positions: both make an lfm2, attention alone a llama"
    )
    attention_layers: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        default=None, description="how many layers attend: [from, to]; null: any number"
    )
    attention_at: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="the teacher's blocks, from 0, that may keep their attention; null: all"
    )
    kernels: Annotated[tuple[Annotated[int, Field(ge=2, le=16)], ...], Field(min_length=1)] = Field(
        default=(3,), description="taps of the short convolutions"
    )
    hidden_sizes: Annotated[Sizes, Field(min_length=1)] | None = Field(
        default=None, description="widths; null: the teacher's"
    )
    intermediate_sizes: Annotated[Sizes, Field(min_length=1)] | None = Field(
        default=None, description="widths inside the MLP; null: the teacher's"
    )
    kv_heads: Annotated[Sizes, Field(min_length=1)] | None = Field(
        default=None, description="key heads, each with a whole group of query heads; null: the teacher's"
    )
    vocabularies: Annotated[Sizes, Field(min_length=1)] | None = Field(
        default=None, description="tokens kept; null: all of the teacher's"
    )
    sub_spaces: dict[Annotated[str, AfterValidator(_file_name)], BandConfig] = Field(
        default={}, description="sub-spaces by name, each with weights of its own; none: the whole space is one"
    )

    @model_validator(mode="after")
    def _ordered(self) -> SpaceConfig:
        for key in ("depth", "attention_layers"):
            bounds = getattr(self, key)
            if bounds and bounds[0] > bounds[1]:
                raise ValueError(f"{key} [{bounds[0]}, {bounds[1]}] is empty: write the smaller number first")
        if "attention" not in self.operators or len(set(self.operators)) < len(self.operators):
            raise ValueError("operators: [attention, conv], or [attention] for a llama; llama.cpp needs some attention")
        return self

    @property
    def hybrid(self) -> bool:
        """Whether candidates are lfm2 with operators of both kinds."""
        return "conv" in self.operators


@dataclass(frozen=True, order=True)
class Shape:
    """What a candidate costs depends on these alone, not on which blocks it inherits from."""

    depth: int
    attention: int
    hidden_size: int
    intermediate_size: int
    kv_heads: int
    kernel: int
    vocab_size: int


GENES = tuple(field.name for field in fields(Shape))
TEACHERS = {  # the teacher's key for each of ours
    "hidden_sizes": "hidden_size",
    "intermediate_sizes": "intermediate_size",
    "kv_heads": "num_key_value_heads",
    "vocabularies": "vocab_size",
}


class Space:
    """The keys of a space together with its teacher's config.json and the format that will ship."""

    def __init__(self, keys: SpaceConfig, teacher: Mapping[str, Any], format_name: str) -> None:
        self.keys, self.teacher, self.format_name = keys, teacher, format_name
        self.blocks = int(teacher["num_hidden_layers"])
        heads = int(teacher["num_attention_heads"])
        self.head_dim = int(teacher.get("head_dim") or teacher["hidden_size"] // heads)
        self.attention_at = frozenset(range(self.blocks) if keys.attention_at is None else keys.attention_at)

    def choices(self, key: str) -> tuple[int, ...]:
        """The values of a key that lists sizes, ascending."""
        keys = self.keys
        asked: dict[str, Sizes | None] = {
            "hidden_sizes": keys.hidden_sizes,
            "intermediate_sizes": keys.intermediate_sizes,
            "kv_heads": keys.kv_heads,
            "vocabularies": keys.vocabularies,
        }
        return tuple(sorted(set(asked[key] or (self.teacher_size(key),))))

    def teacher_size(self, key: str) -> int:
        """The teacher's own size for a key that lists sizes."""
        name = TEACHERS[key]
        return int(self.teacher.get(name) or self.teacher["num_attention_heads"])

    @property
    def depths(self) -> range:
        """Allowed numbers of layers."""
        low, high = self.keys.depth or (-(-self.blocks // 2), self.blocks)
        return range(low, min(high, self.blocks) + 1)

    def attention_numbers(self, depth: int) -> range:
        """Allowed numbers of attention layers of a candidate with `depth` layers."""
        if not self.keys.hybrid:
            return range(depth, depth + 1)
        low, high = self.keys.attention_layers or (1, depth)
        return range(low, min(high, depth - 1, len(self.attention_at)) + 1)

    def products(self) -> Iterator[tuple[int, ...]]:
        """Every combination of widths: hidden, intermediate, key heads, kernel, vocabulary."""
        sizes = [self.choices(key) for key in TEACHERS]
        kernels = sorted(set(self.keys.kernels)) if self.keys.hybrid else [self.keys.kernels[0]]
        hidden, intermediate, kv_heads, vocabularies = sizes
        return product(hidden, intermediate, kv_heads, kernels, vocabularies)

    def shapes(self) -> list[Shape]:
        """Every shape that can be exported, ascending; empty where none can."""
        found = []
        for widths in self.products():
            depths = [depth for depth in self.depths if self.attention_numbers(depth)]
            if not depths or self.problems_of(Shape(depths[0], self.attention_numbers(depths[0])[0], *widths)):
                continue
            found += [Shape(depth, number, *widths) for depth in depths for number in self.attention_numbers(depth)]
        return sorted(found)

    def count(self) -> int:
        """How many shapes there would be, were all widths possible."""
        return sum(1 for _ in self.products()) * sum(len(self.attention_numbers(depth)) for depth in self.depths)

    def problems_of(self, shape: Shape) -> list[Problem]:
        """What keeps a shape from shipping."""
        return self.evenly(shape).problems(self.format_name)

    def evenly(self, shape: Shape) -> Candidate:
        """The candidate of a shape whose blocks, and attention, are evenly spread over the teacher's."""
        return self.build(shape, spread(shape.depth, shape.attention, self.blocks, self.attention_at))

    def build(self, shape: Shape, placement: Mapping[int, Operator]) -> Candidate:
        """The candidate of a shape whose layers inherit from the blocks in `placement`."""
        return Candidate(
            architecture="lfm2" if self.keys.hybrid else "llama",
            layers=tuple(Layer(source, placement[source]) for source in sorted(placement)),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            heads=max(1, shape.hidden_size // self.head_dim),
            kv_heads=shape.kv_heads,
            head_dim=self.head_dim,
            kernel=shape.kernel,
            vocab_size=shape.vocab_size,
        )


def shape_of(candidate: Candidate) -> Shape:
    """A candidate without its placement."""
    return Shape(
        candidate.depth,
        candidate.attention_layers,
        candidate.hidden_size,
        candidate.intermediate_size,
        candidate.kv_heads,
        candidate.kernel,
        candidate.vocab_size,
    )
