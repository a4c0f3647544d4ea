"""Writes a tensor or an autograd graph to a file that the user names, on the machine of the app."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path

import msgspec

from tui_trainer.client.answers.autograd import as_data, dot, svg
from tui_trainer.client.answers.tensors import ENDINGS, fetch, write_tensor
from tui_trainer.protocol.autograd import AutogradGraph
from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.inspection import (
    Inspected,
    InspectionRequest,
    OfRank,
    RankRequest,
    TensorRef,
)
from tui_trainer.ui.screens.base import DetailScreen
from tui_trainer.ui.screens.dialogs import TextPrompt

GRAPH_ENDINGS = (".svg", ".dot", ".json")


def save_tensor(screen: DetailScreen, ref: TensorRef, finished: Callable[[], object]) -> None:
    """Ask for a file and write the tensor to it; calls `finished` once no further answer of the run
    is needed."""
    session, rank = screen.context.session, screen.context.inspected_rank
    assert session is not None

    def ask(request: InspectionRequest) -> Inspected:
        if rank and isinstance(request, RankRequest):
            request = OfRank(rank, request)
        return session.inspect(request).result()

    def write(path: Path) -> str:
        info, data = fetch(ask, ref)
        write_tensor(path, info, data)
        return ref.text

    kind = {"parameter": "", "buffer": "", "gradient": ".grad"}.get(ref.kind, f".{ref.kind}")
    name = f"{ref.name}{f'.{ref.key}' if ref.kind == 'state' else kind}.npy"
    _ask_where(screen, "Write the tensor to a file", name, ENDINGS, write, finished)


def save_graph(screen: DetailScreen, graph: AutogradGraph, title: str, repeats: bool) -> None:
    """Ask for a file and write the graph to it; `repeats`: equal blocks as one in a picture."""

    def write(path: Path) -> str:
        match path.suffix:
            case ".svg":
                text = svg(graph, title, repeats)
            case ".dot":
                text = dot(graph, title)
            case _:
                text = msgspec.json.encode(as_data(graph)).decode()
        path.write_text(text, encoding="utf-8")
        return "the graph"

    _ask_where(screen, "Write the graph to a file", "graph.svg", GRAPH_ENDINGS, write)


def _ask_where(
    screen: DetailScreen,
    question: str,
    name: str,
    endings: Sequence[str],
    write: Callable[[Path], str],
    finished: Callable[[], object] = lambda: None,
) -> None:
    """Ask for a path and call `write` with it on a thread. The path does not exist yet; `write`
    returns the name of what it wrote."""
    app = screen.app

    def notify(message: str, failed: bool = True) -> None:
        app.notify(message, severity="warning" if failed else "information", markup=False)

    def work(path: Path) -> None:
        try:
            message, failed = f"wrote {write(path)} to {path}", False
        except UserError as error:
            message, failed = f"{error.message}\n{error.hint}".strip(), True
        except OSError as error:
            message, failed = f"cannot write {path}: {error.strerror or error}", True
        except CancelledError:
            message, failed = "not written: another request came first", True
        app.call_from_thread(notify, message, failed)
        app.call_from_thread(finished)

    def chosen(text: str | None) -> None:
        path = Path(text).expanduser() if text else None
        if path is None:
            finished()
        elif path.suffix not in endings:
            notify(f"the name must end in {' or '.join(endings)}")
            finished()
        elif path.exists():
            notify(f"{path} already exists")
            finished()
        else:
            screen.run_worker(lambda: work(path), thread=True, group="saving", exit_on_error=False)

    app.push_screen(TextPrompt(f"{question} ({', '.join(endings)})", name), chosen)
