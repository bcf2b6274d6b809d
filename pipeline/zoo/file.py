"""Read a zoo file; every error names the file, the field and what is allowed."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lorc_core.errors import ConfigError
from pipeline.zoo.schema import Zoo


def load_zoo(path: Path | str) -> Zoo:
    """Read and check a zoo file.

    Raises:
        ConfigError: The file is absent, is not YAML, or a field is wrong; one line per wrong field.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"zoo file {path} does not exist")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping with the fields {', '.join(Zoo.model_fields)}")
    try:
        return Zoo.model_validate(content, context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise ConfigError("\n".join(describe(path, problem) for problem in root_problems(error))) from error


def root_problems(error: ValidationError) -> list[Any]:
    """pydantic's errors without those of a list that is only too short because its entries are wrong."""
    problems = error.errors()

    def follows(problem: Any) -> bool:
        inside = (other["loc"][: len(problem["loc"])] == problem["loc"] for other in problems if other is not problem)
        return problem["type"] == "too_short" and any(inside)

    return [problem for problem in problems if not follows(problem)]


def describe(path: Path, problem: Any) -> str:
    """One pydantic error as one line: file, field, what was found, what is allowed."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        allowed = ", ".join(fields_at(problem["loc"][:-1]))
        return f"{path}: {where}: unknown field; allowed here are {allowed}"
    found = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
    message = problem["msg"].removeprefix("Value error, ").removesuffix(".")
    quoted = isinstance(problem["input"], str) and repr(problem["input"]) in message
    if len(found) > 100 or quoted:
        found = ""
    return f"{path}: {where + ': ' if where else ''}{message[0].lower() + message[1:]}{found}"


def fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the part of a zoo file that a pydantic error location points into."""
    model: type[BaseModel] = Zoo
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = nested_model(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside a type such as Annotated[tuple[Model, ...], ...] or Model | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := nested_model(argument):
            return found
    return None
