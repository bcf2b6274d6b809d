"""Checks the annotations of a function when it is called, shapes among them, as `jaxtyping.jaxtyped` does.

That one binds the arguments through `inspect` and checks them twice, which took half of the time of the tests that decode
tiny models (jaxtyping 0.3.11). Here they are checked once, and sizes are remembered only where annotations name some.
"""

import dataclasses
import functools
import inspect
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped

SIZES = jaxtyped("context")  # what the names of sizes stand for, from the arguments to the result


def checked(annotated=None, **_):
    """A decorator for functions and dataclasses, with or without arguments."""
    if annotated is None:
        return checked
    if not inspect.isclass(annotated):
        return checked_function(annotated)
    if dataclasses.is_dataclass(annotated) and "__init__" in vars(annotated):
        annotated.__init__ = checked_function(annotated.__init__)
    return annotated


def checked_function(function):
    hints = {name: resolved(hint, function.__globals__) for name, hint in function.__annotations__.items()}
    function.__annotations__ = hints
    function = beartype(function)
    return with_sizes(function) if any(map(names_sizes, hints.values())) else function


def with_sizes(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with SIZES:
            return function(*args, **kwargs)

    return call


def resolved(hint, names):
    """A string's meaning, or anything where it names what only a type checker imports."""
    try:
        return get_type_hints(SimpleNamespace(__annotations__={"hint": hint}), names, include_extras=True)["hint"]
    except NameError:
        return Any


def names_sizes(hint):
    return (inspect.isclass(hint) and issubclass(hint, AbstractArray)) or any(map(names_sizes, get_args(hint)))
