"""`python -m tui_trainer.learn.measurements PAGE`: measure the values of a page and print them.

With `--serve`, each line of standard input is a `PageRequest`, which is answered by one line: a
`PageMeasurement` or a `PageFailure`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

import msgspec

from tui_trainer.learn.catalog import PAGES, find_page
from tui_trainer.learn.measurement_process import (
    PageFailure,
    PageMeasurement,
    PageRequest,
    all_finite,
)
from tui_trainer.learn.measurements import measure_page
from tui_trainer.protocol.errors import UserError


def main(arguments: list[str]) -> int:
    """Run what the command line asks for and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tui_trainer.learn.measurements")
    parser.add_argument("name", nargs="?", help="name of a page")
    parser.add_argument("--seed", type=int, default=1, help="random seed (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--list", action="store_true", help="print the names of all pages")
    parser.add_argument("--serve", action="store_true", help="answer requests on standard input")
    given = parser.parse_args(arguments)
    if given.serve:
        serve()
        return 0
    if given.list or given.name is None:
        print("\n".join(PAGES))
        return 0
    result = answer(PageRequest(given.name, given.seed))
    if given.json:
        print(msgspec.json.encode(result).decode())
    elif isinstance(result, PageMeasurement):
        for name, value in result.values.items():
            print(f"{name} = {value}")
    else:
        print(f"{result.message}\n  hint: {result.hint}", file=sys.stderr)
    return 0 if isinstance(result, PageMeasurement) else 1


def serve() -> None:
    """Answer requests until standard input is closed."""
    os.nice(5)  # a training on this machine comes first
    prepare()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that the output of a library is not read as an answer
    for line in sys.stdin.buffer:
        answers.write(
            msgspec.json.encode(answer(msgspec.json.decode(line, type=PageRequest))) + b"\n"
        )
        answers.flush()


def prepare() -> None:
    """Import what measurements use; the first measurement reports a missing module."""
    with contextlib.suppress(ImportError):
        import torch._dynamo  # noqa: F401


def answer(wanted: PageRequest) -> PageMeasurement | PageFailure:
    """The values of a page, or why they could not be measured."""
    try:
        measured = measure_page(find_page(wanted.page), wanted.seed)
    except UserError as error:
        return PageFailure(error.message, error.hint)
    except ModuleNotFoundError as error:
        return PageFailure(
            f"the numbers of the pages are measured with PyTorch: there is no module {error.name}",
            f"install it for {sys.executable}, for instance with pip install torch",
        )
    except Exception as error:
        return PageFailure(f"the measurement failed: {type(error).__name__}: {error}")
    if not all_finite(measured.values):
        return PageFailure(f"the measurement of {wanted.page} gave nan or inf")
    return measured


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
