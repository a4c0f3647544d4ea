"""Options: dataclass fields with a help text, a group, a unit, choices and bounds.

The command line makes its flags from them and the start screen its form. Both pass what the user
typed to `parse`, so that they report the same errors.
"""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Union, cast

from tui_trainer.config.errors import ConfigurationError, did_you_mean
from tui_trainer.protocol.schema import Scalar

OptionKind = Literal["int", "float", "bool", "str"]
TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")


@dataclass(frozen=True)
class Option:
    """One setting."""

    name: str
    """Name of the field."""
    kind: OptionKind
    default: Scalar
    help: str
    group: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    """Exclusive lower bound."""
    below: float | None = None
    """Exclusive upper bound."""
    optional: bool = False
    """Whether the value may be None, which means that it is not set."""

    @property
    def flag(self) -> str:
        """The flag on the command line, such as `--batch-size`."""
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
    """A dataclass field that is an option; its type gives the kind and the choices."""
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
    """The options of a configuration class, in the order of declaration, base class first."""
    return _options_of(config)  # mypy calls a class with fields unhashable


@functools.cache
def _options_of(config: type) -> tuple[Option, ...]:
    hints = typing.get_type_hints(config)
    return tuple(
        Option(
            item.name,
            **_type_of(hints[item.name]),
            default=cast(Scalar, item.default),
            **item.metadata,
        )
        for item in fields(config)
        if "help" in item.metadata
    )


def _type_of(hint: Any) -> dict[str, Any]:
    optional = False
    if typing.get_origin(hint) in (Union, types.UnionType):
        members = [part for part in typing.get_args(hint) if part is not type(None)]
        optional, hint = len(members) < len(typing.get_args(hint)), members[0]
    if typing.get_origin(hint) is Literal:
        return {"kind": "str", "choices": typing.get_args(hint), "optional": optional}
    return {"kind": hint.__name__, "optional": optional}


def parse(option: Option, value: Scalar) -> Scalar:
    """Convert `value`, which may be a text that the user typed, to the option's type.

    Raises ConfigurationError if it cannot be converted or is out of bounds.
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
                f"{option.flag} cannot be {value!r}", did_you_mean(str(value), option.choices)
            )
        return str(value)
    return _parse_number(option, value)


def value_text(value: Scalar) -> str:
    """A value as the text of its field; `typed_value` and `parse` turn it back into the value."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value).replace("\n", "\\n")


def typed_value(option: Option, text: str | bool) -> str | bool:
    """The text of a field for `parse`: `\\n` becomes a line break in options that may contain one,
    such as a prompt."""
    if isinstance(text, str) and "\n" in str(option.default):
        return text.replace("\\n", "\n")
    return text


def _parse_bool(option: Option, value: Scalar) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().casefold()
    if word in TRUE_WORDS + FALSE_WORDS:
        return word in TRUE_WORDS
    raise ConfigurationError(f"{option.flag} cannot be {value!r}", _expected(option))


def _parse_number(option: Option, value: Scalar) -> int | float:
    error = ConfigurationError(f"{option.flag} cannot be {value!r}", _expected(option))
    if isinstance(value, bool):
        raise error
    try:
        number = float(cast("str | float", value))
        if option.kind == "int":
            # 1e4 and 10_000 are accepted as integers; from 2**53 on a float would lose digits.
            exact = int(value) if isinstance(value, (int, str)) and _is_int(value) else int(number)
            if exact != number:
                raise error
    except (ValueError, OverflowError):
        raise error from None
    result: int | float = exact if option.kind == "int" else number
    if not math.isfinite(number) or not _is_within_bounds(option, number):
        raise error
    return result


def _is_int(value: int | str) -> bool:
    try:
        int(value)
    except ValueError:
        return False
    return True


def _is_within_bounds(option: Option, number: float) -> bool:
    return (
        (option.minimum is None or number >= option.minimum)
        and (option.maximum is None or number <= option.maximum)
        and (option.above is None or number > option.above)
        and (option.below is None or number < option.below)
    )


def _expected(option: Option) -> str:
    """Such as `expected a whole number, at least 1`."""
    if option.choices:
        return "choose from " + ", ".join(option.choices)
    kinds = {"int": "a whole number", "float": "a number", "bool": "on or off", "str": "a text"}
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
    return f"expected {kinds[option.kind]}" + (", " + " and ".join(bounds) if bounds else "")


UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(?:I?B)?\s*\Z", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of `512MB`, `1.5G`, `0`; units are powers of 1024. Raises ConfigurationError."""
    match = _SIZE.match(text)
    value = float(match[1]) * UNITS[match[2].upper()] if match else math.inf
    if not value < 2**60:
        raise ConfigurationError(f"{text!r} is not an amount of memory", "for example 512MB or 2GB")
    return int(value)
