"""`python -m tui_trainer.run DIRECTORY`: the process that an app or a launcher starts for a run."""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tui_trainer.run.host import Host


def start(arguments: list[str]) -> int:
    """Run the spec in a run's directory, or as one of its ranks; returns the exit status.

    With `--plain` or `--json` as second argument it prints progress lines; otherwise its output is
    captured.
    """
    if len(arguments) not in (1, 2) or arguments[1:] not in ([], ["--plain"], ["--json"]):
        print("usage: python -m tui_trainer.run DIRECTORY [--plain|--json]", file=sys.stderr)
        return 2
    from msgspec.structs import replace

    from tui_trainer.config.machine import OtherLoad

    others = OtherLoad()  # measures while the rest is imported
    from tui_trainer.config.ranks import rank_here
    from tui_trainer.config.run_spec import LOG_FILE, read_spec
    from tui_trainer.run.host import Host, run_to_end
    from tui_trainer.run.output import Capture

    try:
        spec = read_spec(arguments[0])
        if spec.working_directory:
            os.chdir(spec.working_directory)
    except (OSError, ValueError) as error:
        print(f"tui-trainer: cannot start this run: {error}", file=sys.stderr)
        return 2
    if spec.local_rank_option and "LOCAL_RANK" in os.environ:
        option = f"{spec.local_rank_option}={os.environ['LOCAL_RANK']}"
        spec = replace(spec, arguments=(option, *spec.arguments))
    # A crash of the interpreter is reported on the original stderr, not in a pipe of this process.
    faulthandler.enable(os.fdopen(os.dup(2), "w"))
    rank = rank_here() if spec.launcher else None
    log = Path(spec.directory) / LOG_FILE
    host: Host
    if rank is not None and rank.rank:
        from tui_trainer.run.rank_client import connect_locally
        from tui_trainer.run.rank_host import RankHost, spec_of_rank

        connect = connect_locally(lambda: Path(spec.directory))
        host = RankHost(spec_of_rank(spec, rank), rank, connect, others)
        log = log.with_name(f"{log.stem}-rank-{rank.rank}{log.suffix}")
    else:
        host = Host(spec, others=others)
    if len(arguments) == 2:
        return _print_lines(host, arguments[1])
    capture = Capture(host.recorder.log, log)
    capture.start()
    try:
        return run_to_end(host, None, own_session=True, after_training=capture.stop)
    finally:
        capture.stop()  # an exception of our own then goes to the original stderr


def _print_lines(host: Host, kind: str) -> int:
    from tui_trainer.run.host import run_to_end
    from tui_trainer.run.output import redirect_stdout_to_stderr, use_line_buffering
    from tui_trainer.run.sinks import Output
    from tui_trainer.run.sinks.jsonlines import JsonLines
    from tui_trainer.run.sinks.plain import PlainLines

    if kind == "--json":
        output = redirect_stdout_to_stderr()
        return run_to_end(host, JsonLines(Output(output)) if host.recording else None)
    use_line_buffering()
    return run_to_end(host, PlainLines(Output(os.dup(1))) if host.recording else None)


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
