"""`set`: change settings of a live run, undo the latest change, or list the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.text import Text

from tui_trainer.cli.commands.common import RunsDir, cli_errors, flag, require_single_run
from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.client.connection import RunClient
from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.live_settings import parse_changes
from tui_trainer.protocol.actions import Action, ChangeSettings, UndoSettings
from tui_trainer.protocol.formatting import counted
from tui_trainer.protocol.settings import ReadSettings, SettingList, setting_text
from tui_trainer.runs.liveness import RunEntry


def set_(
    *given: Annotated[
        str,
        Parameter(
            help="the run (default: the live one, if there is only one) and changes such as "
            "lr=3e-4, lr[1]=1e-3 (one parameter group), weight_decay=0.1, betas=0.9,0.95, clip=0.5 "
            "or off, batch_size=64, seed=7, freeze=blocks.0.*; without a change, the settings are "
            "listed",
            show_default=False,
        ),
    ],
    undo: Annotated[bool, flag("undo the latest change")] = False,
    json: Annotated[bool, flag("print the resulting settings as one JSON object")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """change settings of a live run at its next step boundary, or list them"""
    name, action = _parse(given, undo)
    with cli_errors():
        found = require_single_run(name, runs_dir)
        with RunClient.connect(found, "tui-trainer set", read_only=action is None) as client:
            if action is not None:
                ack = client.command_in_control(action)
                if not ack.ok:
                    raise CommandError(f"{found.name} refuses: {ack.message}", ack.hint)
                if not json:
                    print(f"{found.name}: {ack.message}", flush=True)
                    return 0
            settings = _settings(client, found)
    if json:
        print(msgspec.json.encode(_document(found, settings)).decode(), flush=True)
    else:
        print("\n".join(_listing(settings)), flush=True)
    return 0


def _parse(given: tuple[str, ...], undo: bool) -> tuple[str | None, Action | None]:
    """The run's name and the command. Raises UsageError."""
    changes = [each for each in given if "=" in each]
    names = [each for each in given if "=" not in each]
    if len(names) > 1:
        raise UsageError(f"{names[1]!r} is not a change of a setting", "for example lr=3e-4")
    if undo and changes:
        raise UsageError("--undo takes no changes", "tui-trainer set RUN --undo")
    action: Action | None = UndoSettings() if undo else None
    if changes:
        try:
            action = ChangeSettings(parse_changes(changes))
        except ConfigurationError as error:
            raise UsageError(error.message, error.hint) from error
    return (names[0] if names else None), action


def _settings(client: RunClient, run: RunEntry) -> SettingList:
    """Raises CommandError."""
    answer = client.inspect(ReadSettings())
    if not isinstance(answer.result, SettingList):
        raise CommandError(f"{run.name}: {answer.message}", answer.hint)
    return answer.result


def _document(run: RunEntry, settings: SettingList) -> dict[str, object]:
    return {
        "run": run.name,
        "directory": str(Path(run.directory)),
        "settings": {each.name: each.value for each in settings.settings},
        "frozen_parameters": settings.frozen,
        "edits_to_undo": settings.edits,
        "waiting": list(settings.waiting),
    }


def _listing(settings: SettingList) -> list[str]:
    table = new_table(("setting", "value", ""), right=("value",))
    for each in settings.settings:
        table.add_row(Text(each.name), Text(setting_text(each.value)), Text(each.note))
    lines = [line.plain.rstrip() for line in table_lines(table)]
    if settings.frozen:
        lines.append(f"{counted(settings.frozen, 'parameter')} frozen")
    lines += [f"at the end of this step: {each}; --undo withdraws it" for each in settings.waiting]
    if settings.edits:
        lines.append(f"{counted(settings.edits, 'change')} can be undone: --undo")
    return lines
