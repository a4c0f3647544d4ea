"""Style sheets are parsed once for all apps, which saves a fifth of a screen test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from textual.css.model import RuleSet
from textual.css.stylesheet import Stylesheet


@pytest.fixture(autouse=True, scope="session")
def parse_style_sheets_once() -> Iterator[None]:
    """Rules depend only on the arguments and the variables, and are never changed."""
    parse, parsed = Stylesheet._parse_rules, dict[Any, list[RuleSet]]()

    def look_up(self: Stylesheet, *arguments: Any, **named: Any) -> list[RuleSet]:
        key = arguments, tuple(sorted(named.items())), tuple(sorted(self._variables.items()))
        if key not in parsed:
            parsed[key] = parse(self, *arguments, **named)
        return parsed[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stylesheet, "_parse_rules", look_up)
        yield
