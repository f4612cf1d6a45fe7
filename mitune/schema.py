"""Plain values checked against annotations: what a YAML file says becomes frozen dataclasses, or one line that names the wrong key."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal

NAMES = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Range:
    """The closed interval [low, high] of a number; None is open."""

    low: float | None = None
    high: float | None = None

    def __contains__(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"at least {self.low}"
        return f"between {self.low} and {self.high}"


Count = Annotated[int, Range(1)]
Size = Annotated[int, Range(0)]
Index = Annotated[int, Range(0, 1000)]  # of a diffusion timestep
Steps = Annotated[int, Range(2, 1000)]
Scale = Annotated[float, Range(0.0)]
Rate = Annotated[float, Range(0.0, 0.99)]
Share = Annotated[float, Range(0.0, 1.0)]
Several = Annotated[int, Range(2)]
Positive = Annotated[float, Range(1e-6)]


def build(kind: Any, value: Any, where: str) -> Any:
    """`value` as an instance of the annotation `kind`; `where` is its dotted key. Raises ValueError, one line, naming the key."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return value if isinstance(value, kind) else _build_dataclass(kind, value, where)
    if origin is Annotated:
        number = build(arguments[0], value, where)
        if number not in arguments[1]:
            raise ValueError(f"{where} is {number}: it must be {arguments[1]}")
        return number
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}: it must be one of {', '.join(arguments)}")
        return value
    if origin is types.UnionType or origin is typing.Union:
        return None if value is None else build(next(option for option in arguments if option is not types.NoneType), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError(f"{where} is {value!r}: it must be a list of at least one entry")
        return tuple(build(arguments[0], entry, f"{where}[{n}]") for n, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping) or not value:
            raise ValueError(f"{where} is {value!r}: it must be a mapping of at least one key")
        return types.MappingProxyType({str(key): build(arguments[1], entry, f"{where}.{key}") for key, entry in value.items()})
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r}: it must be {NAMES[kind]}")
    return value


def _build_dataclass(kind: type, value: Any, where: str) -> Any:
    dot = f"{where}." if where else ""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}: it must be a mapping of {', '.join(field.name for field in fields(kind))}")
    names = {field.name for field in fields(kind)}
    for name in value:
        if name not in names:
            raise ValueError(f"unknown key {dot}{name}: {where or 'the file'} takes {', '.join(field.name for field in fields(kind))}")
    for field in fields(kind):
        if field.name not in value and field.default is MISSING:
            raise ValueError(f"missing key {dot}{field.name}: add it")
    hints = typing.get_type_hints(kind, include_extras=True)
    return kind(**{name: build(hints[name], entry, f"{dot}{name}") for name, entry in value.items()})
