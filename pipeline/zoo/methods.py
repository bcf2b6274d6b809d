"""Methods and schedules as a zoo file writes them: names, or mappings of a dataclass's fields.

Every error is a ValueError, which pydantic turns into a line that names the field; it tells all that is wrong there.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lorc_core.methods import METHODS, Axes, Method, Training, known_method
from lorc_core.model.kinds import KINDS, Kind
from lorc_core.ranks.schedule import Schedule
from lorc_core.ranks.schedules import SCHEDULES, known_schedule

MAX_LAYERS = 1000  # of a model that can be read at all
METHOD_FIELDS = ("preset", "name", *KINDS, "per_layer", "training")
Settings = TypeVar("Settings")


class Problems:
    """Gathers what is wrong with the parts of one thing, to be told together."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A ValueError of the block is kept for later."""
        try:
            yield
        except ValueError as error:
            self.messages.append(str(error))

    def tell(self) -> None:
        """Raise ValueError if anything was wrong."""
        if self.messages:
            raise ValueError("; ".join(self.messages))


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
    mapping = mapping_of(written, "a method, if not a name,", METHOD_FIELDS)
    problems = Problems()
    base, layers, training = None, {}, None
    axes: dict[str, Axes] = {}
    with problems.gathered():
        check_fields(mapping, "a method, if not a name,", METHOD_FIELDS)
    with problems.gathered():
        check_method_name(mapping.get("name"))
    with problems.gathered():
        base = preset_of(mapping.get("preset"))
        training = base.training if base else None
        for kind in KINDS:
            with problems.gathered():
                axes[kind] = axes_of(mapping.get(kind, {}), kind, base)
    with problems.gathered():
        layers = methods_by_layer(mapping.get("per_layer", {}))
    with problems.gathered():
        training = settings_of(Training, mapping["training"], "training") if "training" in mapping else training
    problems.tell()
    keys, values = (axes[kind] for kind in KINDS)
    base = base or Method(mapping["name"], keys, values, known_schedule("uniform"), source="the zoo file")
    return replace(base, name=mapping["name"], keys=keys, values=values, layers=layers, training=training)


def check_method_name(name: Any) -> None:
    """Raise ValueError unless a method that is no preset can be called so."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in METHODS:
        raise ValueError("a method that is no preset needs a name of its own, of letters, digits, '.', '_' and '-'")


def preset_of(name: Any) -> Method | None:
    """The preset that a method changes; None where it names none."""
    if name is not None and not isinstance(name, str):
        raise ValueError(f"preset is the name of a method; got {name!r}")
    return None if name is None else known_method(name)


def axes_of(written: Any, kind: Kind, base: Method | None) -> Axes:
    """Axes, from the fields that differ from those of a preset or, without one, from their defaults."""
    given = mapping_of(written, kind, [field.name for field in fields(Axes)])
    return settings_of(Axes, given if base is None else {**asdict(base.axes(-1, kind)), **given}, kind)


def methods_by_layer(written: Any) -> dict[int, Method]:
    """Methods by layer, from a mapping of `3` or `"0-2"` to methods."""
    if not isinstance(written, Mapping):
        raise ValueError(f'per_layer is a mapping of layers (3, or "0-2") to methods; got {written!r}')
    problems = Problems()
    methods: dict[int, Method] = {}
    for place, of_layers in written.items():
        with problems.gathered():
            layers = layers_at(place)
            method = method_of(of_layers)
            if method.layers or methods.keys() & set(layers):
                raise ValueError(f"per_layer: {place!r}: a layer has one method, which has no layers of its own")
            methods |= dict.fromkeys(layers, method)
    problems.tell()
    return methods


def layers_at(place: Any) -> range:
    """The layers that `3` or `"0-2"` means."""
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", str(place))
    layers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if not layers or layers[-1] >= MAX_LAYERS:
        raise ValueError(f"per_layer: {place!r} is no layer (3) and no range of layers (0-2) below {MAX_LAYERS}")
    return layers


def settings_of(settings_class: type[Settings], written: Any, name: str) -> Settings:
    """A frozen dataclass; pydantic checks the types of its fields but would let unknown ones pass."""
    allowed = [field.name for field in fields(settings_class) if field.init]  # type: ignore[arg-type]
    given = mapping_of(written, name, allowed)
    problems = Problems()
    with problems.gathered():
        check_fields(given, name, allowed)
    try:
        settings = TypeAdapter(settings_class).validate_python(given)
    except ValidationError as error:
        for problem in error.errors():
            where = ".".join([name, *map(str, problem["loc"])])
            problems.messages.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}")
    problems.tell()
    return settings


def mapping_of(written: Any, name: str, allowed: Sequence[str]) -> Mapping[str, Any]:
    """`written`, if it is a mapping."""
    if not isinstance(written, Mapping):
        raise ValueError(f"{name} is a mapping with {', '.join(allowed)}; got {written!r}")
    return written


def check_fields(written: Mapping[str, Any], name: str, allowed: Sequence[str]) -> None:
    """Raise ValueError if there are any but the allowed fields."""
    if unknown := sorted(map(str, set(written) - set(allowed))):
        what = "unknown field" if len(unknown) == 1 else "unknown fields"
        raise ValueError(f"{what} {', '.join(map(repr, unknown))}; {name} allows {', '.join(allowed)}")
