"""report.json and report.html: what they hold, that nothing in them is taken for markup, how they look in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdistill.evaluation.charts import Series, chart, ticks
from lmdistill.evaluation.report import find_evaluations, refresh

LADDER_KEYS = (
    "name role runtime format params file_bytes nll bits_per_byte kl_to_teacher kl_to_parent top1_to_parent"
    " prefill_tps decode_tps peak_rss_bytes"
)
EVIL = "<script>document.title='owned'</script>"
COSTS = ("seconds", "tokens", "peak_rss_bytes", "cached")
STAGES: list[dict[str, Any]] = [
    {"name": "corpus", "fingerprint": "0" * 64, **dict(zip(COSTS, (3.2, 1000, 5 * 10**8, True), strict=True))},
    {"name": "evaluate", "fingerprint": "abcdef123456" + "0" * 52}
    | dict(zip(COSTS, (75.0, None, None, False), strict=True)),
]


def row(name: str, role: str, form: str, parent: str | None, nll: float, size: int) -> dict[str, Any]:
    compared = {"kl_to_teacher": 0.5, "kl_to_parent": 3e-6, "top1_to_parent": 0.98} if parent else {}
    return {
        "name": name,
        "role": role,
        "runtime": "llama.cpp" if role == "file" else "transformers",
        "format": form,
        "parent": parent,
        "params": 1000,
        "fallback_share": 0.25 if form == "q4_0" else None,
        "file_bytes": size,
        "nll": nll,
        "nll_se": 0.05,
        "bits_per_byte": 1.2,
        "nll_gap": nll - 3.0,
        "nll_gap_se": 0.01,
        **dict.fromkeys(("kl_to_teacher", "kl_to_parent", "top1_to_parent")),
        **compared,
    }


def spread(value: float) -> dict[str, float]:
    return {"median": value, "min": 0.9 * value, "max": 1.1 * value, "q1": 0.95 * value, "q3": 1.05 * value}


def evaluation(student: str = "distill") -> dict[str, Any]:
    ladder = [
        row("teacher", "teacher", "float32", None, 3.0, 4000),
        row("teacher_files/q4_0", "file", "q4_0", "teacher", 3.1, 800),
        row(student, "student", "float32", "teacher", 3.5, 3000),
        row("export/q4_0", "file", "q4_0", student, 3.6, 600),
        row("ce", "baseline", "float32", "teacher", 3.7, 3000),
    ]
    timed = {
        "teacher_files/q4_0": {"prefill_tps": spread(500), "decode_tps": spread(100), "peak_rss_bytes": 3 * 10**8},
        "export/q4_0": {"prefill_tps": spread(1000), "decode_tps": spread(150), "peak_rss_bytes": 2 * 10**8},
    }
    statistics = {"tokens": 900, "bytes_per_token": 104, "head_mass": 0.8, "teacher_nll": 3.0}
    statistics |= {"observed_in_top_k": 0.7, "kl_mean": 4e-5, "kl_p99": 9e-5}
    return {
        "format": 1,
        "name": "evaluate",
        "suite": "default",
        "quality": {
            **{"split": "valid", "rows": 4, "sequence_length": 8, "predictions": 28, "bytes": 90, "ladder": ladder},
            "pairs": [{"student": student, "baseline": "ce", "nll": -0.2, "nll_se": 0.01, "differs": []}],
        },
        "speed": {"threads": 2, "prefill": 512, "decode": 128, "repeats": 5, "rows": timed},
        "gates": [
            {"gate": f"{student} nll ≤ ce nll", "measured": 3.5, "limit": 3.7, "passed": True, "quartiles": None},
            {"gate": "export/q4_0 prefill_tps ≥ 9", "measured": None, "limit": 9.0, "passed": False, "quartiles": None},
        ],
        "curves": [{"name": student, "points": [{"step": s, "tokens": 64 * s, "loss": 4.0 / s} for s in (1, 2, 3)]}],
        "signals": {
            **{"bytes_per_token": 104, "k": 32, "head_mass": 0.8, "teacher_nll": 3.0, "folder": "02-teach-123"},
            "statistics": {"train": statistics},
        },
        "environment": {
            "date": "2026-01-01T00:00:00+00:00",
            "hardware": {"processor": "CPU", "cores": 2, "threads": 2, "memory_bytes": 8e9, "system": "Linux"},
            "versions": {"python": "3.11"},
        },
    }


def write_run(folder: Path, contents: dict[str, Any], fingerprint: str = "abcdef123456") -> Path:
    out = folder / f"02-evaluate-{fingerprint}" / "out"
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(contents))
    return folder


def test_report_json_has_exactly_the_promised_figures(tmp_path: Path) -> None:
    refresh(write_run(tmp_path, evaluation()), STAGES)
    report = json.loads((tmp_path / "report.json").read_text())
    for entry in report["ladder"]:
        assert set(LADDER_KEYS.split()) <= set(entry)
    assert {entry["role"] for entry in report["ladder"]} == {"teacher", "file", "student", "baseline"}
    assert report["ladder"][3]["prefill_tps"] == 1000 and report["ladder"][3]["spreads"]["decode_tps"] == spread(150)
    assert report["ladder"][0]["decode_tps"] is None
    assert report["stages"] == STAGES
    assert {"bytes_per_token", "k", "head_mass", "teacher_nll"} <= set(report["signals"])


def test_the_report_is_that_of_this_run(tmp_path: Path) -> None:
    """The stages' fingerprints choose; another run's evaluation is never shown with this run's stages."""
    write_run(tmp_path, evaluation("other"), "9" * 12)
    assert find_evaluations(tmp_path, STAGES) == []
    assert refresh(tmp_path, STAGES) == []
    assert not (tmp_path / "report.json").exists()
    write_run(tmp_path, evaluation("mine"))
    refresh(tmp_path, STAGES)
    assert "mine" in (tmp_path / "report.html").read_text()
    assert refresh(tmp_path, STAGES[:1]) == []
    assert "mine" in (tmp_path / "report.html").read_text()


