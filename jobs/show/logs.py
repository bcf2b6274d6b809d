"""Print the logs of what failed of a model: `lorc logs WORKDIR MODEL [VARIANT]`."""

from collections.abc import Collection, Iterator
from difflib import get_close_matches

import pyarrow.parquet as pq

from jobs.screen.console import console
from jobs.show.status import clock
from lorc_core.errors import ConfigError
from pipeline.status.status import STATUS_FILE, Failure, read_status
from pipeline.storage.looking import Look


def show_logs(workdir: str, model: str, variant: str | None) -> int:
    """Print the log of each failed step of a model; of a variant, those of steps that variants share too.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: No run was there, or it had no such model or variant.
    """
    look, screen = Look(workdir), console()
    known, failures = told(look)
    if not known:
        raise ConfigError(f"no run was in {look.name}; give the work directory of one")
    check_known("model", model, known)
    if variant is not None:
        check_known(f"variant of {model}", variant, known[model])
    wanted = [
        failure
        for failure in failures.values()
        if failure.model == model and (variant is None or failure.variant in (None, variant))
    ]
    for failure in wanted:
        for line in log_lines(look, failure):
            screen.print(line, markup=False, soft_wrap=True)
    if not wanted:
        screen.print(f"no logs: nothing of {model}{f' {variant}' if variant else ''} failed")
    return 0


def told(look: Look) -> tuple[dict[str, set[str]], dict[str, Failure]]:
    """The variants of each known model, and what failed by the step's key: in the last run, and in those of other zoos.

    Of those only what has a log: it goes when its step is done.
    """
    known: dict[str, set[str]] = {}
    failures = {}
    for row in outcome_rows(look):
        known.setdefault(row["model"], set()).update({row["variant"]} - {None, "baseline"})
        if row["status"] == "failed" and look.read("logs", f"{row['step']}.log") is not None:
            kind = row["step"].partition("-")[0]
            failures[row["step"]] = Failure(row["step"], kind, row["model"], row["variant"], row["error"], row["host"])
    content = look.read(STATUS_FILE)
    if content is not None:
        status = read_status(content.decode())
        for name, model in status.models.items():
            known.setdefault(name, set()).update(set(model.variants) - {"baseline"})
        failures |= {failure.key: failure for failure in status.failures}
    return known, failures


def outcome_rows(look: Look) -> Iterator[dict[str, str]]:
    """Of all zoos that ran to their end in the work directory."""
    for name in look.names("tables", "outcomes"):
        if name.endswith(".parquet"):
            with look.system.open(look.at("tables", "outcomes", name)) as file:
                yield from pq.read_table(file).to_pylist()


def check_known(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        meant = get_close_matches(name, known, 1)
        guess = f"did you mean {meant[0]}? " if meant else ""
        raise ConfigError(f"no {what} is called {name}; {guess}known are {', '.join(sorted(known)) or 'none'}")


def log_lines(look: Look, failure: Failure) -> Iterator[str]:
    """A heading, the error in one line, and the trace."""
    log = look.read("logs", f"{failure.key}.log")
    when = f" at {clock(look.written('logs', f'{failure.key}.log'))}" if log is not None else ""
    host = f" on {failure.host}" if failure.host else ""
    yield f"── {failure.step} of {failure.whose}{when}{host} ({failure.key})"
    yield failure.error
    yield log.decode() if log is not None else "it left no log: the line is all there is to know\n"
