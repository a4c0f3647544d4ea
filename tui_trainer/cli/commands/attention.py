"""`tui-trainer attention RUN`: what a head of a live run attends to, and what it does with it."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter, validators
from rich.text import Text

from tui_trainer.cli.commands.common import (
    Rank,
    RunsDir,
    cli_errors,
    flag,
    inspect_running,
    require_single_run,
    result_of,
)
from tui_trainer.cli.errors import UsageError
from tui_trainer.cli.heat_map import ask_for_pixels, heat_lines, picture_lines, window_of_pixels
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.client.answers.attention import (
    KeyRow,
    allowed_keys,
    as_data,
    entropy_text,
    key_rows,
    place_text,
    position_label,
    target_text,
)
from tui_trainer.client.connection import RunClient
from tui_trainer.protocol.attention import (
    PAIRS,
    PARTS,
    AttentionExamination,
    ExamineAttention,
    ResidualStream,
)
from tui_trainer.protocol.formatting import number, signed
from tui_trainer.protocol.heat_map import HeatMapWindow
from tui_trainer.protocol.inspection import NOT_CAPTURED, Inspected

if TYPE_CHECKING:
    from tui_trainer.ui.terminal_images import PixelSupport

ROWS, COLUMNS = 32, 64
"""Maximum size of the map: rows and columns, in cells."""
TOP = 12
NOT_NEGATIVE = validators.Number(gte=0)


def _number(help: str) -> Parameter:
    return Parameter(
        help=help, metavar="N", show_default=False, negative=(), validator=NOT_NEGATIVE
    )


def attention(
    run: Annotated[
        str | None,
        Parameter(help="the run (default: the live one, if there is only one)", show_default=False),
    ] = None,
    /,
    *,
    layer: Annotated[
        str,
        Parameter(
            help="the layer: its number from 0, its path or a part of it (default: the first one)",
            metavar="LAYER",
            show_default=False,
            negative=(),
        ),
    ] = "",
    head: Annotated[int, _number("the head, from 0")] = 0,
    query: Annotated[int | None, _number("position of the query (default: the last one)")] = None,
    sample: Annotated[int, _number("which example of the batch, from 0")] = 0,
    map: Annotated[bool, flag("the map of the head: queries by keys")] = False,
    pixels: Annotated[
        bool, flag("the map with real pixels where the terminal has them (implies --map)")
    ] = False,
    weights: Annotated[
        bool, flag("similarity, spectra and angles of Wq, Wk and Wv of each head")
    ] = False,
    residual: Annotated[
        bool, flag("what each head and block adds to the residual stream and to the logit")
    ] = False,
    top: Annotated[int, _number("number of keys to list, by weight")] = TOP,
    json: Annotated[bool, flag("print one JSON object")] = False,
    rank: Rank = 0,
    runs_dir: RunsDir = None,
) -> int:
    """show what a head attends to, for one example of the current batch"""
    if run is not None and re.fullmatch(r"\d+", run):
        raise UsageError(f"{run} is not a run", "a layer is named by --layer, a head by --head")
    if pixels and json:
        raise UsageError("--pixels and --json cannot be used together")
    screen = ask_for_pixels() if pixels else None
    window = HeatMapWindow(ROWS, COLUMNS, reduction="max_abs") if map or pixels or json else None
    if window is not None and screen is not None:
        window = window_of_pixels(window, screen)
    request = ExamineAttention(layer, head, query, sample, window, weights, residual)
    with cli_errors():
        found = require_single_run(run, runs_dir)
        with RunClient.connect(found, "tui-trainer attention", rank=rank) as client:
            # A run keeps its batches only from the first request on.
            answer = inspect_running(client, request, _not_captured)
        examination = result_of(answer, AttentionExamination)
    if json:
        known: dict[str, Any] = {
            "run": found.name,
            "rank": answer.rank,
            "step": answer.step,
            "phase": answer.phase,
        }
        data = {**known, "took_ms": answer.took_ms, **as_data(examination)}
        print(msgspec.json.encode(data).decode(), flush=True)
    else:
        print("\n".join(_text(answer, examination, request, top, screen)), flush=True)
    return 0


def _not_captured(answer: Inspected) -> bool:
    return answer.message == NOT_CAPTURED


def _text(
    answer: Inspected,
    found: AttentionExamination,
    request: ExamineAttention,
    top: int,
    screen: PixelSupport | None,
) -> list[str]:
    lines = [*_facts(answer, found)]
    if found.row is not None:
        lines += ["", *_query(found, top), "", *_heads(found)]
    if found.map is not None:
        drawn = heat_lines(found.map) if screen is None else picture_lines(found.map, screen)
        lines += ["", "the map: queries down, keys across", *drawn]
    if request.weights:
        lines += ["", *(_weights(found) if found.weights else [f"no weights: {found.no_weights}"])]
    if request.residual:
        stream = found.residual
        why = found.no_residual or found.missing
        lines += ["", *(_residual(found, stream) if stream is not None else [f"no stream: {why}"])]
    return lines


def _facts(answer: Inspected, found: AttentionExamination) -> list[str]:
    lines = [f"{found.layer}, head {found.head} of {found.heads} · {answer.moment}"]
    if found.missing:
        lines.append(f"no map: {found.missing}")
    else:
        label = position_label(found, found.query)
        lines.append(
            f"example {found.sample} of {found.samples}, query {found.query} of {found.queries}"
            f"{f' {label}' if label else ''}, {found.keys} keys, {found.head_dim} wide"
        )
        lines.append(f"{found.how}, checked: within {found.deviation:.0e} of {found.checked}")
    return [*lines, *(f"note: {note}" for note in found.notes)]


def _query(found: AttentionExamination, top: int) -> list[str]:
    rows = key_rows(found) if top else []
    largest = sorted(rows, key=lambda row: -row.weight)[:top]
    shown = sorted(largest, key=lambda row: row.key)
    labelled = any(row.label for row in shown)
    score = "score" if math.isnan(found.scale) else f"score = q·k·{found.scale:.4g}"
    headings = ("key", "", "q·k", "angle", score, "weight")
    table = new_table(headings, right=("key", *headings[2:]))
    for row in shown:
        table.add_row(*map(Text, _cells(row)))
    entropy = found.by_head[found.head].entropy if found.head < len(found.by_head) else math.nan
    lines = [line.plain for line in table_lines(table)] if top else []
    if not labelled:
        lines = [re.sub(r"^(\s*\S+)  ", r"\1", line) for line in lines]
    rest = sum(row.weight for row in rows) - sum(row.weight for row in shown)
    left = len(rows) - len(shown)
    more = [f"{left} other keys: weight {number(rest, 0)} together"] if left > 0 else []
    return [
        *lines,
        *more,
        f"entropy {entropy_text(entropy, allowed_keys(found))}, which equal weights would have",
    ]


def _cells(row: KeyRow) -> tuple[str, ...]:
    score = "masked" if row.masked else number(row.score, 0)
    return (
        str(row.key), row.label, number(row.product, 0), f"{row.angle:.1f}°", score,
        f"{row.weight:.4f}",
    )  # fmt: skip


def _heads(found: AttentionExamination) -> list[str]:
    headings = ("head", "entropy", "mean", "largest weight", "at key")
    table = new_table(headings, right=headings[:-1])
    for head, each in enumerate(found.by_head):
        label = position_label(found, each.key)
        cells = (str(head), f"{each.entropy:.3f}", f"{each.mean_entropy:.3f}",
                 f"{each.largest:.4f}", f"{each.key} {label}")  # fmt: skip
        table.add_row(*map(Text, cells))
    return [
        "entropy in nats: of the query, and the mean over the queries",
        *(line.plain for line in table_lines(table)),
    ]


def _weights(found: AttentionExamination) -> list[str]:
    pairs = [f"{name} {pair}" for name in ("cos", "dist", "angle") for pair in PAIRS]
    parts = [f"{name} {part}" for name in ("σ", "rank") for part in PARTS]
    table = new_table(("head", *pairs, *parts), right=("head", *pairs, *parts))
    for head, each in enumerate(found.weights):
        shown = head if len(found.weights) > 1 else found.head
        cells = [
            *(_signed(value) for value in each.cosines),
            *(number(value, 0, 3) for value in each.distances),
            *(f"{value:.1f}°" for value in each.angles),
            *(number(value, 0, 3) for value in (*each.largest, *each.stable_ranks)),
        ]
        table.add_row(*map(Text, (str(shown), *cells)))
    lines = [
        "Wq, Wk and Wv of each head: cosine, distance, mean angle of the row spaces; largest",
        "singular value and stable rank",
        *(line.plain for line in table_lines(table)),
    ]
    if found.spectra is not None:
        lines.append(f"head {found.head}")
        for part, values in zip(PARTS, found.spectra.singular, strict=True):
            lines.append(f"  singular values of W{part}  {_list(values)}")
        for pair, angles in zip(PAIRS, found.spectra.angles, strict=True):
            lines.append(f"  principal angles {pair}   {_list(angles, '°')}")
    return lines


def _list(values: tuple[float, ...], unit: str = "") -> str:
    shown = [f"{value:.3g}{unit}" for value in values]
    if len(shown) > 2 * 4:
        shown = [*shown[:4], f"… ({len(shown)}) …", *shown[-4:]]
    return "  ".join(shown)


def _residual(found: AttentionExamination, stream: ResidualStream) -> list[str]:
    headings = ("what was added", "norm", "cosine", "logit")
    table = new_table(headings, right=headings[1:])
    for each in stream.contributions:
        indent = "  " if each.kind in ("head", "bias") else ""
        named = f"{each.name} (what the stream begins with)" if each.kind == "start" else each.name
        norm = "" if math.isnan(each.norm) else number(each.norm, 0)
        cosine, logit = _signed(each.cosine), _signed(each.logit)
        table.add_row(*map(Text, (indent + named, norm, cosine, logit)))
    total = _signed(stream.logit)
    table.add_row("the stream", Text(number(stream.norm, 0)), "", Text(total))
    lines = [
        f"the residual stream at {place_text(found, stream)}",
        *(line.plain for line in table_lines(table)),
        f"the sum differs from the stream by {stream.difference:.0e} of it",
    ]
    if stream.no_logit:
        lines.append(f"no effect on a logit: {stream.no_logit}")
    else:
        off = f"{stream.logit_difference:.0e}"
        lines.append(
            f"logit of {target_text(stream)}; the direct effects sum to it within {off}, "
            "the divisor of the final norm held"
        )
    return [*lines, *(f"note: {note}" for note in stream.notes)]


def _signed(value: float) -> str:
    return "" if math.isnan(value) else signed(value, 8, 3).strip()
