"""`tui-trainer export RUN`: writes a recording in the formats of other tools."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from tui_trainer.cli.commands.common import (
    RunName,
    RunsDir,
    choose_run_by_name,
    cli_errors,
    flag,
    readable,
)
from tui_trainer.cli.errors import FAULT, CommandError, UsageError, notify
from tui_trainer.protocol.formatting import counted
from tui_trainer.runs.liveness import RunEntry
from tui_trainer.runs.recording import open_history
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.schema import StoreError

ExportFormat = Literal["csv", "jsonl", "parquet", "tensorboard"]
PACKAGES = {"parquet": "pyarrow", "tensorboard": "tensorboard"}
"""Packages that a format needs besides the required ones."""


def export(
    run: RunName = None,
    *,
    format: Annotated[
        ExportFormat | None,
        Parameter(
            help="csv, parquet: a folder with the steps and one file for each wide table; jsonl: "
            "what --json prints; tensorboard: a folder with an event file",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        Parameter(
            help="where to write (default: jsonl to standard output, else a new folder here, named "
            "after the run)",
            show_default=False,
            metavar="PATH",
        ),
    ] = None,
    overwrite: Annotated[bool, flag("replace an existing file or folder")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """write a run as CSV, JSON lines, Parquet or TensorBoard files"""
    if format is None:
        raise UsageError("export needs a --format", "csv, jsonl, parquet or tensorboard")
    with cli_errors():
        found = choose_run_by_name(run, runs_dir, live=False)
    _check_package(format)
    with readable(found.directory):
        history = open_history(found.directory)
    try:
        if format == "jsonl":
            _lines(history, output, overwrite)
        else:
            _folder(history, format, output or Path(f"{found.name}-{format}"), overwrite, found)
        return FAULT if history.store.fault else 0
    except BrokenPipeError:
        raise
    except (OSError, StoreError, ValueError) as error:
        raise CommandError(f"cannot export {found.name}: {_reason(error)}") from error
    finally:
        if history.store.fault:
            notify(f"{history.store.fault}: the rest was exported")
        history.close()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _check_package(format: ExportFormat) -> None:
    import importlib.util

    package = PACKAGES.get(format)
    if package and importlib.util.find_spec(package) is None:
        raise CommandError(
            f"--format {format} needs the package {package}, which is not installed",
            f'pip install "tui-trainer[{format}]"',
        )


def _lines(history: StoredHistory, output: Path | None, overwrite: bool) -> None:
    from tui_trainer.export.formats import write_jsonl

    if output is None:
        sys.stdout.flush()
        write_jsonl(history, os.dup(1))
        return
    with _replacing(output, overwrite) as partial:
        write_jsonl(history, os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
    print(f"wrote {output}")


def _folder(
    history: StoredHistory, format: ExportFormat, output: Path, overwrite: bool, run: RunEntry
) -> None:
    with _replacing(output, overwrite) as partial:
        partial.mkdir(parents=True)
        if format == "csv":
            from tui_trainer.export.formats import write_csv as write
        elif format == "parquet":
            from tui_trainer.export.formats import write_parquet as write
        else:
            from tui_trainer.export.formats import write_tensorboard as write
        written = write(history, partial)
    print(f"wrote {counted(len(written), 'file')} to {output}{os.sep}")
    if format == "tensorboard":
        print(f"  tensorboard --logdir {output}")


@contextlib.contextmanager
def _replacing(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary path that replaces `output` on success and is removed otherwise."""
    if output.exists() and not overwrite:
        raise CommandError(f"{output} already exists", "--overwrite replaces it")
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _remove(output)
        partial.rename(output)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
