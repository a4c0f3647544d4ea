"""`attention` of a real run of the small GPT: as text, as JSON, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest

from tests.cli.calling import assert_refused, call, started

SIZES = (
    "--layers",
    "2",
    "--heads",
    "2",
    "--width",
    "16",
    "--block-size",
    "12",
    "--batch-size",
    "3",
)


def test_attention_of_a_paused_run(tmp_path: Path) -> None:
    def attention(*arguments: str) -> subprocess.CompletedProcess[str]:
        return call("attention", *arguments, cwd=tmp_path)

    options = ("--steps", "20", "--eval-batches", "1", "--sample-every", "0", "--threads", "1")
    command = ("gpt", "--json", "--name", "one", "--break", "step == 3 at backward")
    with started(*command, *options, *SIZES, cwd=tmp_path) as run:
        run.next_breakpoint()
        text = attention(
            "one",
            "--layer",
            "1",
            "--query",
            "7",
            "--sample",
            "2",
            "--map",
            "--weights",
            "--residual",
        ).stdout
        lines = text.splitlines()
        assert lines[0] == "blocks.1.attention, head 0 of 2 · step 3, after backward"
        assert lines[1].startswith("example 2 of 3, query 7 of 12 ")
        assert lines[2].startswith("scaled_dot_product_attention, checked: within ")
        for part in ("q·k", "entropy ", "the map: ", "principal angles kv", "blocks.0.mlp",
                     "the sum differs from the stream by ", "logit of the target ‘"):  # fmt: skip
            assert part in text

        request = ("--layer", "blocks.0", "--head", "1", "--query", "7", "--residual", "--json")
        found = json.loads(attention("one", *request).stdout)
        assert (found["run"], found["step"], found["phase"]) == ("one", 3, "backward")
        assert (found["layer"], found["head"], found["missing"]) == ("blocks.0.attention", 1, "")
        weights, scores = found["row"]["weights"], found["row"]["scores"]
        assert sum(weights) == pytest.approx(1, abs=1e-6)
        allowed = [math.exp(score) for score in scores if score is not None]
        assert len(allowed) == 8
        expected = [value / sum(allowed) for value in allowed] + [0.0] * 4
        assert weights == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert len(found["labels"]) == len(weights) == 12
        stream = found["residual"]
        assert stream["correct"]
        whole = [c for c in stream["contributions"] if c["kind"] not in ("head", "bias")]
        assert sum(c["logit"] for c in whole) == pytest.approx(stream["logit"], abs=1e-5)

        assert_refused(attention("one", "--head", "2"), "there is no head 2", "0 to 1")
        assert_refused(attention("one", "--layer", "x"), "no attention layer matches x")
