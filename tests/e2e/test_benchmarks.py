"""Every benchmark, in its short form: it runs, and what it claims beside the timings holds."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.study.lines import Lines
from benchmarks.study.plan import PARTS, Study, plan
from tests.api.support import postgres_refusal
from uora.spec import METHODS
from worker.up import ROOT

pytestmark = [pytest.mark.smollm2, pytest.mark.timeout(600)]


def smoke(name: str) -> dict[str, Any]:
    """The benchmark's last line."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_five_methods_in_one_batch() -> None:
    result = smoke("methods")
    assert result["mixed_equals_alone"] is True
    assert result["answers"] == len(METHODS) + 1
    assert result["methods"].keys() == set(METHODS)
    assert all(item["last_loss"] < item["first_loss"] for item in result["methods"].values())


def test_a_training_step_against_stock_peft() -> None:
    """All contestants train the same tokens, or the benchmark fails."""
    result = smoke("training")
    ratios = ("uora64_vs_lora8", "uora256_vs_vera256", "uora64_vs_vera64", "uora64_vs_floor", "memory_vs_lora8")
    assert all(result[name] > 0 for name in ratios)
    assert result["tokens_per_step"] > 100


def test_jobs_together_and_one_after_the_other() -> None:
    result = smoke("cotraining")
    assert result["jobs"] == 3
    assert result["cotrain_speedup"] == pytest.approx(
        result["jobs_per_hour_together"] / result["jobs_per_hour_alone"], rel=0.01
    )


def test_starts_of_jobs() -> None:
    result = smoke("starting")  # which fails if one of its jobs does
    assert result.keys() == {"cold_seconds", "warm_seconds", "cores"}
    assert all(value > 0 for value in result.values())


def test_costs_are_measured_and_foretold() -> None:
    result = smoke("scaling")
    assert result["measurements"] == 3
    assert result["machine"]
    assert min(result["median_error"], result["max_error"], result["memory_median_error"]) >= 0


def test_the_study_of_quality() -> None:
    """Every row of the study is run, and its report is whole."""
    result = smoke("quality")
    planned = plan(Study.smoke(), Lines())
    finals = [run for run in planned.runs if run.purpose == "test"]
    made = sum(count for part, count in result["runs"].items() if part.endswith(" test"))
    assert made == len(finals) + planned.waiting
    assert result["runs"].keys() == {*(f"{part} test" for part in PARTS), "glue tune", "targets tune", "glue head"}
    assert {"docs/results.md", "docs/choosing.md", "docs/images/playground.svg"} <= set(result["pages"])


def test_serving() -> None:
    """Ours and the peers answer the same prompts, and every adapter takes what its vectors take."""
    result = smoke("serving")
    numbers = 2 * 2 * (2 * 64) + 2 * (48 + 24)  # d and the target frames' share; b, of q and v in both layers
    assert result["bytes_10000"] == 10_000 * numbers * {"bfloat16": 2, "float32": 4}[result["dtype"]]
    assert result["vs_peft_mixed_lora"] > 0
    assert result["batch1_latency_vs_generate"] > 0


@pytest.mark.postgres
def test_residency() -> None:
    """The engine's parts follow a real database, or the benchmark ends with an error."""
    refusal = postgres_refusal()
    if refusal is not None:
        pytest.skip(refusal)
    result = smoke("residency")
    assert result["rows"] == 300
    assert result["resident_bytes"] == 300 * {"bfloat16": 61_440, "float32": 122_880}[result["dtype"]]
    times = ("load_seconds", "commit_to_resident_p50_ms", "commit_to_resident_p95_ms", "deletion_p95_ms", "poll_ms")
    assert all(result[name] > 0 for name in times)


@pytest.mark.postgres
def test_the_api_beside_a_constant_answer() -> None:
    result = smoke("api")  # which fails if any answer is another than it should be
    for name in ("poll_vs_constant", "poll304_vs_constant", "poll_p99_ms_under_load", "growth_100_to_10000"):
        assert result[name] > 0


def test_usage_costs_less_together() -> None:
    for measured in smoke("usage").values():
        assert measured["batch_ms_8"] < 64 * measured["own_transaction_median_ms_8"]
