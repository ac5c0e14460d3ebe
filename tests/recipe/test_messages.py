"""Every wrong recipe gets one message with file, line, key, what is allowed and the nearest name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lmdistill.errors import RecipeError
from lmdistill.recipe import load_recipe

GATHER = "name: toy\nstages:\n  - stage: gather\n"

CASES = {
    "unknown key": (
        GATHER + "    repaet: 2\n",
        ["toy.yaml:4: stages.gather.repaet: unknown key; did you mean 'repeat'?", "allowed: complain, data, disk"],
    ),
    "unknown nested key": (
        GATHER + "    parts:\n      - wieght: 2\n",
        ["toy.yaml:5: stages.gather.parts.0.wieght: unknown key; did you mean 'weight'? allowed: batch, weight"],
    ),
    "unknown key far from any": (GATHER + "    zzz: 2\n", ["unknown key; allowed: "]),
    "unknown top key": ("techer: x\n" + GATHER, ["toy.yaml:1: techer: unknown key; did you mean 'teacher'?"]),
    "wrong type": (
        GATHER + "    repeat: often\n",
        ["toy.yaml:4: stages.gather.repeat: input should be a valid integer", "given: 'often'"],
    ),
    "out of range": (GATHER + "    repeat: 0\n", ["toy.yaml:4: stages.gather.repeat:", "greater than or equal to 1"]),
    "wrong choice": (
        GATHER + "    mode: uper\n",
        ["toy.yaml:4: stages.gather.mode: 'uper' is not allowed; did you mean 'upper'? allowed: 'upper' or 'lower'"],
    ),
    "source grammar": (
        GATHER + "    data: 'hf:only-a-name'\n",
        ["toy.yaml:4: stages.gather.data", "hf:org/name@revision"],
    ),
    "digest grammar": (GATHER + "    data: {source: a.txt, sha256: abc}\n", ["toy.yaml:4: stages.gather.data.sha256"]),
    "missing stages": ("name: toy\n", ["toy.yaml:1: stages: missing"]),
    "no stages": ("name: toy\nstages: []\n", ["toy.yaml:2: stages: must be a list with at least one stage"]),
    "unknown stage": (
        "name: toy\nstages:\n  - stage: gatter\n",
        ["toy.yaml:3: stages.gatter: unknown stage 'gatter'; did you mean 'gather'? stages: "],
    ),
    "entry without stage": (
        "name: toy\nstages:\n  - text: x\n",
        ["toy.yaml:3: stages[0]: must be a mapping with a `stage:`"],
    ),
    "duplicate name": (
        GATHER + "  - stage: gather\n    text: other\n",
        ["toy.yaml:4: stages.gather: another stage has this name"],
    ),
    "reserved name": (GATHER + "    name: teacher\n", ["toy.yaml:4: stages.teacher:", "reserved"]),
    "bad name": (GATHER + "    name: My Stage\n", ["toy.yaml:4: stages.My Stage:", "may hold only a-z, 0-9, _ and -"]),
    "unknown from": (
        GATHER + "  - stage: learn\n    from: gathr\n",
        ["toy.yaml:5: stages.learn.from: no stage 'gathr'; did you mean 'gather'? earlier stages: gather"],
    ),
    "forward from": (
        GATHER + "  - stage: learn\n    from: late\n  - stage: learn\n    name: late\n",
        ["toy.yaml:5: stages.learn.from: 'late' does not come before 'learn'"],
    ),
    "circular from": (GATHER + "  - stage: learn\n    from: learn\n", ["'learn' does not come before 'learn'"]),
    "from of no fitting kind": (
        GATHER + "  - stage: summary\n  - stage: learn\n    from: summary\n",
        ["toy.yaml:6: stages.learn.from: 'summary' is a report, which no input is left for", "takes: corpus, model"],
    ),
    "input missing": (
        "name: toy\nstages:\n  - stage: learn\n",
        ["toy.yaml:3: stages.learn: needs a corpus (corpus), and no earlier stage makes one"],
    ),
    "from without teacher": (GATHER + "  - stage: learn\n    from: teacher\n", ["add `teacher:` to the recipe"]),
    "teacher missing": (
        GATHER + "  - stage: learn\n    with_teacher: true\n",
        ["toy.yaml:4: stages.learn: needs a teacher"],
    ),
    "wrong teacher": (
        "teacher: {source: a.gguf, sha256: abc}\n" + GATHER + "  - stage: learn\n    with_teacher: true\n",
        ["toy.yaml:1: teacher.sha256"],
    ),
    "unknown interpreter": (
        "runtime:\n  python:\n    gathr: /usr/bin/python3\n" + GATHER,
        ["toy.yaml:3: runtime.python.gathr: no stage has this name; did you mean 'gather'?"],
    ),
    "bad device": ("runtime: {device: gpu}\n" + GATHER, ["toy.yaml:1: runtime.device:"]),
    "extends missing": ("extends: basis.yaml\n", ["toy.yaml:1: extends: there is no recipe basis.yaml"]),
    "extends itself": ("extends: toy.yaml\n", ["toy.yaml:1: extends: goes in a circle: toy.yaml → toy.yaml"]),
    "no yaml": ("name: [toy\nstages: 3\n", ["toy.yaml:2: not valid YAML"]),
    "key twice": (GATHER + "    text: a\n    text: b\n", ["toy.yaml:5: not valid YAML", "duplicate key"]),
    "no mapping": ("- a\n- b\n", ["toy.yaml:1: a recipe is a mapping"]),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_recipe_is_explained(case: str, write: Callable[..., Path]) -> None:
    text, expected = CASES[case]
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text))
    for part in expected:
        assert part in caught.value.render(), caught.value.render()


def test_all_problems_are_said_at_once(write: Callable[..., Path]) -> None:
    text = "nmae: toy\nstages:\n  - stage: gather\n    repaet: 1\n    mode: uper\n"
    text += "  - stage: lern\n  - stage: learn\n    from: x\n"
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text))
    message = caught.value.render()
    assert message.startswith("5 problems in toy.yaml:")
    assert [line.split(":")[1] for line in message.splitlines()[1:]] == ["1", "4", "5", "6", "8"]


def test_a_wrong_teacher_is_not_a_missing_one(write: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(CASES["wrong teacher"][0]))
    assert "stages.learn" not in caught.value.render()


def test_unknown_recipe_names_the_nearest(write: Callable[..., Path]) -> None:
    write()
    with pytest.raises(RecipeError, match=r"there is no recipe tpy.yaml; did you mean 'toy.yaml'\?"):
        load_recipe("tpy.yaml")
