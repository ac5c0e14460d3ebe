"""What a run leaves beside its artefacts: the recipe as it was resolved, and the machine it ran on."""

from __future__ import annotations

import io
import os
import platform
from pathlib import Path
from typing import Any

from lmdistill import __version__
from lmdistill.pipeline.files import write_json, write_text
from lmdistill.pipeline.keys import tool_versions
from lmdistill.pipeline.plan import Plan
from lmdistill.pipeline.preflight import total_memory

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "safetensors", "gguf", "llama-cpp-python")


def write_lock(plan: Plan) -> None:
    """recipe.lock.yaml: a recipe with every default written out, which plans the same run again."""
    from ruamel.yaml import YAML

    recipe = plan.recipe
    document: dict[str, Any] = {"name": recipe.name}
    if recipe.teacher is not None:
        document["teacher"] = recipe.teacher.model_dump(mode="json", exclude_none=True)
    document["runtime"] = recipe.runtime.model_dump(mode="json")
    document["stages"] = [_entry(step.entry.stage.name, step.name, step.entry) for step in plan.steps]
    notes = [f"# {recipe.file.name} as it was resolved, every default written out; run it like any recipe."]
    if plan.teacher is not None:
        notes.append(f"# teacher: {plan.teacher.fingerprint}")
    notes += [f"# {step.name}: {step.planned.fingerprint}" for step in plan.steps]
    text = io.StringIO()
    yaml = YAML()
    yaml.width = 120
    yaml.dump(document, text)
    write_text(plan.store.root / "recipe.lock.yaml", "\n".join(notes) + "\n" + text.getvalue())


def _entry(stage: str, name: str, entry: Any) -> dict[str, Any]:
    roles = sorted(entry.stage.inputs, key=lambda role: role.many)  # the order in which `from:` is matched
    named = [name for role in roles for name in entry.inputs[role.role]]
    keys = entry.config.model_dump(mode="json", by_alias=True)
    return {"stage": stage, "name": name, **({"from": named} if named else {}), **keys}


def write_environment(plan: Plan) -> None:
    """environment.json: Python, platform, processor, memory, package versions."""
    tools = tuple(dict.fromkeys([*PACKAGES, *(tool for step in plan.steps for tool in step.key["tools"])]))
    about = {
        "lmdistill": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": total_memory(),
        "packages": tool_versions(tools),
    }
    write_json(plan.store.root / "environment.json", about)


def processor() -> str:
    """The processor's model, as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
