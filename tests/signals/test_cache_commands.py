"""`lmdistill cache convert|merge|import` as users meet them: what is printed, exit status, one message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from foreign_data import prepared, save_tokenizer, spoken, write_lines
from signals_synthetic import BigramEngine, capture, write_corpus


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_corpus(folder / "corpus", {"train": BigramEngine().text(1, 6)})
    capture(folder / "corpus", folder / "out", BigramEngine()).run()
    return folder


def lmdistill(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmdistill", "cache", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_convert_and_merge_say_what_they_made(cache, tmp_path):
    """A folder is named as an artefact or as its out; both commands name what is in the new cache."""
    done = lmdistill(tmp_path, "convert", cache, "small", "--variant", "compact", "--k", 4)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("small: train 6 rows, K = 4, compact, ")
    done = lmdistill(tmp_path, "merge", "all", cache, cache / "out")
    assert done.stdout.splitlines()[1].startswith("6 rows come again in their split, 0 are held out in valid: all kept")
    done = lmdistill(tmp_path, "merge", "one", cache, cache / "out", "--deduplicate")
    assert done.stdout.splitlines()[1].endswith("6 left out")
    assert lmdistill(tmp_path, "verify", "one").returncode == 0
    assert "'rows': 6" in lmdistill(tmp_path, "info", "one").stdout


def test_import_says_what_it_made_and_what_nothing_proves(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    write_lines(tmp_path / "data.jsonl", [prepared(*document, prompt=3) for document in spoken(3, [20, 12], 8)])
    done = lmdistill(tmp_path, "import", "data.jsonl", "out", "--format", "axolotl", "--tokenizer", "tokenizer")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("out: train 2 rows, K = 8, mmap, ")
    assert lines[1].endswith("of 26 targets are not among the entries: nothing proves their alignment")
    assert lmdistill(tmp_path, "verify", "out").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "CACHE", "out", "--k", "99"], "error: --k 99: the cache has 8 entries"),
        (["convert", "nowhere", "out"], "error: no teacher cache in nowhere"),
        (["convert", "CACHE", "."], "is there already"),
        (["merge", "out", "CACHE"], "error: merge needs two caches or more"),
        (
            ["import", "x", "out", "--format", "axolotl", "--tokenizer", "none"],
            "error: there is no file or folder none",
        ),
        (["import", "x", "out", "--format", "axlotl", "--tokenizer", "TOKENIZER"], "did you mean 'axolotl'"),
        (["import", "x", "out", "--format", "axolotl", "--tokenizer", "TOKENIZER"], "error: there is no x"),
    ],
)
def test_mistakes_end_with_one_message_and_status_2(cache, tmp_path, arguments, message):
    names = {"CACHE": str(cache), "TOKENIZER": str(save_tokenizer(tmp_path / "tokenizer"))}
    done = lmdistill(tmp_path, *(names.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
