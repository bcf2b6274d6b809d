"""Print what a zoo file would do: `lorc plan ZOO`; and on which nodes, from when to when: with `--cluster`."""

from pathlib import Path

from rich.markup import escape

from jobs.screen.console import console, size
from jobs.screen.fitted_table import Column, FittedTable
from jobs.screen.forecast_table import forecast_table, totals
from pipeline.planning import ModelPlan, plan_model
from pipeline.simulation.cluster import load_cluster
from pipeline.simulation.forecast import forecast
from pipeline.storage.mirror import open_store
from pipeline.zoo.schema import Zoo


def show_plan(zoo: Zoo, workdir: str, cluster_file: Path | None = None) -> int:
    """Print the plan. Returns the exit code: 1 if a model cannot be planned, or not on that cluster, else 0."""
    cluster = load_cluster(cluster_file) if cluster_file is not None else None
    store = open_store(workdir)
    plans = [plan_model(zoo, entry, store, with_devices=cluster is None) for entry in zoo.models]
    screen = console()
    screen.print(cache_table(zoo, plans))
    screen.print()
    for plan in plans:
        if plan.error is not None:
            screen.print(f"[red]{plan.name}[/red]: {escape(plan.error)}")
        else:
            screen.print("; ".join([f"{plan.name}: {plan.steps}", *([plan.devices] if plan.devices else [])]))
    failed = any(plan.error for plan in plans)
    if cluster is not None:
        screen.print()
        foreseen = forecast(zoo, cluster)
        screen.print(forecast_table(foreseen))
        screen.print(totals(foreseen))
        failed = failed or bool(foreseen.refused)
    return 1 if failed else 0


def cache_table(zoo: Zoo, plans: list[ModelPlan]) -> FittedTable:
    """Memory of every variant, and why a model cannot have others."""
    load = f"batch {zoo.serving.batch_size}, {zoo.serving.context_tokens:,} tokens"
    columns = Column("cache"), Column("factors", importance=2), Column("together", importance=1), Column("of baseline")
    table = FittedTable("", columns, f"caches at {load}; factors, at most, are loaded once")
    for plan in plans:
        if plan.caches:
            table.add_heading(plan.name)
        for planned in plan.caches:
            table.add_row(
                f"  {planned.variant}",
                size(planned.cache_bytes),
                size(planned.factor_bytes) if planned.factor_bytes else "",
                size(planned.net_bytes),
                "" if planned.at_own_load else f"{planned.net_bytes / plan.caches[0].cache_bytes:.1%}",
                note="cache and factors at the load of its budget" if planned.at_own_load else "",
            )
        for label, reason in plan.refused:
            table.add_row(f"  {label}", note=reason)
    return table
