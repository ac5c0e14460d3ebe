"""Evaluation suites: named defaults for what `evaluate` measures, as YAML files in eval/suites.

A suite is a mapping with `description` and any of the keys of SUITE_KEYS; a key given in the recipe wins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmdistill.errors import nearest

SUITE_KEYS = ("split", "tokens", "metrics", "speed")


def suite_folder() -> Path:
    """eval/suites of a checkout, or the copy that an installed package carries."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "_shipped" / "eval" / "suites"
    return shipped if shipped.is_dir() else package.parent / "eval" / "suites"


def suite_path(name: str) -> Path:
    """The file of a suite given by name or by path (`.yaml`); ValueError names the nearest suite."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"no suite file {path}")
        return path
    known = {path.stem: path for path in suite_folder().glob("*.yaml")}
    if name not in known:
        raise ValueError(f"no suite '{name}'{nearest(name, known)}; there are {', '.join(sorted(known))}")
    return known[name]


def load_suite(name: str) -> dict[str, Any]:
    """The defaults that a suite sets; ValueError where it is not a mapping or has an unknown key."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = suite_path(name)
    try:
        suite = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(suite, dict):
        raise ValueError(f"{path} is not a mapping")
    for key in suite:
        if key not in (*SUITE_KEYS, "description"):
            raise ValueError(f"{path}: no key '{key}'{nearest(str(key), SUITE_KEYS)}; allowed: {', '.join(SUITE_KEYS)}")
    return {key: suite[key] for key in SUITE_KEYS if key in suite}
