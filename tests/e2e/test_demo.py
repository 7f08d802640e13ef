"""``make demo``, shortened: the real SmolLM2 and real reviews through every process of the service."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from worker.up import ROOT

KEYS = {
    "base_accuracy", "tuned_accuracy", "held_out", "trainable_parameters", "adapter_bytes", "lora8_bytes", "seconds",
    "peak_rss_mib",
}  # fmt: skip


@pytest.mark.smollm2
@pytest.mark.timeout(900)
def test_shortened_demo(tmp_path: Path) -> None:
    sizes = ["--train", "48", "--validation", "8", "--held-out", "16"]
    command = [sys.executable, "-m", "scripts.demo", *sizes, "--home", str(tmp_path / "home")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() == KEYS
    assert result["held_out"] == 16
    # out + r (arXiv 2505.20154) for each of the 30 layers' q, k, v, o, gate, up and down.
    assert result["trainable_parameters"] == 30 * (2 * 576 + 2 * 192 + 2 * 1536 + 576 + 7 * 64)
    assert result["adapter_bytes"] < result["lora8_bytes"] / 10
    assert 0.0 <= result["base_accuracy"] <= 1.0
    assert 0.0 <= result["tuned_accuracy"] <= 1.0
