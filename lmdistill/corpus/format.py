"""A corpus on disk: constants, the metadata in corpus.json, and the memory-mapped reader.

Axes: R rows, T tokens in a row. Per split: `<split>.tokens.npy` [R, T] u16 (u32 above 65,536 ids),
`<split>.flags.npy` [R, T] u8, `<split>.bytes.npy` [R] u32; beside them `tokenizer/` and `corpus.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import IntegrityError

FORMAT_VERSION = 1

LOSS = 1  # the prediction made here counts: the token at t+1 is a target
DOC_START = 2  # first token of a document
PAD = 4  # padding

TRAIN, VALID, TEST = "train", "valid", "test"
TOKENIZER_FOLDER = "tokenizer"
META_FILE = "corpus.json"
DIGEST_ROWS = 1024  # tokens and flags take turns so often in a split's digest


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The stored dtype of ids below `vocab_size`: u16 where they fit, else u32 (little-endian)."""
    return np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<u4")


def tokens_digest(tokens_RT: NDArray[Any], flags_RT: NDArray[Any]) -> str:
    """sha256 over shape, ids (as u32) and flags of a split's rows [R, T]: what a cache made from it must match."""
    blocks = (slice(start, start + DIGEST_ROWS) for start in range(0, len(tokens_RT), DIGEST_ROWS))
    return digest_of_blocks(tokens_RT.shape, ((tokens_RT[block], flags_RT[block]) for block in blocks))


def digest_of_blocks(shape: tuple[int, ...], blocks: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> str:
    """`tokens_digest` of rows that come DIGEST_ROWS at a time."""
    sha = hashlib.sha256(json.dumps(list(shape)).encode())
    for tokens_RT, flags_RT in blocks:
        sha.update(np.ascontiguousarray(tokens_RT, dtype="<u4").tobytes())
        sha.update(np.ascontiguousarray(flags_RT, dtype="u1").tobytes())
    return sha.hexdigest()


def success_file(folder: Path, split: str = TRAIN) -> Path:
    """Where success rates of a split's rows are, f32 [R], in a corpus whose sources name a field with them."""
    return folder / f"{split}.success.npy"


def document_positions(starts_RT: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Positions that begin at 0 in every document, from marks of first tokens [R, T]."""
    at_RT = np.broadcast_to(np.arange(starts_RT.shape[1]), starts_RT.shape)
    first_RT = np.maximum.accumulate(np.where(starts_RT, at_RT, 0), axis=1)
    return at_RT - first_RT


@dataclass(frozen=True)
class SplitMeta:
    """What corpus.json says of one split."""

    rows: int
    documents: int
    tokens: int  # without padding
    targets: int  # positions with LOSS
    target_bytes: int  # UTF-8 bytes of the targets
    digest: str  # see tokens_digest


@dataclass(frozen=True)
class CorpusMeta:
    """What corpus.json says of the corpus."""

    sequence_length: int
    packing: str  # concat | isolate | single
    vocab_size: int  # real vocabulary: the highest id the tokenizer can give, plus one
    tokenizer_digest: str
    chat_template_digest: str | None
    separator_id: int | None  # token between documents, where there is one
    pad_id: int
    splits: dict[str, SplitMeta]

    def to_json(self) -> str:
        """The text of corpus.json."""
        return json.dumps({"format": FORMAT_VERSION, **asdict(self)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CorpusMeta:
        """Parse corpus.json; raises IntegrityError for another format version."""
        fields = json.loads(text)
        version = fields.pop("format", None)
        if version != FORMAT_VERSION:
            raise IntegrityError(
                f"this corpus has format {version}; this lmdistill reads format {FORMAT_VERSION}",
                fix="run the corpus stage again",
            )
        fields["splits"] = {name: SplitMeta(**split) for name, split in fields["splits"].items()}
        return cls(**fields)


@dataclass(frozen=True)
class CorpusSplit:
    """One split, memory-mapped and read-only."""

    name: str
    tokens_RT: NDArray[Any]  # u16 or u32
    flags_RT: NDArray[np.uint8]
    bytes_R: NDArray[np.uint32]  # UTF-8 bytes of each row's targets

    def __len__(self) -> int:
        """Number of rows R."""
        return int(self.tokens_RT.shape[0])


class CorpusReader:
    """Reads the corpus in `folder` (an artefact's `out`); raises IntegrityError where a file does not fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / META_FILE
        if not path.exists():
            raise IntegrityError(f"no corpus in {self.folder}", why=f"{META_FILE} is missing")
        self.meta = CorpusMeta.from_json(path.read_text())

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with tokenizer.json and the chat template."""
        return self.folder / TOKENIZER_FOLDER

    @cached_property
    def splits(self) -> dict[str, CorpusSplit]:
        """All splits by name."""
        return {name: self._open(name) for name in self.meta.splits}

    def split(self, name: str) -> CorpusSplit:
        """The split `name`; raises IntegrityError where the corpus has none of that name."""
        if name not in self.splits:
            raise IntegrityError(f"the corpus has no split '{name}'", why=f"it has {', '.join(self.splits)}")
        return self.splits[name]

    def digest(self, split: str) -> str:
        """The digest of a split's tokens and flags, as corpus.json records it."""
        self.split(split)
        return self.meta.splits[split].digest

    def verify(self) -> None:
        """Recompute every split's digest and byte total; raises IntegrityError naming the split that differs."""
        for name, split in self.splits.items():
            found = tokens_digest(split.tokens_RT, split.flags_RT)
            total = int(split.bytes_R.sum(dtype=np.int64))
            if found != self.meta.splits[name].digest or total != self.meta.splits[name].target_bytes:
                raise IntegrityError(
                    f"split '{name}' of {self.folder} is not what was written",
                    why=f"digest {found} where {META_FILE} has {self.meta.splits[name].digest}",
                    fix="delete the corpus artefact and run again",
                )

    def _open(self, name: str) -> CorpusSplit:
        arrays = {kind: self._load(name, kind) for kind in ("tokens", "flags", "bytes")}
        rows, length = self.meta.splits[name].rows, self.meta.sequence_length
        shapes = {"tokens": (rows, length), "flags": (rows, length), "bytes": (rows,)}
        for kind, shape in shapes.items():
            if arrays[kind].shape != shape:
                raise IntegrityError(
                    f"{name}.{kind}.npy has shape {arrays[kind].shape}, {META_FILE} says {shape}",
                    fix="delete the corpus artefact and run again",
                )
        return CorpusSplit(name, arrays["tokens"], arrays["flags"], arrays["bytes"])

    def _load(self, name: str, kind: str) -> NDArray[Any]:
        path = self.folder / f"{name}.{kind}.npy"
        try:
            array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise IntegrityError(f"cannot read {path}", why=str(error), fix="run the corpus stage again") from error
        return array
