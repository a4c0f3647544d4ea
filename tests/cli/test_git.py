"""The commit of the code that a run trains."""

from __future__ import annotations

import os
import subprocess

import psutil
import pytest

from tests.client.scripted import until as wait_for
from tui_trainer.cli.run_setup import find_source
from tui_trainer.protocol.schema import SourceInfo


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
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "trunk")
    (folder / "train.py").write_text("a = 1\n")
    git(folder, "add", "train.py")
    git(folder, "commit", "-qm", "begin")
    return folder


def test_commit_branch_and_dirty(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert find_source(str(repository)) == SourceInfo(commit, False, "trunk")
    (repository / "notes.txt").write_text("untracked files do not count")
    assert find_source(str(repository)).dirty is False
    (repository / "train.py").write_text("a = 2\n")
    below = repository / "below"
    below.mkdir()
    assert find_source(str(below)) == SourceInfo(commit, True, "trunk")
    git(repository, "checkout", "-q", "--detach")
    assert find_source(str(repository)) == SourceInfo(commit, True, "")


def test_git_does_not_write(repository):
    os.utime(repository / "train.py", (1, 1))  # makes git wish to refresh its index
    index = repository / ".git" / "index"
    before = (index.read_bytes(), index.stat().st_mtime_ns)
    assert find_source(str(repository)) is not None
    assert (index.read_bytes(), index.stat().st_mtime_ns) == before


def test_no_repository_no_commit_no_git_no_directory(repository, tmp_path, monkeypatch):
    assert find_source(str(tmp_path)) is None
    assert find_source(str(tmp_path / "nowhere")) is None
    assert find_source("\0") is None
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "-q")
    assert find_source(str(empty)) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_source(str(repository)) is None


def fake_git(tmp_path, monkeypatch, script):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "git").chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """A file that a slow git leaves: only then, or when git has ended, its time begins to run."""
    left, communicate = tmp_path / "slow", subprocess.Popen.communicate

    def wait(self, input=None, timeout=None):
        wait_for(lambda: self.poll() is not None or left.exists())
        return communicate(self, input, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", wait)
    return left


def test_a_slow_git_is_given_up_and_ended(repository, slow, tmp_path, monkeypatch):
    fake_git(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; : > {slow}; exec sleep 600")
    assert find_source(str(repository), timeout_s=0.05) is None
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not psutil.pid_exists(pid))


def test_a_slow_status_leaves_the_commit(repository, slow, tmp_path, monkeypatch):
    sleeping = f": > {slow}; exec sleep 600"
    script = f'case "$*" in *status*) {sleeping};; *) echo abc; echo trunk;; esac'
    fake_git(tmp_path, monkeypatch, script)
    assert find_source(str(repository), timeout_s=0.05) == SourceInfo("abc", None, "trunk")


def test_git_is_no_child_afterwards(repository):
    before = psutil.Process().children()
    assert find_source(str(repository)) is not None
    assert set(psutil.Process().children()) <= set(before)
