"""Where recipes are: a path, or the name of one that comes with lmdistill (a checkout's `recipes/`, or the wheel's)."""

from __future__ import annotations

from pathlib import Path

from lmdistill.errors import RecipeError, nearest

PACKAGE = Path(__file__).parent.parent


def shipped_folder() -> Path:
    """The folder of the recipes that come with lmdistill."""
    packed = PACKAGE / "_shipped" / "recipes"
    return packed if packed.is_dir() else PACKAGE.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name → file of the recipes that come with lmdistill."""
    return {file.stem: file for file in sorted(shipped_folder().glob("*.yaml"))}


def resolve_recipe(reference: str | Path) -> Path:
    """The file of a recipe given by path or shipped name; RecipeError with the nearest name where there is none."""
    path = Path(reference)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"{path} is a folder", fix="name the recipe's .yaml file")
    shipped = shipped_recipes()
    name = path.stem if path.parent in (Path(), Path("recipes")) else ""
    if name in shipped:
        return shipped[name]
    siblings = [str(file) for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    raise RecipeError(
        f"there is no recipe {reference}{nearest(str(reference), [*shipped, *siblings])}",
        fix=f"give a path, or one of the recipes that come with lmdistill: {', '.join(shipped) or 'none'}",
    )
