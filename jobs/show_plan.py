"""Print what a zoo file would do: `lorc plan ZOO`."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from jobs.screen import console, size
from pipeline.planning import ModelPlan, plan_model
from pipeline.storage.store import Store
from pipeline.zoo.schema import Zoo


def show_plan(zoo: Zoo, workdir: Path) -> int:
    """Print the plan. Returns the exit code: 1 if a model cannot be planned, else 0."""
    store = Store(workdir.resolve())
    plans = [plan_model(zoo, entry, store) for entry in zoo.models]
    screen = console()
    screen.print(cache_table(zoo, plans))
    for plan in plans:
        if plan.error is not None:
            screen.print(f"[red]{plan.name}[/red]: {escape(plan.error)}")
        else:
            screen.print(f"{plan.name}: {plan.steps}; {plan.devices}")
    return 1 if any(plan.error for plan in plans) else 0


def cache_table(zoo: Zoo, plans: list[ModelPlan]) -> Table:
    serving = zoo.serving
    table = Table(
        title=f"caches at batch {serving.batch_size}, {serving.context_tokens:,} tokens; factors are loaded once",
    )
    table.add_column("model", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    for name in ("cache", "factors, at most", "cache + factors", "of baseline"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        for planned in plan.caches:
            full = plan.caches[0].cache_bytes
            table.add_row(
                plan.name,
                planned.variant,
                size(planned.cache_bytes),
                size(planned.factor_bytes) if planned.factor_bytes else "",
                size(planned.net_bytes),
                f"{planned.net_bytes / full:.1%}",
            )
        table.add_section()
    return table