def test_broken_gates_of_every_evaluation_come_back(tmp_path: Path) -> None:
    contents = evaluation()
    kept, broken = contents["gates"]
    assert (kept["passed"], broken["passed"]) == (True, False)
    write_run(write_run(tmp_path, contents), contents, "9" * 12)
    failed = refresh(tmp_path, [*STAGES, {**STAGES[1], "fingerprint": "9" * 64}])
    assert [result.to_json() for result in failed] == [broken, broken]
    assert "✗ broken" in (tmp_path / "report.html").read_text()


def test_names_are_never_markup(tmp_path: Path) -> None:
    contents = evaluation(EVIL)
    contents["environment"]["hardware"]["processor"] = EVIL
    refresh(write_run(tmp_path, contents), [{**STAGES[1], "name": EVIL}])
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page.lower()
    assert page.count("&lt;script&gt;") >= 6  # headline, ladder, gate, legends, tooltips, stage


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    refresh(write_run(tmp_path, evaluation()), STAGES)
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:,)""", page)
    assert "http" not in page and "url(" not in page and "@import" not in page


def test_what_a_teacher_in_few_bits_lost_is_in_the_report(tmp_path: Path) -> None:
    proof = {"nll": 3.5, "nll_whole": 3.25, "nll_cost": 0.25, "rows": 2}
    contents = evaluation()
    for had in ({}, {"proof": None}, {"proof": {"rows": 2}}, {"proof": proof}):
        refresh(write_run(tmp_path, contents | {"signals": contents["signals"] | had}), STAGES)
        page = (tmp_path / "report.html").read_text()
        assert ("a cost of 0.2500 nats a token" in page) == (had == {"proof": proof})


@pytest.mark.parametrize("missing", ["signals", "speed", "student", "curves", "gates"])
def test_a_recipe_may_lack_parts(tmp_path: Path, missing: str) -> None:
    contents = evaluation()
    if missing == "speed":
        contents["speed"]["rows"] = {}
    elif missing == "student":
        contents["quality"]["ladder"] = contents["quality"]["ladder"][:2]
    else:
        contents[missing] = None if missing == "signals" else []
    refresh(write_run(tmp_path, contents), [{**stage, "seconds": None} for stage in STAGES])
    assert "teacher_files/q4_0" in (tmp_path / "report.html").read_text()


def test_refreshing_is_light(tmp_path: Path) -> None:
    """A run in which all is cached writes the report too: without any heavy import."""
    write_run(tmp_path, evaluation())
    code = (
        "import sys; from pathlib import Path; from lmdistill.evaluation.report import refresh;"
        f"refresh(Path(sys.argv[1]), {STAGES!r});"
        "print([name for name in ('torch', 'transformers', 'numpy', 'llama_cpp', 'gguf') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert (tmp_path / "report.html").exists()


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e6))
def test_ticks_are_few_and_inside(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert len(found) <= 7
    assert all(low - 1e-6 * span <= value <= low + span * (1 + 1e-6) for value in found)


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 20)), max_size=20))
def test_points_stay_on_the_chart(points: list[tuple[float, float]]) -> None:
    """Every point is drawn inside the frame; no point, no chart."""
    drawn = chart([Series("a", points, ["x"] * len(points))], "x", "y", lines=False)
    places = re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', drawn)
    assert len(places) == len(points)
    assert all(56 <= float(x) <= 542 and 14 <= float(y) <= 274 for x, y in places)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, with its network and console logs."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver on this machine (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=Service(driver))
    yield session
    session.quit()


@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(browser: Any, tmp_path: Path, width: int) -> None:
    """The page as it opens: all rows there, no script of a name run, no request, no error, no sideways scrolling."""
    refresh(write_run(tmp_path, evaluation(EVIL)), STAGES)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get((tmp_path / "report.html").as_uri())

    def count(selector: str) -> int:
        return int(browser.execute_script("return document.querySelectorAll(arguments[0]).length", selector))

    assert "owned" not in browser.title
    assert count("#ladder tbody tr") == 5 and count("#gates tbody tr") == 2 and count("#stages tbody tr") == 2
    assert count("#signals tbody tr") == 1 and count("svg circle") == 2 and count("svg polyline") == 1
    shown = browser.execute_script("return document.body.innerText")
    assert "2.00×" in shown and "1.50×" in shown and "−0.200" in shown and "1 of 2" in shown
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert sum(url.startswith("file:") for url in asked) == 1
