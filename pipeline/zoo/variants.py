"""The variants that a zoo file asks for: methods, schedules, and budgets as shares of the cache or as bytes."""

from typing import Annotated, Any

from pydantic import Field, InstanceOf, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from lorc_core.methods import Method
from lorc_core.ranks.schedule import Schedule
from pipeline.zoo.methods import method_of, schedule_of
from pipeline.zoo.sections import GIB, MOST, Name, Strict

KeptFraction = Annotated[float, Field(gt=0, le=1)]
NO_BUDGET = "no_budget"  # the error of an entry that has none; a misspelt field of it may have been meant as one


class Budget(Strict):
    """Memory for the cache and the factors beside it, at a serving load; the weights are not counted."""

    memory_gib: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(ge=1, le=MOST)]
    context_tokens: Annotated[int, Field(ge=1, le=MOST)]

    @property
    def memory_bytes(self) -> int:
        return round(self.memory_gib * GIB)


class VariantEntry(Strict):
    """One method and schedule at one budget or, with a list, at several.

    `method` is a preset's name, or a mapping: `preset` with changed axes of `keys` and `values`, or both written out,
    or `per_layer` with methods for single layers, or `training` of the factors; changed ones need a `name`. `schedule`
    is the method's own if absent.
    `name` is what tables and versions call it; the method's and the schedule's names if absent.
    """

    name: Name | None = None
    method: InstanceOf[Method]
    schedule: Annotated[InstanceOf[Schedule], Field(validate_default=True)] = None  # type: ignore[assignment]
    kept_fraction: tuple[KeptFraction, ...] = ()
    budget: Annotated[Budget | None, Field(validate_default=True)] = None

    @field_validator("method", mode="before")
    @classmethod
    def build_method(cls, method: Any) -> Method:
        return method_of(method)

    @field_validator("schedule", mode="before")
    @classmethod
    def build_schedule(cls, schedule: Any, info: ValidationInfo) -> Schedule:
        method = info.data.get("method")
        if method is None:  # wrong, and told already
            return schedule_of("uniform" if schedule is None else schedule)
        built = method.schedule if schedule is None else schedule_of(schedule)
        method.check_schedule(built)
        return built

    @field_validator("kept_fraction", mode="before")
    @classmethod
    def one_or_many(cls, kept_fraction: Any) -> Any:
        return kept_fraction if isinstance(kept_fraction, list | tuple) else (kept_fraction,)

    @field_validator("budget")
    @classmethod
    def one_kind_of_budget(cls, budget: Budget | None, info: ValidationInfo) -> Budget | None:
        kept_fraction = info.data.get("kept_fraction")
        if kept_fraction == () and budget is None:
            raise PydanticCustomError(NO_BUDGET, "give kept_fraction or budget, one of them")
        if kept_fraction and budget is not None:
            raise ValueError("give kept_fraction or budget, one of them; both are there")
        return budget

    @property
    def budgets(self) -> tuple[float | Budget, ...]:
        """Each variant's: the share of floats to keep, or bytes."""
        return self.kept_fraction or ((self.budget,) if self.budget else ())

    @property
    def needs_calibration(self) -> bool:
        return self.method.needs_calibration or self.schedule.probe is not None


def variant_label(entry: VariantEntry, budget: float | Budget) -> str:
    """How tables, runs and registered versions call a variant: `lorc-progressive-0.5`, `kq_joint-energy-16GiB`."""
    size = f"{budget.memory_gib:g}GiB" if isinstance(budget, Budget) else f"{budget:g}"
    return f"{entry.name or f'{entry.method.name}-{entry.schedule.name}'}-{size}"
