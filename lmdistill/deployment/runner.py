"""What the small programs in `export/` share: presets, a conversation in the terminal, and errors without traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmdistill.errors import LmdistillError, nearest

Message = dict[str, str]
PresetT = TypeVar("PresetT", bound=BaseModel)


class Sampling(BaseModel):
    """How a token is chosen: the part of a preset that every runtime has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(ge=0)
    top_k: int = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    min_p: float = Field(ge=0, le=1)
    repeat_penalty: float = Field(gt=0)
    seed: int | None


class Answering(Protocol):
    """A model that answers conversations."""

    def stream(self, messages: list[Message]) -> Iterator[str]:
        """An answer, piece by piece; raises LmdistillError where there is no room for one."""


def load_preset(
    preset: type[PresetT], presets: Path, name: str, changes: Mapping[str, object] | None = None
) -> PresetT:
    """A preset by its name in the folder `presets` or by path (`.yaml`), with `changes` laid over it.

    Raises LmdistillError that says what is wrong with it.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    known = {path.stem: path for path in presets.glob("*.yaml")}
    path = known.get(name, Path(name))
    if not path.is_file():
        raise LmdistillError(f"no preset '{name}'{nearest(name, known)}", fix=f"there are {', '.join(sorted(known))}")
    try:
        return preset.model_validate(YAML(typ="safe").load(path.read_text("utf-8")) | dict(changes or {}))
    except YAMLError as error:
        raise LmdistillError(f"{path} is not YAML", why=str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        why = f"{first['msg']}{nearest(key, preset.model_fields) if first['type'] == 'extra_forbidden' else ''}"
        raise LmdistillError(f"{path}: {key}", why=why) from error


def talk(model: Answering, prompt: str | None) -> None:
    """Answer one question, or read questions until the input ends; `/new` forgets, `/quit` leaves."""
    if prompt is not None:
        _answer(model, [{"role": "user", "content": prompt}])
        return
    messages: list[Message] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if question == "/quit":
            return
        if question == "/new":
            messages = []
        elif question:
            try:
                asked = [*messages, {"role": "user", "content": question}]
                messages = [*asked, {"role": "assistant", "content": _answer(model, asked)}]
            except LmdistillError as error:  # the conversation is as it was
                print(f"{error.render()}\n  or:  /new")


def _answer(model: Answering, messages: list[Message]) -> str:
    """Print an answer as it comes and return it."""
    pieces = []
    for piece in model.stream(messages):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def run(main: Callable[[], None]) -> None:
    """Run a script; what the user can mend is one message and exit status 2."""
    try:
        main()
    except LmdistillError as error:
        print(error.render(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
