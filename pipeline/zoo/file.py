"""Read a zoo file; every error names the file, the field and what is allowed, and all of them are told at once."""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lorc_core.errors import ConfigError
from pipeline.zoo.consistency import Parts, contradictions
from pipeline.zoo.schema import Zoo, with_methods
from pipeline.zoo.sections import Calibration, Evaluation, ModelEntry
from pipeline.zoo.variants import NO_BUDGET, VariantEntry
from pipeline.zoo.yaml_reader import read_yaml

# Errors that follow from others: a default that needs a wrong field, a list short of its wrong entries.
FOLLOWING = ("default_factory_not_called",)
Section = TypeVar("Section", bound=BaseModel)


def load_zoo(path: Path | str) -> Zoo:
    """Read and check a zoo file.

    Raises:
        ConfigError: The file cannot be read (see `read_yaml`), or fields are wrong; one line for each thing that is.
    """
    path = Path(path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping with the fields {', '.join(Zoo.model_fields)}")
    context = {"folder": path.resolve().parent}
    try:
        return Zoo.model_validate(content, context=context)
    except ValidationError as error:
        problems = [line for problem in root_problems(error) for line in described(problem)]
        problems += contradictions(readable_parts(with_methods(content), context))
        raise ConfigError("\n".join(f"{path}: {line}" for line in dict.fromkeys(problems))) from error


def load_checked(path: Path | str, schema: type[Section], what: str) -> Section:
    """Read and check a file that is not a zoo file, as strictly.

    Args:
        path: Of a YAML or JSON file; paths within are relative to its folder.
        schema: What it may say.
        what: It is, in messages.

    Raises:
        ConfigError: The file cannot be read (see `read_yaml`), or fields are wrong; one line for each thing that is.
    """
    path = Path(path)
    content = read_yaml(path, what)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping with the fields {', '.join(schema.model_fields)}")
    try:
        return schema.model_validate(content, context={"folder": path.resolve().parent})
    except ValidationError as error:
        lines = [line for problem in root_problems(error) for line in described(problem, schema)]
        raise ConfigError("\n".join(f"{path}: {line}" for line in dict.fromkeys(lines))) from error


def readable_parts(content: dict[str, Any], context: dict[str, Any]) -> Parts:
    """What of a zoo file can be used although some of it is wrong, to tell how that fits together."""

    def entries(section: type[Section], name: str) -> list[Section]:
        listed = content.get(name)
        read = (readable(section, entry, context) for entry in (listed if isinstance(listed, list) else []))
        return [entry for entry in read if entry is not None]

    return Parts(
        models=entries(ModelEntry, "models"),
        variants=entries(VariantEntry, "variants"),
        calibration=readable(Calibration, content.get("calibration"), context),
        evaluation=readable(Evaluation, content.get("evaluation"), context),
        has_calibration=content.get("calibration") is not None,
    )


def readable(section: type[Section], written: Any, context: dict[str, Any]) -> Section | None:
    """A section, unless something in it is wrong."""
    try:
        return section.model_validate(written, context=context)
    except ValidationError:
        return None


def root_problems(error: ValidationError) -> list[Any]:
    """pydantic's errors without those that only follow from others."""
    problems = error.errors()
    misspelt = {problem["loc"][:-1] for problem in problems if problem["type"] == "extra_forbidden"}

    def follows(problem: Any) -> bool:
        inside = (other["loc"][: len(problem["loc"])] == problem["loc"] for other in problems if other is not problem)
        return (
            problem["type"] in FOLLOWING
            or (problem["type"] == "too_short" and any(inside))
            or (problem["type"] == NO_BUDGET and problem["loc"][:-1] in misspelt)
        )

    return [problem for problem in problems if not follows(problem)]


def described(problem: Any, schema: type[BaseModel] = Zoo) -> Iterator[str]:
    """One pydantic error, a line for each thing that it tells: the field, what is allowed, what was given."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        allowed = fields_at(problem["loc"][:-1], schema)
        meant = get_close_matches(str(problem["loc"][-1]), allowed, n=1)
        guess = f"did you mean {meant[0]}? " if meant else ""
        yield f"{where}: unknown field; {guess}allowed here are {', '.join(allowed)}"
        return
    told = problem["type"] == "missing" or isinstance(problem["input"], dict)  # what is wrong in it is told by name
    given = "" if told else f", got {problem['input']!r}"
    for message in problem["msg"].removeprefix("Value error, ").splitlines():
        quoted = isinstance(problem["input"], str) and repr(problem["input"]) in message
        ending = "" if len(given) > 100 or quoted else given
        yield f"{where + ': ' if where else ''}{message[0].lower() + message[1:].removesuffix('.')}{ending}"


def fields_at(location: tuple[int | str, ...], schema: type[BaseModel]) -> list[str]:
    """Field names of the part of a file that a pydantic error location points into."""
    model = schema
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = nested_model(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside a type such as Annotated[tuple[Model, ...], ...] or Model | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inside = (nested_model(argument) for argument in getattr(annotation, "__args__", ()))
    return next((model for model in inside if model is not None), None)
