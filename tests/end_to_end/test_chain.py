"""The whole chain through the command line: it runs, it is cached, it reports, and its manifests are true."""

from __future__ import annotations

import json
import resource

from chain import STAGES, Chain

from lmdistill.pipeline.files import sha256_file

CACHED_SECONDS = 1.5  # of processor time, all processes together
LADDER = {
    "teacher": "teacher",
    "student": "student",
    "distill": "student",
    "ce": "baseline",
    "files/f32": "file",
    "files/f16": "file",
    "files/q8_0": "file",
    "files/q4_0": "file",
    "teacher_files/q4_0": "file",
}
LADDER_KEYS = (
    "name role runtime format params file_bytes nll bits_per_byte kl_to_teacher kl_to_parent top1_to_parent"
    " prefill_tps decode_tps peak_rss_bytes"
)


def test_again_all_is_cached_and_quick(finished: Chain) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = finished.succeed()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert [line.split(": ")[1].split()[0] for line in shown.splitlines() if line.startswith("[")] == ["cached"] * 8
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime <= CACHED_SECONDS
    stages = json.loads((finished.run_dir / "report.json").read_text())["stages"]
    assert all(stage["cached"] and stage["seconds"] > 0 for stage in stages)


def test_every_manifest_is_true(finished: Chain) -> None:
    """Each file of each artefact is listed with its size and sha256, and nothing else is."""
    for name in STAGES:
        folder = finished.artefact(name)
        listed = json.loads((folder / "manifest.json").read_text())["files"]
        there = {path.relative_to(folder / "out").as_posix(): path for path in (folder / "out").rglob("*")}
        files = {place: path for place, path in there.items() if path.is_file()}
        assert listed == {
            place: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for place, path in files.items()
        }
        assert files


def test_the_report_has_what_is_promised(finished: Chain) -> None:
    report = json.loads((finished.run_dir / "report.json").read_text())
    assert {row["name"]: row["role"] for row in report["ladder"]} == LADDER
    for row in report["ladder"]:
        assert set(LADDER_KEYS.split()) <= set(row)
        assert 0 < row["nll"] < 20 and row["params"] > 0 and row["file_bytes"] > 0
        timed = row["role"] == "file"
        assert all((row[figure] is not None) == timed for figure in ("prefill_tps", "decode_tps", "peak_rss_bytes"))
    assert [stage["name"] for stage in report["stages"]] == list(STAGES)
    for stage in report["stages"]:
        assert set(stage) == {"name", "fingerprint", "seconds", "tokens", "peak_rss_bytes", "cached"}
        assert 50e6 < stage["peak_rss_bytes"] < 8e9
        assert finished.artefact(stage["name"]).name.endswith(stage["fingerprint"][:12])
    assert {"bytes_per_token", "k", "head_mass", "teacher_nll"} <= set(report["signals"])
    assert report["signals"]["k"] == 16
    page = (finished.run_dir / "report.html").read_text()
    assert all(name in page for name in LADDER)


def test_files_compute_what_the_checkpoint_computes(finished: Chain) -> None:
    rows = {row["name"]: row for row in json.loads((finished.run_dir / "report.json").read_text())["ladder"]}
    assert rows["files/f32"]["kl_to_parent"] < 1e-6
    assert rows["files/f16"]["kl_to_parent"] < 2e-5
    assert rows["files/f16"]["top1_to_parent"] >= 0.99
    assert abs(rows["files/f32"]["nll"] - rows["distill"]["nll"]) < 1e-4
