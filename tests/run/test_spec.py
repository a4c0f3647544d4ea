from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from tui_trainer.config import run_spec as specs
from tui_trainer.config.run_spec import RunSpec


def test_round_trip(tmp_path):
    name, directory = specs.create_run_directory("gpt", tmp_path / "runs")
    spec = RunSpec(
        name=name,
        directory=str(directory),
        task="gpt",
        configuration={"steps": 10, "learning_rate": 1e-3, "compile": False, "data": None},
        arguments=("--a", "ü\n"),
    )
    specs.write_spec(spec)
    assert specs.read_spec(directory) == spec
    assert [path.name for path in directory.iterdir()] == ["run.json"]


def test_directories_are_private_and_names_unique(tmp_path):
    made = [specs.create_run_directory("gpt", tmp_path / "runs") for _ in range(50)]
    assert len({name for name, _ in made}) == 50
    for path in [tmp_path / "runs", *(path for _, path in made)]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_an_existing_name_is_not_reused(tmp_path, monkeypatch):
    monkeypatch.setattr(specs, "random_name", lambda: "quiet-otter")
    first, _ = specs.create_run_directory("vit", tmp_path)
    second, _ = specs.create_run_directory("vit", tmp_path)
    assert first == "vit-quiet-otter"
    assert second.startswith("vit-quiet-otter-")


def test_runs_directory_order(tmp_path, monkeypatch):
    monkeypatch.setenv(specs.RUNS_DIR_VARIABLE, str(tmp_path / "variable"))
    assert specs.runs_directory() == tmp_path / "variable"
    assert specs.runs_directory(tmp_path / "option") == tmp_path / "option"
    monkeypatch.delenv(specs.RUNS_DIR_VARIABLE)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    if sys.platform == "linux":
        assert specs.runs_directory() == tmp_path / "data" / "tui-trainer" / "runs"


def test_socket_path_short_and_long(tmp_path, monkeypatch):
    short = tmp_path / "r"
    short.mkdir()
    assert specs.new_socket_path(short) == short / "run.sock"
    assert specs.find_socket(short) is None

    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    elsewhere = specs.new_socket_path(deep)
    assert len(os.fsencode(elsewhere)) < 104
    assert stat.S_IMODE(elsewhere.parent.stat().st_mode) == 0o700
    assert specs.find_socket(deep) is None
    elsewhere.touch()
    assert specs.find_socket(deep) == elsewhere
    elsewhere.unlink()
    elsewhere.parent.rmdir()


def test_a_damaged_spec_is_a_value_error(tmp_path):
    (tmp_path / "run.json").write_text('{"name": 3}')
    with pytest.raises(ValueError, match="str"):
        specs.read_spec(tmp_path)


def test_importing_it_stays_light():
    code = "import sys, tui_trainer.config.run_spec; print({'torch', 'numpy'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
