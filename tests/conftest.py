"""Fixtures and settings of all tests."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import execnet.gateway_base
import execnet.gateway_io
import hypothesis
import pytest

from tests import processes
from tests.examples import FEW
from tests.once import SESSION

# Tests run side by side, each in one thread: more of them would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without bytecode each process would compile every module, and each worker every test module.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell's background job inherits SIGINT ignored, one of nohup's SIGHUP, and so would all that is
# started here: a run heeds that, as it should, and would not end when a test asks it to.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )

# The time that an example takes is that of the machine. The examples are the same in every run;
# `pytest --hypothesis-profile=explore` tries others.
_same = hypothesis.settings(deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.register_profile("explore", _same)
hypothesis.settings.register_profile("tests", _same, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")

ONLY_QUICK = "not slow"
"""The marks that `make test-fast` selects."""
SLOW = (
    "export", "oracle", "packaging", "ssh", "terminal",
    "architecture/test_contracts.py", "architecture/test_imports.py",
    "cli/test_attention.py", "cli/test_back.py", "cli/test_breakpoints.py", "cli/test_check.py",
    "cli/test_commands.py", "cli/test_demo.py", "cli/test_faults.py", "cli/test_help.py",
    "cli/test_inspect.py", "cli/test_json.py", "cli/test_paused.py", "cli/test_read_only.py",
    "cli/test_refused.py", "cli/test_resume.py", "cli/test_set.py", "cli/test_usage.py",
    "client/test_compare.py", "client/test_events_kept.py",
    "comparison/test_compared_runs.py", "comparison/test_divergence.py",
    "findings/test_trainings.py",
    "learn/test_demos.py", "learn/test_pages.py",
    "report/test_report.py",
    "run/test_commands_answered.py", "run/test_host.py", "run/test_hostile.py",
    "run/test_last_steps.py", "run/test_order.py", "run/test_script.py",
    "run/test_printed_step.py", "run/test_progress.py", "run/test_stopping.py",
    "run/test_watch.py",
    "runs/test_disk.py", "runs/test_liveness.py", "runs/test_orphans.py",
    "store/test_damaged.py", "store/test_schema.py",
    "tasks/test_vit_task.py",
    "trace/test_bit_identity.py",
    "travel/test_time_travel.py",
    "ui/test_attention_layer.py", "ui/test_attention_of_two.py", "ui/test_contrast.py",
    "ui/test_damaged_recording.py", "ui/test_help.py", "ui/test_inspect.py",
    "ui/test_inspector_snapshots.py", "ui/test_learn.py", "ui/test_missing_values.py",
    "ui/test_replay.py", "ui/test_scalar_graph.py", "ui/test_screen_snapshots.py",
    "ui/test_staleness.py", "ui/test_start.py",
    "ui/test_textual_hacks.py", "ui/test_user_text.py",
)  # fmt: skip
"""Folders and files of slow tests; elsewhere each is marked."""
LONG = (
    "packaging", "ssh", "terminal",
    "cli/test_back.py", "cli/test_inspect.py", "cli/test_resume_vit.py",
    "run/test_compiled.py", "run/test_host.py", "run/test_ranks.py",
    "tasks/test_vit_task.py",
)  # fmt: skip
"""Folders and files of tests that take or wait for seconds: the workers begin with them, so that
none is left for the end, when the others have nothing to do."""
MADE_HERE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == ONLY_QUICK:
        os.environ[FEW] = "1"
    if SESSION not in os.environ:  # workers inherit it
        os.environ[SESSION] = config.stash[MADE_HERE] = tempfile.mkdtemp(
            prefix="tui-trainer-tests-"
        )
    # The theme that the developer has chosen is none of the tests' business.
    os.environ["XDG_CONFIG_HOME"] = os.path.join(os.environ[SESSION], "config")
    os.environ["XDG_STATE_HOME"] = os.path.join(os.environ[SESSION], "state")


@pytest.hookimpl(optionalhook=True)  # the plugin may be switched off
def pytest_xdist_auto_num_workers() -> int:
    """Two for each core: many tests wait for other processes, for a screen or for a thread."""
    return 2 * ((os.process_cpu_count() if sys.version_info >= (3, 13) else os.cpu_count()) or 1)


class ForkedWorker(execnet.gateway_io.Popen2IOMaster):
    """A worker of pytest-xdist that is forked from an interpreter that has imported PyTorch: all
    workers together import it once, and none starts a fork server."""

    def __init__(self, args: list[str], execmodel: Any) -> None:
        self.popen = processes.Popen(
            [args[0], *args[-2:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, worker=True
        )
        execnet.gateway_base.Popen2IO.__init__(
            self, self.popen.stdin, self.popen.stdout, execmodel=execmodel
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    execnet.gateway_io.Popen2IOMaster = ForkedWorker  # type: ignore[misc]


def pytest_unconfigure(config: pytest.Config) -> None:
    if MADE_HERE in config.stash:
        shutil.rmtree(config.stash[MADE_HERE], ignore_errors=True)
        del os.environ[SESSION]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _is_in(item, SLOW):
            item.add_marker("slow")
    items[:] = long_first(items, getattr(config, "workerinput", {}).get("workercount", 1))


def _is_in(item: pytest.Item, places: Sequence[str]) -> bool:
    return _is_path_in(item.path, tuple(places))


@functools.cache
def _is_path_in(path: Path, places: tuple[str, ...]) -> bool:
    inside = path.relative_to(Path(__file__).parent)
    return inside.parts[0] in places or inside.as_posix() in places


def long_first(items: Sequence[pytest.Item], workers: int) -> list[pytest.Item]:
    """The tests in an order in which each of the workers, which pytest-xdist gives an equal part of
    them, begins with long ones. The tests of a file stay together."""
    rest = [item for item in items if not _is_in(item, LONG)]
    begins: list[list[pytest.Item]] = [[] for _ in range(workers)]
    long = (item for item in items if _is_in(item, LONG))
    for _, file in itertools.groupby(long, key=lambda item: item.path):
        min(begins, key=len).extend(file)
    ordered: list[pytest.Item] = []
    for number, begin in enumerate(begins):
        size = (len(items) - len(ordered)) // (workers - number)
        others = max(0, size - len(begin))
        ordered += [*begin, *rest[:others]]
        del rest[:others]
    return ordered + rest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Take back the variables that libraries set as they are imported, as scikit-learn does: where
    they differ, all processes of the tests that follow would import PyTorch again."""
    before = processes.read_at_start(os.environ)
    try:
        return (yield)
    finally:
        for name in processes.read_at_start(os.environ).keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Neither the random numbers of a test nor what it sees of `torch.compile` depend on the tests
    that its worker has run before."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(seed)
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and any(compiler.cached_backends.values()):
        sys.modules["torch._dynamo"].reset()


def pytest_sessionfinish() -> None:
    """pytest collects garbage five times as it ends: let it find none."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Next to nothing of what a collection makes is garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """The test modules' objects live to the end: spare the garbage collector from visiting them.
    Looking for cycles at every 700th object took a fifth of the tests of screens."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
