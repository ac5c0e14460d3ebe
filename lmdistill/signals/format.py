"""The teacher cache on disk: constants, the layout, the manifest. What a shard's bytes are says its variant.

Axes: T tokens in a row, K entries of a token. See docs/signals.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmdistill.errors import IntegrityError
from lmdistill.signals.codec import Companding
from lmdistill.signals.hidden import HiddenLayout
from lmdistill.signals.sampling import Sampling

FORMAT_VERSION = 1
DEFAULT_VARIANT = "mmap"
MANIFEST_FILE = "signals.json"
NARROW_VOCABULARY = 65_536  # ids below this fit u16; larger vocabularies get a u8 high plane


def shard_name(split: str, index: int) -> str:
    """File name of a split's shard; its record is beside it with the suffix `.json`."""
    return f"{split}-{index:05d}.sig"


def record_name(shard_file: str) -> str:
    """File name of a shard's record."""
    return Path(shard_file).with_suffix(".json").name


def canonical_json(fields: Any) -> str:
    """JSON with one spelling only, so that equal contents are equal bytes."""
    return json.dumps(fields, indent=1, sort_keys=True, allow_nan=False) + "\n"


def sha256_of(data: bytes) -> str:
    """Hex sha256."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class MemberInfo:
    """One teacher of an ensemble, and its share in the mean of their probabilities."""

    source: str
    digest: str
    precision: str
    weight: float


@dataclass(frozen=True)
class TeacherInfo:
    """Who spoke: the teacher, its precision and the engine that ran it."""

    source: str
    digest: str
    precision: str
    engine: str
    engine_version: str
    members: tuple[MemberInfo, ...] = ()  # of an ensemble, the recipe's teacher first

    @property
    def fields(self) -> dict[str, Any]:
        """For the manifest: no word of members where one teacher spoke."""
        return {name: value for name, value in asdict(self).items() if value or name != "members"}


@dataclass(frozen=True)
class Layout:
    """All that fixes how rows are stored: T, K, the real vocabulary, the gap code."""

    row_tokens: int
    k: int
    vocab_size: int
    variant: str = DEFAULT_VARIANT
    companding: Companding = field(default_factory=Companding)
    top_p: float | None = None  # keep as few entries as hold this mass, at least k_min, at most k; None: always k
    k_min: int | None = None
    cut_from: int | None = None  # the K at which rows were coded, where entries have been dropped since
    open_next: bool | None = None  # True: `lp_next` may be NaN anywhere, as the source did not tell it
    hidden: HiddenLayout | None = None  # hidden states beside the shards
    sampling: Sampling | None = None  # the entries are drawn, not the top K; K is the number of draws

    @property
    def variable(self) -> bool:
        """Whether the number of entries varies from token to token."""
        return self.top_p is not None or self.sampling is not None

    @property
    def fields(self) -> dict[str, Any]:
        """For the manifest: what is not set is left out, so that older caches keep their spelling."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def beside(self) -> int:
        """Bytes of a token's hidden states, in a file of their own."""
        return 0 if self.hidden is None else self.hidden.bytes_per_token

    @property
    def wide(self) -> bool:
        """Whether ids need the u8 high plane."""
        return self.vocab_size > NARROW_VOCABULARY


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard; `record_sha256` is that of the `.json` beside it."""

    file: str
    first_row: int
    rows: int
    bytes: int
    sha256: str
    record_sha256: str


def bytes_per_token(layout: Layout, shards: Sequence[ShardEntry]) -> float | int | None:
    """Mean bytes of a token in the given shards, their records not counted; None where there are no tokens."""
    size, tokens = sum(shard.bytes for shard in shards), sum(shard.rows for shard in shards) * layout.row_tokens
    if not tokens:
        return None
    return size / tokens if size % tokens else size // tokens


@dataclass(frozen=True)
class SplitEntry:
    """What the manifest says of one split."""

    rows: int
    corpus_digest: str  # of the corpus split's tokens and flags
    shards: tuple[ShardEntry, ...]
    statistics: dict[str, float | int | None]


@dataclass(frozen=True)
class ImportInfo:
    """Another program's data that became a cache, and what they did not tell."""

    format: str
    source: str
    source_digest: str
    tail_floor: float  # the least that is left to the rest of the vocabulary: its mass is 1 − Σ of the entries'
    alignment: str  # next: a source's row predicts the token after it; same: the token it stands at
    temperature: float  # that was undone
    renormalised: bool  # the entries were scaled to hold all but the floor
    next_unknown: int  # targets that are not among the entries, so that nothing proves their alignment


