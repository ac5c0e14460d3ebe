"""Which contents an artefact was made from: one key may give other bytes, where its stage measures.

Beside a folder's key lies made_from.json: the fingerprint of each input with the digest of the bytes it had. A result
made from other bytes than its inputs have now is no result, and neither is half of one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from lmdistill.pipeline.files import write_json
from lmdistill.pipeline.keys import canonical
from lmdistill.pipeline.stage import Artefact

FILE = "made_from.json"

Contents = dict[str, str]  # fingerprint → digest of what the manifest lists


def contents(inputs: Iterable[Artefact]) -> Contents:
    """What inputs hold now."""
    return {one.fingerprint: hashlib.sha256(canonical(one.manifest["files"]).encode()).hexdigest() for one in inputs}


def keep(folder: Path, made_from: Contents) -> None:
    """Write down what a folder is being made from."""
    write_json(folder / FILE, made_from)


def others(folder: Path, now: Contents) -> list[str]:
    """The fingerprints of inputs that had other bytes when `folder` was made; none where that was not kept."""
    try:
        before: Contents = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError:
        return list(now)
    return [name for name, digest in now.items() if before.get(name, digest) != digest]
