"""How configurations are written on screen and in logs."""

from dataclasses import MISSING, Field, fields
from typing import Any


def configuration_repr(configuration: Any) -> str:
    """A dataclass as it would be made: `Energy(spectrum='states')`, without fields that have their defaults."""
    shown = [
        f"{field.name}={getattr(configuration, field.name)!r}"
        for field in fields(configuration)
        if field.init and field.repr and getattr(configuration, field.name) != default_of(field)
    ]
    return f"{type(configuration).__name__}({', '.join(shown)})"


def default_of(field: Field) -> Any:
    """A field's default; MISSING, which equals nothing else, where it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()
