"""Methods and schedules as a zoo file writes them: names, or mappings of a dataclass's fields.

Every error is a ValueError, which pydantic turns into a line that names the field.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lorc_core.methods import METHODS, Axes, Method, Training, known_method
from lorc_core.model.kinds import KINDS, Kind
from lorc_core.ranks.schedules import SCHEDULES, Schedule, known_schedule

METHOD_FIELDS = ("preset", "name", *KINDS, "per_layer", "training")
Settings = TypeVar("Settings")


def schedule_of(written: Any) -> Schedule:
    """A schedule, from its name or from a mapping with its name and fields."""
    settings = dict(written) if isinstance(written, Mapping) else {"name": written}
    name = settings.pop("name", None)
    if not isinstance(name, str):
        known = ", ".join(sorted(SCHEDULES))
        raise ValueError(f"a schedule is a name, or a mapping with a name and fields; known are {known}")
    return settings_of(type(known_schedule(name)), settings, name)


def method_of(written: Any) -> Method:
    """A method, from a preset's name or from a mapping.

    A mapping has a `name` and a `preset` with changed axes of `keys` and `values`, or both written out; `per_layer`
    has methods for single layers, `training` settings of training.
    """
    if isinstance(written, str):
        return known_method(written)
    mapping = fields_of(written, "a method, if not a name,", METHOD_FIELDS)
    name, preset = mapping.get("name"), mapping.get("preset")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in METHODS:
        raise ValueError("a method that is no preset needs a name of its own, of letters, digits, '.', '_' and '-'")
    if preset is not None and not isinstance(preset, str):
        raise ValueError(f"preset is the name of a method; got {preset!r}")
    base = None if preset is None else known_method(preset)
    keys, values = (axes_of(mapping.get(kind, {}), kind, base) for kind in KINDS)
    if base is None:
        base = Method(name, keys, values, known_schedule("uniform"), source="the zoo file")
    layers = methods_by_layer(mapping.get("per_layer", {}))
    training = settings_of(Training, mapping["training"], "training") if "training" in mapping else base.training
    return replace(base, name=name, keys=keys, values=values, layers=layers, training=training)


def axes_of(written: Any, kind: Kind, base: Method | None) -> Axes:
    """Axes, from the fields that differ from those of a preset or, without one, from their defaults."""
    given = fields_of(written, kind, [one.name for one in fields(Axes)])
    return settings_of(Axes, given if base is None else {**asdict(base.axes(-1, kind)), **given}, kind)


def methods_by_layer(written: Any) -> dict[int, Method]:
    """Methods by layer, from a mapping of `3` or `"0-2"` to methods."""
    if not isinstance(written, Mapping):
        raise ValueError(f'per_layer is a mapping of layers (3, or "0-2") to methods; got {written!r}')
    layers: dict[int, Method] = {}
    for at, one in written.items():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(at))
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not found:
            raise ValueError(f"per_layer: {at!r} is no layer (3) and no range of layers (0-2)")
        method = method_of(one)
        if method.layers or layers.keys() & set(found):
            raise ValueError(f"per_layer: {at!r}: a layer has one method, which has no layers of its own")
        layers |= dict.fromkeys(found, method)
    return layers


def settings_of(settings_class: type[Settings], written: Any, name: str) -> Settings:
    """A frozen dataclass; pydantic checks the types of its fields but would let unknown ones pass."""
    given = fields_of(written, name, [field.name for field in fields(settings_class) if field.init])  # type: ignore
    try:
        return TypeAdapter(settings_class).validate_python(given)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join([name, *map(str, problem["loc"])])
        raise ValueError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from error


def fields_of(written: Any, name: str, allowed: Sequence[str]) -> Mapping[str, Any]:
    """`written`, if it is a mapping with none but the allowed fields."""
    if not isinstance(written, Mapping):
        raise ValueError(f"{name} is a mapping with {', '.join(allowed)}; got {written!r}")
    if unknown := sorted(map(str, set(written) - set(allowed))):
        raise ValueError(f"unknown field {unknown[0]!r}; {name} allows {', '.join(allowed)}")
    return written