@dataclass(frozen=True)
class Manifest:
    """signals.json: everything a reader needs to refuse what does not belong to it."""

    layout: Layout
    shard_rows: int  # of every shard but a split's last; 0: they differ
    packing: str
    tokenizer_digest: str
    chat_template_digest: str | None
    teacher: TeacherInfo
    splits: dict[str, SplitEntry]
    imported: tuple[ImportInfo, ...] = ()  # where the predictions came from, if not from an engine of ours

    def to_json(self) -> str:
        """The text of signals.json; its `digest` covers all the rest."""
        body = {"format": FORMAT_VERSION, **asdict(self), "layout": self.layout.fields, "teacher": self.teacher.fields}
        if not self.imported:  # older caches keep their spelling
            del body["imported"]
        return canonical_json({**body, "digest": sha256_of(canonical_json(body).encode())})

    @property
    def digest(self) -> str:
        """sha256 of the manifest's contents, and so of all shards': the identity of the cache."""
        digest: str = json.loads(self.to_json())["digest"]
        return digest

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse signals.json; raises IntegrityError for another version or variant, or a changed byte."""
        from lmdistill.signals import variant as variants  # which needs Layout

        try:
            fields = json.loads(text)
            version, variant = fields.pop("format"), fields["layout"]["variant"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(f"it does not parse: {error!r}") from error
        if version != FORMAT_VERSION or variant not in variants.names():
            raise IntegrityError(
                f"{MANIFEST_FILE} is of format {version}, variant '{variant}'",
                why=f"this lmdistill reads format {FORMAT_VERSION}, variants {', '.join(variants.names())}",
                fix="use the lmdistill that wrote it, or run the teach stage again",
            )
        try:
            manifest = cls._from_fields(fields)
            spelling = manifest.to_json()  # ValueError for a number that only a damaged exponent makes infinite
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(f"a field is missing or unknown: {error!r}") from error
        if spelling != text:
            raise _damaged("its digest does not fit its contents")
        return manifest

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Manifest:
        del fields["digest"]
        fields["layout"]["companding"] = Companding(**fields["layout"]["companding"])
        if "hidden" in fields["layout"]:
            hidden = fields["layout"].pop("hidden")
            fields["layout"]["hidden"] = HiddenLayout(tuple(hidden.pop("layers")), **hidden)
        if "sampling" in fields["layout"]:
            fields["layout"]["sampling"] = Sampling(**fields["layout"]["sampling"])
        fields["layout"] = Layout(**fields["layout"])
        members = tuple(MemberInfo(**member) for member in fields["teacher"].pop("members", ()))
        fields["teacher"] = TeacherInfo(**fields["teacher"], members=members)
        fields["imported"] = tuple(ImportInfo(**source) for source in fields.get("imported", ()))
        for split in fields["splits"].values():
            split["shards"] = tuple(ShardEntry(**shard) for shard in split["shards"])
        fields["splits"] = {name: SplitEntry(**split) for name, split in fields["splits"].items()}
        return cls(**fields)


DAMAGED_FIX = "run the stage or command that made the cache again"


def _damaged(why: str) -> IntegrityError:
    return IntegrityError(f"{MANIFEST_FILE} is damaged", why=why, fix=DAMAGED_FIX)


def find_folder(folder: Path) -> Path:
    """The folder that holds signals.json: `folder` or its `out/`; raises IntegrityError where neither does."""
    for candidate in (Path(folder), Path(folder) / "out"):
        if (candidate / MANIFEST_FILE).is_file():
            return candidate
    raise IntegrityError(
        f"no teacher cache in {folder}",
        why=f"{MANIFEST_FILE} is missing there and in its out/",
        fix="give the folder of a finished teach stage",
    )


def load_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`; raises IntegrityError where it is missing, damaged or of another version."""
    try:
        return Manifest.from_json((folder / MANIFEST_FILE).read_bytes().decode())
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{folder}: {MANIFEST_FILE} is damaged", why=str(error), fix=DAMAGED_FIX) from error
    except IntegrityError as error:
        raise IntegrityError(f"{folder}: {error.what}", why=error.why, fix=error.fix) from error
