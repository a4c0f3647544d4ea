from __future__ import annotations

import os
import shutil
import subprocess
import sys

import psutil
import pytest

from tests.client.scripted import until as wait_for
from tui_trainer.protocol.schema import SourceInfo
from tui_trainer.run.environment import find_source, look_up_source


def git(directory, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=directory, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    place = tmp_path / "project"
    place.mkdir()
    git(place, "init", "-q", "-b", "trunk")
    (place / "train.py").write_text("a = 1\n")
    git(place, "add", "train.py")
    git(place, "commit", "-qm", "begin")
    return place


def test_commit_branch_and_dirty(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert find_source(str(repository)) == SourceInfo(commit, False, "trunk")
    (repository / "notes.txt").write_text("of no weight")
    assert find_source(str(repository)).dirty is False
    (repository / "train.py").write_text("a = 2\n")
    below = repository / "below"
    below.mkdir()
    assert find_source(str(below)) == SourceInfo(commit, True, "trunk")
    git(repository, "checkout", "-q", "--detach")
    assert find_source(str(repository)) == SourceInfo(commit, True, "")


def test_looking_does_not_write(repository):
    os.utime(repository / "train.py", (1, 1))  # makes git wish to refresh its index
    index = repository / ".git" / "index"
    before = (index.read_bytes(), index.stat().st_mtime_ns)
    assert find_source(str(repository)) is not None
    assert (index.read_bytes(), index.stat().st_mtime_ns) == before


def test_no_repository_no_git_no_directory(repository, tmp_path, monkeypatch):
    assert find_source(str(tmp_path)) is None
    assert find_source(str(tmp_path / "nowhere")) is None
    assert find_source("\0") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_source(str(repository)) is None


def slow_git(tmp_path, monkeypatch, text):
    place = tmp_path / "bin"
    place.mkdir()
    (place / "git").write_text(f"#!/bin/sh\n{text}\n")
    (place / "git").chmod(0o700)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")


def test_a_slow_git_is_given_up_and_ended(repository, tmp_path, monkeypatch):
    slow_git(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 100")
    assert find_source(str(repository), timeout_s=5.0) is None
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: ended(pid))


def ended(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


INHERITING = """
import ctypes, os, sys
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
from tui_trainer.run.environment import look_up_source
look_up_source(sys.argv[1], print).join(30)
try:
    print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("no child")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_where_orphans_become_our_children_it_is_waited_for(repository):
    """As in a container of which this is the first process."""
    done = subprocess.run(
        [sys.executable, "-c", INHERITING, str(repository)], capture_output=True, text=True
    )
    assert "trunk" in done.stdout, done
    assert done.stdout.splitlines()[-1] == "no child"


def test_without_a_descriptor_left_nothing_is_said(repository, monkeypatch):
    def full():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("os.pipe", full)
    assert find_source(str(repository)) is None


def test_nobody_waits_for_it_and_it_is_nobodys_child(repository, tmp_path, monkeypatch):
    """A script that waits for a child of its own must not be given ours."""
    real, told, gate = shutil.which("git"), [], tmp_path / "gate"
    begun = tmp_path / "begun"
    waiting = f"touch {begun}; while [ ! -e {gate} ]; do sleep 0.05; done"
    slow_git(tmp_path, monkeypatch, f'{waiting}; {real} "$@"')
    before = psutil.Process().children()
    thread = look_up_source(str(repository), told.append)
    assert thread.daemon
    wait_for(begun.exists)
    assert psutil.Process().children() == before
    assert not told
    gate.touch()
    thread.join(30)
    assert told[0].branch == "trunk"
