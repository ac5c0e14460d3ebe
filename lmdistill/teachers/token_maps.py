"""Whether two tokenizers mean the same by the same ids: maps are compared, not names or vocabulary sizes."""

from __future__ import annotations

from pathlib import Path

from lmdistill.errors import AssetError, PreflightError

SHOWN = 8  # conflicts that a message lists


def token_map(folder: Path) -> dict[int, str]:
    """Every id of the tokenizer in `folder`, with its token; raises AssetError where there is no tokenizer.json."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise AssetError(f"no tokenizer in {folder}", why="tokenizer.json is missing")
    return {number: token for token, number in Tokenizer.from_file(str(path)).get_vocab().items()}


def real_vocabulary(tokens: dict[int, str]) -> int:
    """The highest id plus one: rows of a model above it are padding."""
    return max(tokens) + 1


RETOKENISE = "tokenise the corpus with the teacher's tokenizer: drop the corpus stage's `tokenizer`"


def check_same_tokens(
    ours: dict[int, str], theirs: dict[int, str], our_name: str, their_name: str, fix: str = RETOKENISE
) -> None:
    """Raise PreflightError listing ids that stand for different tokens in two maps."""
    conflicts = [number for number in sorted({*ours, *theirs}) if ours.get(number) != theirs.get(number)]
    if not conflicts:
        return
    listed = ", ".join(f"{i}: {ours.get(i)!r} / {theirs.get(i)!r}" for i in conflicts[:SHOWN])
    raise PreflightError(
        f"{our_name} and {their_name} have different token maps: {len(conflicts)} ids differ",
        why=listed + (", …" if len(conflicts) > SHOWN else ""),
        fix=fix,
    )
