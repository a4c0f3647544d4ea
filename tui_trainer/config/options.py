"""What a field of a configuration says of itself: help, group, unit, choices and bounds.

The command line makes its flags, the start screen its form and `resolve` its checks from this.
"""

from __future__ import annotations

import math
import types
import typing
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Union, cast

from tui_trainer.config.errors import ConfigurationError, near_miss
from tui_trainer.protocol.schema import Scalar

Kind = Literal["int", "float", "bool", "str"]
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


@dataclass(frozen=True)
class Option:
    """One setting, as people see it."""

    name: str
    """The field's name; the flag is `--` and this with hyphens."""
    kind: Kind
    default: Scalar
    help: str
    group: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    """An open lower bound: the value must be greater."""
    below: float | None = None
    optional: bool = False
    """Whether None (unset) is a value."""

    @property
    def flag(self) -> str:
        """The long flag on the command line."""
        return "--" + self.name.replace("_", "-")


def option(
    default: Any,
    help: str,
    *,
    group: str,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that describes itself."""
    metadata = {
        "help": help,
        "group": group,
        "unit": unit,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
    }
    return field(default=default, metadata=metadata)


def options_of(config: type) -> tuple[Option, ...]:
    """The options of a configuration class, in order of declaration, base class first."""
    hints = typing.get_type_hints(config)
    return tuple(
        Option(
            item.name,
            **_shape_of(hints[item.name]),
            default=cast(Scalar, item.default),
            **item.metadata,
        )
        for item in fields(config)
        if "help" in item.metadata
    )


def _shape_of(hint: Any) -> dict[str, Any]:
    optional = False
    if typing.get_origin(hint) in (Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        optional, hint = len(inner) < len(typing.get_args(hint)), inner[0]
    if typing.get_origin(hint) is Literal:
        return {"kind": "str", "choices": typing.get_args(hint), "optional": optional}
    return {"kind": hint.__name__, "optional": optional}


def parse(option: Option, value: Scalar) -> Scalar:
    """`value` (typed, or as typed by a person) as the option's type, checked against its bounds.

    Raises ConfigurationError.
    """
    blank = isinstance(value, str) and not (value if option.kind == "str" else value.strip())
    if value is None or (blank and option.optional):
        if option.optional:
            return None
        raise ConfigurationError(f"{option.flag} needs a value", _expected(option))
    if option.kind == "bool":
        return _parse_bool(option, value)
    if option.kind == "str":
        if option.choices and str(value) not in option.choices:
            raise ConfigurationError(
                f"{option.flag} cannot be {value!r}", near_miss(str(value), option.choices)
            )
        return str(value)
    return _parse_number(option, value)


def _parse_bool(option: Option, value: Scalar) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().casefold()
    if word in _TRUE + _FALSE:
        return word in _TRUE
    raise ConfigurationError(f"{option.flag} cannot be {value!r}", "it is on or off")


def _parse_number(option: Option, value: Scalar) -> int | float:
    refusal = ConfigurationError(f"{option.flag} cannot be {value!r}", _expected(option))
    if isinstance(value, bool):
        raise refusal
    try:
        number = float(cast("str | float", value))
        if option.kind == "int":
            # 1e4 and 10_000 are integers to a person; 2**63 and up would lose digits as a float.
            exact = int(value) if isinstance(value, (int, str)) and _is_int(value) else int(number)
            if exact != number:
                raise refusal
    except (ValueError, OverflowError):
        raise refusal from None
    result: int | float = exact if option.kind == "int" else number
    if not math.isfinite(number) or not _within(option, number):
        raise refusal
    return result


def _is_int(value: int | str) -> bool:
    try:
        int(value)
    except ValueError:
        return False
    return True


def _within(option: Option, number: float) -> bool:
    return (
        (option.minimum is None or number >= option.minimum)
        and (option.maximum is None or number <= option.maximum)
        and (option.above is None or number > option.above)
        and (option.below is None or number < option.below)
    )


def _expected(option: Option) -> str:
    if option.choices:
        return "it is one of " + ", ".join(option.choices)
    words = {"int": "a whole number", "float": "a number", "bool": "on or off", "str": "a text"}
    bounds = [
        f"{word} {limit:g}"
        for word, limit in (
            ("at least", option.minimum),
            ("greater than", option.above),
            ("at most", option.maximum),
            ("less than", option.below),
        )
        if limit is not None
    ]
    return " ".join(["it is", words[option.kind], " and ".join(bounds)]).rstrip()
