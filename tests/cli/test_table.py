"""Tables in the terminal: aligned by cells, never cut off."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from tui_trainer.cli.run_summary import hanging
from tui_trainer.cli.table import columns, new_table, table_lines


def test_wide_characters_and_numbers_are_aligned():
    table = new_table(["RUN", "STEP", "WHAT"], right=["STEP"])
    table.add_row(Text("alpha"), Text("7"), Text("gpt"))
    table.add_row(Text("损失"), Text("12,345"), Text("vit"))
    assert [line.plain for line in table_lines(table)] == [
        "RUN      STEP  WHAT",
        "alpha       7  gpt",
        "损失   12,345  vit",
    ]


def test_nothing_is_cut_off_and_no_line_ends_in_spaces():
    long = "x" * 400
    table = columns("left", "left")
    table.add_row(Text(long), Text(""))
    table.add_row(Text("[a]"), Text("b"))
    assert [line.plain for line in table_lines(table)] == [long, "[a]" + " " * 399 + "b"]


def test_columns_keep_their_least_width():
    table = columns("left", "right", least=[8, 4])
    table.add_row(Text("loss"), Text("1.5"))
    (line,) = table_lines(table)
    assert line.plain == "loss       1.5"


def test_a_line_that_is_too_long_goes_on_under_its_text():
    line = Text.assemble(("step 61  ", "dim"), "gradient became nan in a.weight, seen at step 61")
    rows = hanging(line, 9, Console(width=42))
    assert [row.plain for row in rows] == [
        "step 61  gradient became nan in a.weight,",
        "         seen at step 61",
    ]
    assert hanging(line, 9, Console(width=80)) == [line]
