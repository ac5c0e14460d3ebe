"""Whatever is wrong, from a mistyped key to a flipped byte: one message with what to do, status 2, nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chain import Chain, digests
from spoil import flip_byte, of_another_tokenizer, shift_tokens, swap_tokens

Upto = Callable[..., Chain]
READY = ("corpus", "teach", "student")
COMMAND = ("--until", "distill")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    k: 16", "    k: 16\n    colour: blue", "chain.yaml:14: stages.teach.colour: unknown key; allowed: "),
        ("    shard_rows: 4", "    shard_row: 4", "stages.teach.shard_row: unknown key; did you mean 'shard_rows'?"),
        ("  - stage: teach", "  - stage: teech", "unknown stage 'teech'; did you mean 'teach'?"),
        ("runtime: {threads", "runtme: {threads", "runtme: unknown key; did you mean 'runtime'?"),
    ],
    ids=["unknown", "mistyped", "stage", "top"],
)
def test_unknown_and_mistyped_keys(fresh: Chain, old: str, new: str, message: str) -> None:
    fresh.change(old, new)
    assert message in fresh.fail()
    assert not fresh.run_dir.exists()


def test_a_wrong_type(fresh: Chain) -> None:
    fresh.change("    k: 16", "    k: many")
    message = fresh.fail()
    assert "chain.yaml:13: stages.teach.k: " in message
    assert "valid integer" in message and "given: 'many'" in message
    assert not fresh.run_dir.exists()


def test_a_missing_file(fresh: Chain, text: Path) -> None:
    fresh.change(str(text), str(text).replace("passages", "pasages"))
    message = fresh.fail()
    assert "there is no file or folder" in message and "did you mean 'passages.jsonl'?" in message
    assert "do:  correct this path in the recipe" in message
    assert not fresh.run_dir.exists()


def test_a_wrong_sha256(fresh: Chain, text: Path) -> None:
    wrong = "a" * 64
    fresh.change(f"[{text}]", f"[{{source: {text}, sha256: {wrong}}}]")
    message = fresh.fail()
    assert str(text) in message and wrong in message
    assert "do:  " in message
    assert not list(fresh.run_dir.glob("[0-9]*"))


def test_a_student_with_another_token_map(fresh: Chain, teacher: Path, tmp_path: Path) -> None:
    """Its ids are compared before anything runs, and those that differ are listed."""
    other = swap_tokens(teacher, tmp_path / "other", 300, 301)
    fresh.change("    layers: 3\n    attention_layers: 1", f"    init: checkpoint\n    source: {other}")
    message = fresh.fail()
    assert "2 ids differ" in message
    assert re.search(r"300: '(.+)' / '(.+)', 301: '\2' / '\1'", message), message
    assert "do:  " in message
    assert not list(fresh.run_dir.glob("[0-9]*")), "nothing has run"


def test_k_above_the_vocabulary(fresh: Chain) -> None:
    fresh.change("    k: 16", "    k: 50000")
    message = fresh.fail()
    assert message == ("error: k is 50000, the teacher's vocabulary has 49152 tokens\n  do:  set k to 49152 or less\n")
    assert not list(fresh.run_dir.glob("[0-9]*"))


def test_a_cache_of_another_tokenizer(upto: Upto) -> None:
    chain = upto(*READY)
    of_another_tokenizer(chain.artefact("teach"))
    message = chain.fail(*COMMAND)
    assert "was made with another tokenizer than the student" in message
    assert "do:  run corpus and teach again" in message
    assert not list(chain.run_dir.glob("*-distill-*/out/model"))


def test_a_cache_shifted_by_one(upto: Upto) -> None:
    """Every digest is right; only the proof that each log-prob belongs to its token can catch it."""
    chain = upto(*READY)
    shift_tokens(chain.artefact("teach"))
    message = chain.fail(*COMMAND)
    assert "do not belong to its tokens" in message
    assert "shifted by one" in message and "do:  " in message
    assert not list(chain.run_dir.glob("*-distill-*/out/model")), "no step was made on it"


def test_a_flipped_byte_in_a_shard(upto: Upto, finished: Chain) -> None:
    """Found and named; doing what the message says makes that shard anew, and it alone."""
    chain = upto(*READY)
    shard = chain.artefact("teach") / "out" / "train-00003.sig"
    flip_byte(shard, 1000)
    before = {path.name: path.stat().st_mtime_ns for path in shard.parent.glob("*.sig")}
    message = chain.fail(*COMMAND)
    assert message.startswith(f"error: {shard.relative_to(chain.folder)} was changed\n")
    found = re.search(r"do:  delete (\S+) and give the same command", message)
    assert found, message
    (chain.folder / found[1]).unlink()
    shown = chain.succeed("--until", "teach")
    assert "teach: resumed" in shown and "shards were finished before and are kept" in shown
    after = {path.name: path.stat().st_mtime_ns for path in shard.parent.glob("*.sig")}
    assert {name for name in before if before[name] != after[name]} == {shard.name}
    whole = digests(finished.run_dir)
    assert digests(chain.run_dir) == {name: whole[name] for name in digests(chain.run_dir)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_too_little_disk(fresh: Chain, small_disk: Path) -> None:
    message = fresh.fail("--run-dir", str(small_disk / "run"))
    assert re.search(r"too little disk: this run needs [\d.]+ [MG]B and \S+ has [34]\.\d+ MB free", message), message
    assert "the largest part is" in message and "put the run on another disk with --run-dir" in message
    assert not list((small_disk / "run").glob("[0-9]*"))


def test_a_second_pipeline_on_the_same_folder(fresh: Chain) -> None:
    first = subprocess.Popen(**fresh.command("--until", "corpus"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    holder = fresh.run_dir / ".lock.json"
    deadline = time.monotonic() + 60
    pid = None
    while pid is None:
        assert first.poll() is None and time.monotonic() < deadline
        with contextlib.suppress(OSError, ValueError):
            pid = json.loads(holder.read_text())["pid"]
    assert pid == first.pid
    message = fresh.fail("--until", "corpus")
    assert message.startswith("error: another pipeline is working in runs/chain\n")
    assert f"process {pid} on " in message and "do:  wait for it" in message
    assert first.communicate()[1] == "" and first.returncode == 0, "the first one was not disturbed"
    assert fresh.artefact("corpus").is_dir()


def test_a_damaged_artefact_is_never_half_repaired(upto: Upto, finished: Chain) -> None:
    """A file gone from a finished artefact: the stage runs again in its folder and comes out the same."""
    chain = upto("corpus", "teach")
    (chain.artefact("corpus") / "out" / "train.flags.npy").unlink()
    assert "resume" in next(line for line in chain.succeed("--dry-run", *COMMAND).splitlines() if " corpus " in line)
    shown = chain.succeed("--until", "teach")
    assert "[1/8] corpus: resumed" in shown and "[2/8] teach: cached" in shown
    whole = digests(finished.run_dir)
    assert digests(chain.run_dir) == {name: whole[name] for name in digests(chain.run_dir)}
