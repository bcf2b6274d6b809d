"""Why steps of a model failed: `lorc logs`."""

from collections.abc import Sequence
from datetime import datetime
from difflib import get_close_matches

from rich.markup import escape

from jobs.run_table import whose
from jobs.screen import console
from lorc_core.errors import ConfigError
from pipeline.status.looking import log_of, look
from pipeline.status.state import StepState


def show_logs(workdir: str, model: str, variant: str | None) -> int:
    """Print the logs of the steps of a model, or of one variant of it, that failed in the last run."""
    state, screen = look(workdir).state, console()
    check_known("model", model, state.models)
    if variant is not None:
        check_known("variant", variant, [step.variant for step in state.of(model) if step.variant is not None])
    failed = [
        (key, step)
        for key, step in state.steps.items()
        if step.status == "failed" and step.model == model and variant in (None, step.variant)
    ]
    for key, step in failed:
        screen.print(f"[bold]{escape(heading(step))}[/bold]")
        screen.print(escape(log_of(workdir, key) or step.error or ""), soft_wrap=True)
    if not failed:
        screen.print(f"nothing of {' '.join([model, *([variant] if variant else [])])} failed")
    return 0


def heading(step: StepState) -> str:
    began = "" if step.began_at is None else f", begun {datetime.fromtimestamp(step.began_at):%Y-%m-%d %H:%M:%S}"
    return f"{whose(step)}: {step.kind}{began}{f' on {step.host}' if step.host else ''}: {step.error}"


def check_known(what: str, name: str, known: Sequence[str]) -> None:
    """Raise ConfigError where there is none of that name."""
    if name in known:
        return
    meant = get_close_matches(name, known, n=1)
    guess = f"did you mean {meant[0]}? " if meant else ""
    raise ConfigError(f"no {what} {name!r} in this run; {guess}it has {', '.join(sorted(set(known))) or 'none'}")
