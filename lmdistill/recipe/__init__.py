"""Recipes: what to run, as YAML. `load_recipe` reads, merges, overrides, checks and wires one."""

from lmdistill.recipe.loader import load_recipe
from lmdistill.recipe.schema import Entry, Recipe, RuntimeSection
from lmdistill.recipe.shipped import resolve_recipe, shipped_recipes

__all__ = ["Entry", "Recipe", "RuntimeSection", "load_recipe", "resolve_recipe", "shipped_recipes"]
