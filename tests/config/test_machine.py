"""The cores available to a run, and the cores that other processes use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tui_trainer.config import machine
from tui_trainer.config.machine import OtherLoad, cpu_quota, usable_cores


def groups(tmp_path, own, **limits):
    """Control groups as the kernel shows them: files by their path, with `_` for `/`."""
    (tmp_path / "own").write_text(own)
    for name, text in limits.items():
        path = tmp_path / name.replace("__", "/").replace("0", ".").replace("1", ",")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return cpu_quota(tmp_path, tmp_path / "own")


TWO = "0::/a/b\n"
ONE = "4:memory:/x\n1:cpu,cpuacct:/a\n0::/\n"


@pytest.mark.parametrize(
    ("own", "limits", "granted"),
    [
        (TWO, {"a__b__cpu0max": "max 100000\n"}, float("inf")),
        (TWO, {"a__b__cpu0max": "250000 100000\n"}, 2.5),
        (TWO, {"a__b__cpu0max": "250000 100000\n", "a__cpu0max": "50000 50000\n"}, 1.0),
        (TWO, {"cpu0max": "300000 100000\n"}, 3.0),  # of a container: its own group is the root
        (TWO, {"a__b__cpu0max": "nonsense\n"}, float("inf")),
        (TWO, {}, float("inf")),
        ("", {}, float("inf")),
        (
            ONE,
            {"cpu1cpuacct__a__cpu0cfs_quota_us": "-1\n", "cpu1cpuacct__a__cpu0cfs_period_us": "1"},
            float("inf"),
        ),
        (
            ONE,
            {
                "cpu1cpuacct__a__cpu0cfs_quota_us": "200000\n",
                "cpu1cpuacct__a__cpu0cfs_period_us": "100000\n",
            },
            2.0,
        ),
    ],
)
def test_a_quota_counts(tmp_path, own, limits, granted):
    assert groups(tmp_path, own, **limits) == granted


def test_no_control_groups_at_all(tmp_path):
    assert cpu_quota(tmp_path, tmp_path / "nowhere") == float("inf")


@pytest.mark.parametrize(("granted", "expected"), [(float("inf"), 8), (2.5, 2), (0.5, 1), (64, 8)])
def test_cores_are_those_that_are_paid_for(monkeypatch, granted, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda: granted)
    assert usable_cores() == expected


def test_other_processes_count_only_on_our_cores(tmp_path):
    """Ticks: user nice system idle iowait irq softirq steal guest guest_nice."""
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  999 999 999 999 999 999 999 999 999 999\n"
        "cpu0 100 20 30 9999 8888 4 5 6 50 20\n"
        "cpu1 1 1 1 1 1 1 1 1 1 1\n"
        "intr 1 2 3\n"
    )
    ticks = os.sysconf("SC_CLK_TCK")
    assert machine._busy_s({0}, stat) == (100 + 20 + 30 + 4 + 5 + 6) / ticks
    assert machine._busy_s({0}, tmp_path / "nowhere") == 0.0


def test_our_own_use_is_not_counted(monkeypatch):
    """Read as the kernel gives it: what this process burns is taken off again."""
    busy = iter([10.0, 10.0 + 0.4])
    monkeypatch.setattr(machine, "_busy_s", lambda cores: next(busy))
    monkeypatch.setattr(machine, "_own_s", iter([1.0, 1.3]).__next__)
    others = OtherLoad()
    assert 0.0 < others.cores(0.05) <= 0.11 / 0.05


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_a_busy_process_is_seen():
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert OtherLoad().cores(1.0) > 0.05  # of a share of a core, however loaded this machine is
    finally:
        process.kill()
        process.wait()
