"""Texts of the user's (names, arguments, paths, classes, messages) never hide the program's."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from tests.examples import examples
from tests.ui.fake import fake_gpt, fake_vit
from tests.ui.open_app import OpenApp
from tui_trainer.history import MemoryHistory
from tui_trainer.protocol.events import ConfusionMatrix, LogLine, Notice, TextSample
from tui_trainer.protocol.messages import PhaseReport, Quantity, Rows
from tui_trainer.protocol.text import sanitize_message

STEPS = 30
SIZE = (80, 24)
WHOLE = [session.poll() for session in (fake_gpt(STEPS), fake_vit(STEPS))]
TEXTS = st.one_of(
    st.sampled_from(
        (
            "",
            " ",
            "x" * 5000,
            "train.py " + "--learning-rate 0.1 " * 90,
            "数据" * 200,
            "/home/用户/模型/" * 40 + "训练.py",
            "é" * 300,  # combining
            "a\u200bb\u200d\ufeff" * 60,  # zero width
            "👩\u200d👩\u200d👧" * 50,
            "two\nlines\n\nand\tmore\r\n",
            "\x1b[31mred\x1b[0m\x1b]0;title\x07" * 9,
            "[bold]no markup[/bold] [/] [link=x]",
            "\u202eright to left\u2069",
        )
    ),
    st.text(max_size=120),
)


@pytest.fixture(scope="module")
def opened():
    opened = OpenApp(SIZE)
    yield opened
    opened.close()


@st.composite
def snapshots(draw):
    """A run in which every text that comes from the user is any text."""
    whole = draw(st.sampled_from(WHOLE))

    def text():
        return draw(TEXTS)

    info = whole.info
    names = [f"{text()}.{number}" for number in range(3)]
    renamed = {parameter.name: parameter.name for parameter in info.parameters}
    renamed |= dict(zip(list(renamed)[:3], names, strict=True))
    layer = {info.attention[0].layer: text()}

    def column_name(name):
        head, dot, last = name.rpartition(".")
        return f"{layer[head]}.{last}" if dot and head in layer else renamed.get(name, name)

    tables = tuple(
        msgspec.structs.replace(
            table,
            columns=tuple(
                msgspec.structs.replace(column, name=column_name(column.name))
                for column in table.columns
            ),
            optimizer=text() if table.optimizer else "",
        )
        for table in info.tables
    )
    history = MemoryHistory()
    for table in tables:
        history.declare(table)
        steps, values = whole.history.tables[table.id].tail(STEPS)
        if len(steps):
            rows = Rows(table.id, 0, len(steps), steps.tobytes(), values.tobytes())
            history.apply(rows)
    info = msgspec.structs.replace(
        info,
        revision=draw(st.integers(0, 10**9)),
        name=text(),
        title=text(),
        tables=tables,
        optimizers=(text(), *(text() for _ in range(draw(st.integers(0, 1))))),
        device=msgspec.structs.replace(info.device, name=text()),
        facts={text(): text(), "vocabulary": 96},
        item_unit=draw(st.sampled_from(("items", "数据" * 30))),
        parameters=tuple(
            msgspec.structs.replace(
                parameter, name=renamed[parameter.name], dtype=text(), optimizer=text()
            )
            if renamed[parameter.name] in names
            else parameter
            for parameter in info.parameters
        ),
        attention=(
            msgspec.structs.replace(
                info.attention[0], layer=layer[info.attention[0].layer], note=text()
            ),
            *info.attention[1:],
        ),
    )
    state = draw(st.sampled_from(("running", "paused", "crashed", "starting")))
    status = msgspec.structs.replace(
        whole.status,
        state=state,
        phase="backward",
        reason=text(),
        hint=text(),
        waiting_for=text(),
        viewers=("you",),
    )
    report = PhaseReport(STEPS, "backward", 1.0, text(), (Quantity(text(), text(), text()),))
    snapshot = replace(
        whole,
        info=info,
        status=status,
        history=history,
        events=(*whole.events, Notice(900, STEPS, 1e9, "mark", text(), "info", text())),
        log=(LogLine(0, 1e9, STEPS, "stdout", text()),),
        artifacts=(
            TextSample(0, STEPS, text(), text()),
            ConfusionMatrix(1, STEPS, (text(), text()), ((1, 2), (3, 4))),
        ),
        report=report if state == "paused" else None,
    )
    # As it comes from a connection.
    return replace(
        snapshot,
        info=sanitize_message(info),
        status=sanitize_message(status),
        events=sanitize_message(snapshot.events),
        log=sanitize_message(snapshot.log),
        artifacts=sanitize_message(snapshot.artifacts),
        report=sanitize_message(snapshot.report),
    )


PROGRAM_WORDS = {
    "dashboard": ("overhead 0.72 %", "steps/s", "zero_grad", "Wq Wk Wv", "train", "Quit"),
    "attention": ("overhead 0.72 %", "drift", "healthy", "heads", "Quit"),
    "parameters": (
        "overhead 0.72 %",
        "Parameters",
        "grad norm",
        "updated",
        "gradient norm",
        "Quit",
    ),
    "samples": ("overhead 0.72 %", "Quit"),
    "log": ("overhead 0.72 %", "events", "follow", "stdout", "Quit"),
    "help": ("overhead 0.72 %", "Learn about this ───", "Quit"),
}


@given(snapshot=snapshots())
@settings(
    max_examples=examples(15),
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
def test_no_text_of_the_user_hides_the_programs(opened, snapshot):
    for mode, shown in opened.draw(snapshot).items():
        lines = shown.split("\n")
        assert len(lines) == SIZE[1], mode
        assert all(cell_len(line) == SIZE[0] for line in lines), (mode, lines)
        assert not any(0x7F <= ord(sign) < 0xA0 or sign < " " for sign in "".join(lines)), mode
        if mode == "learn":  # of no run
            continue
        header = lines[0]
        assert snapshot.status.state in header, (mode, header)
        assert header.rstrip().endswith("live"), (mode, header)
        for words in PROGRAM_WORDS.get(mode, ("overhead 0.72 %", "Quit")):
            assert words in shown, (mode, words, shown)


def test_a_long_command_leaves_room_for_name_state_and_overhead(opened):
    whole = WHOLE[0]
    for command in ("train.py " + "--learning-rate 0.1 " * 90, "训练.py " * 90):
        for state in ("running", "paused"):
            status = msgspec.structs.replace(whole.status, state=state, phase="backward")
            info = msgspec.structs.replace(whole.info, title=command)
            header = opened.draw(replace(whole, info=info, status=status))["dashboard"][:80]
            for words in (command[:3], "…", "gpt-calm-otter", state, "overhead 0.72 %", "live"):
                assert words in header, (words, header)
