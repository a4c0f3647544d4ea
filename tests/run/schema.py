"""The part of JSON Schema that docs/json-lines.schema.json uses; anything else is an error."""

from __future__ import annotations

import json
from pathlib import Path

SCHEMA = json.loads(
    (Path(__file__).parents[2] / "docs" / "json-lines.schema.json").read_text(encoding="utf-8")
)
KNOWN = {
    *("$schema", "title", "$defs", "type", "required", "oneOf", "$ref", "const", "enum"),
    *("properties", "additionalProperties", "items"),
}
TYPES = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
}


def faults(value, schema=SCHEMA, path="$"):
    """The errors of `value`, as texts."""
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    if "$ref" in schema:
        return faults(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], path)
    found = []
    allowed = schema.get("type", list(TYPES))
    allowed = [allowed] if isinstance(allowed, str) else allowed
    if not any(TYPES[name](value) for name in allowed):
        return [f"{path}: {value!r} is no {' or '.join(allowed)}"]
    if "const" in schema and value != schema["const"]:
        found.append(f"{path}: {value!r} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path}: {value!r} is none of {schema['enum']}")
    if "oneOf" in schema:
        tries = [faults(value, one, path) for one in schema["oneOf"]]
        if sum(not one for one in tries) != 1:
            found += min(tries, key=len) or [f"{path}: matches several"]
    if isinstance(value, dict):
        found += [
            f"{path}: lacks {name}" for name in schema.get("required", ()) if name not in value
        ]
        named, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        for name, held in value.items():
            if name in named:
                found += faults(held, named[name], f"{path}.{name}")
            elif others is False:
                found.append(f"{path}: {name} is not described")
            elif others is not True:
                found += faults(held, others, f"{path}.{name}")
    if isinstance(value, list) and "items" in schema:
        for index, held in enumerate(value):
            found += faults(held, schema["items"], f"{path}[{index}]")
    return found
