from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from tui_trainer.protocol.events import Clip, LogLine, Notice
from tui_trainer.protocol.messages import Status, Update
from tui_trainer.protocol.schema import Column, ParameterInfo, RunInfo, Table
from tui_trainer.protocol.text import (
    sanitize,
    sanitize_message,
    single_line,
    truncate,
    truncate_middle,
)

HOSTILE = "a\x1b]0;title\x07\x1b[2J\x9bH\x7f\ud800 b\r\n\tc\u009d"


def controls(text):
    return [c for c in text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]


@given(st.text(st.characters(exclude_categories=())))
def test_no_text_holds_a_control_character_after(text):
    for made in (sanitize(text), single_line(text, 100)):
        assert not controls(made)
        made.encode()  # no half of a surrogate pair either
    assert len(single_line(text, 100)) <= 100
    assert "\n" not in single_line(text, 100)


def test_harmless_text_is_unchanged():
    for text in ("", "γράμμα 字 👩‍🔬", "two\nlines\tand a tab"):
        assert sanitize(text) is text
    status = Status(state="running", viewers=("me",))
    assert sanitize_message(status) is status
    assert sanitize("Windows\r\nlines") == "Windows\nlines"


def test_every_text_of_a_message_is_made_harmless():
    info = RunInfo(
        HOSTILE,
        "gpt",
        title=HOSTILE,
        configuration={HOSTILE: HOSTILE},
        parameters=(ParameterInfo(HOSTILE, (1,), "float32", 1),),
        tables=(Table(0, "step", (Column(HOSTILE),)),),
    )
    update = Update(
        Status(reason=HOSTILE, viewers=(HOSTILE,)),
        info,
        events=(Notice(0, 1, 0.0, "mark", HOSTILE, who=HOSTILE), Clip(1, 1, 0.0, 1.0, 2.0, 0.5)),
        log=(LogLine(0, 0.0, 1, "stdout", HOSTILE),),
    )
    cleaned = sanitize_message(update)
    assert not controls(str(msgspec.to_builtins(cleaned)).replace("\\n", ""))
    assert "\\x1b" not in repr(cleaned)
    assert cleaned.events[1] is update.events[1]
    msgspec.msgpack.encode(cleaned)


WIDE = st.text(st.sampled_from("ab字👩é·/"), max_size=60)


@given(WIDE, st.integers(0, 30))
def test_truncated_text_fits_in_its_cells(text, width):
    for cut in (truncate(text, width), truncate_middle(text, width)):
        assert cell_len(cut) <= max(width, 1)
        assert cut == text or cell_len(text) > width


def test_the_ends_of_a_name_are_kept():
    assert truncate_middle("blocks.0.attention.W_query.weight", 15) == "bloc…ery.weight"
    assert truncate_middle("字" * 8, 9) == "字…字字字"
