"""The table of a run at any moment: it fits 80 columns and 24 rows, says all without colour, and what it says adds up."""

import io
from dataclasses import dataclass, replace

import pytest
from rich.console import Console

from jobs.screen.console import duration
from jobs.screen.progress import StepProgress
from jobs.screen.status_table import StatusView
from lorc_core.errors import ArtifactError
from pipeline.status.status import (
    STAGE_OF,
    STAGES,
    Count,
    Failure,
    ModelStatus,
    Running,
    Status,
    read_status,
    status_json,
)
from pipeline.status.watch import Watch
from pipeline.steps.outcome import Milestone, Outcome, Started
from pipeline.storage.cost import Cost
from tests.zoos import kinds_of_steps

NOW = 1_800_000_000.0


def model(done=240, running=0, failed=0):
    """Of 80 layers and three methods; what comes after the decomposition waits for it, or cannot run."""
    decompose = Count(240, done, running, failed)
    after = Count(80, done=80 if done == 240 else 0, skipped=80 if failed else 0)
    stages = list(STAGES)
    at = stages.index("decompose")
    counts = [*[Count(4, 4)] * at, decompose, *[after] * (len(stages) - at - 1)]
    return ModelStatus(("lorc-0.5",), dict(zip(stages, counts, strict=True)))


def night(**changed):
    """40 models: 30 are done, 5 run, 2 failed, 3 wait; one has a name that is long."""
    models = {f"model-{number:02}": model() for number in range(30)}
    models |= {f"running-{number}": model(100 + number, running=2) for number in range(4)}
    models |= {"a-llama-with-a-long-name-70b": model(7, running=1)}
    models |= {f"failed-{number}": model(200, failed=3) for number in range(2)}
    models |= {f"waiting-{number}": model(0) for number in range(3)}
    running = [name for name, one in models.items() if one.state == "running"]
    failed = [name for name, one in models.items() if one.state == "failed"]
    told = Status(
        version=1,
        zoo="night",
        host="head",
        pid=4711,
        started=NOW - 7200,
        updated=NOW - 1,
        ended=None,
        error=None,
        ends_at=NOW + 5400,
        waits_for=None,
        notes=(),
        models=models,
        running=tuple(Running("decompose", name, None, f"worker-{name}", NOW - 75, 3, 40) for name in running),
        failures=tuple(Failure(f"decompose-{name}", "decompose", name, None, "NaN", "worker-3") for name in failed),
    )
    return replace(told, **changed)


def printed(view, width=80, height=24, *, terminal=True):
    screen = Console(width=width, height=height, file=io.StringIO(), force_terminal=terminal, color_system=None)
    screen.print(view)
    return screen.file.getvalue().splitlines()


def test_forty_models_fit_80_columns_and_24_rows_with_all_that_run_or_failed():
    lines = printed(StatusView(night(), NOW, is_live=True))
    assert len(night().models) == 40
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    shown = {words[1]: words[0] for line in lines if (words := line.split()) and words[0] in "✗▸✓" and "/" in line}
    assert shown == {
        **{f"running-{number}": "▸" for number in range(4)},
        "a-llama-with-a-long-name-70b": "▸",
        "failed-0": "✗",
        "failed-1": "✗",
    }
    assert "33 others: 30 done, 3 waiting" in lines


def test_a_row_says_without_colour_what_runs_failed_and_cannot_run():
    models = {"runs": model(100, running=2), "broke": model(200, failed=3), "done": model(), "waits": model(0)}
    lines = printed(StatusView(night(models=models), NOW))
    rows = {words[-7 - 1]: words[-7:] for line in lines if len(words := line.split()) >= 8 and "/" in line}
    assert rows["runs"] == ["4/4✓", "4/4✓", "100/240▸", "0/80", "0/80", "0/80", "0/80"]
    assert rows["broke"] == ["4/4✓", "4/4✓", "200/240✗", "0/80-", "0/80-", "0/80-", "0/80-"]
    assert rows["done"] == ["4/4✓", "4/4✓", "240/240✓", *["80/80✓"] * 4]
    assert rows["waits"][2] == "0/240"
    for mark in "✓▸✗-":
        assert mark in lines[0]


def test_the_last_lines_say_how_long_and_what_runs():
    lines = printed(StatusView(night(), NOW, is_live=True))
    assert lines[-4] == "2 h 00 min, about 1 h 30 min left, 5 steps running, 2 failures"
    assert lines[-3].startswith("  decompose running-0: 3/40, 1 min on worker-running-0")
    assert not any(line.startswith("  decompose waiting") for line in lines)
    untold = printed(StatusView(night(ends_at=None, running=(), waits_for="starting Ray"), NOW, is_live=True))
    assert untold[-1] == "2 h 00 min, starting Ray, 2 failures"


def test_when_many_run_the_screen_still_has_room():
    models = {f"running-{number:02}": model(100, running=1) for number in range(40)}
    lines = printed(StatusView(night(models=models), NOW, is_live=True))
    assert len(lines) < 24
    assert any(line.endswith(" running") and "others: " in line for line in lines)


def test_what_is_no_terminal_gets_every_model_and_no_control_character():
    lines = printed(StatusView(night(), NOW, is_live=True), terminal=False)
    names = [word for line in lines if "/240" in line for word in line.split()[:2]]
    assert [name for name in names if name in night().models] == list(night().models)
    assert not any("\x1b" in line for line in lines)


def test_a_status_is_the_same_after_the_file_and_another_version_is_refused():
    assert read_status(status_json(night()).decode()) == night()
    with pytest.raises(ArtifactError, match="of version 2, this lorc reads 1"):
        read_status(status_json(night(version=2)).decode())
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_status('{"version": 1}')


def test_every_kind_of_step_has_a_stage():
    import pipeline.regression  # with `graph` all kinds are declared
    import pipeline.steps.graph

    assert pipeline.regression.RegressStep
    assert pipeline.steps.graph.model_steps
    own = {kind.name for kind in kinds_of_steps() if kind.__module__.startswith("pipeline.")}
    assert own - {"evaluate_share", "join_shares"} <= STAGE_OF.keys()  # these are told as their evaluation


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59, "59 s"), (61, "1 min"), (3599, "1 h 00 min"), (5400, "1 h 30 min")]
)
def test_durations_have_two_units_at_most(seconds, text):
    assert duration(seconds) == text


@dataclass(frozen=True)
class Planned:
    """What of a step is told before it runs."""

    key: str
    name: str
    model: str = "small"
    label: str | None = None
    need: None = None


PLAN = [Planned("d-1", "decompose"), Planned("d-2", "decompose"), Planned("e-1", "evaluate", label="lorc-0.5")]


def outcome(step, status, **changed):
    return Outcome(step.key, step.name, step.model, step.label, status, **changed)


def test_a_watch_counts_what_waits_runs_failed_and_is_done():
    watch = Watch("zoo")
    watch.phase("starting Ray")
    watch.plan(PLAN)
    assert watch.status().waits_for == "starting Ray"
    watch.start(Started("d-1", "a", watch.started))
    watch.advance(Milestone("d-1", 3, 40))
    told = watch.status()
    assert told.waits_for is None
    assert told.models["small"].stages == {"decompose": Count(2, running=1), "evaluate": Count(1)}
    assert [(one.host, one.parts_done, one.parts) for one in told.running] == [("a", 3, 40)]
    assert told.ends_at is None
    watch.record(outcome(PLAN[0], "ran", cost=Cost(2.0, 1.0, None, None, "a", 1)))
    told = watch.status()
    assert told.ends_at > told.updated, "what is left goes at the pace of what ended"
    watch.record(outcome(PLAN[1], "failed", error="NaN"))
    watch.record(outcome(PLAN[2], "skipped", error="NaN"))
    watch.end(None)
    told = watch.status()
    assert told.models["small"].stages == {"decompose": Count(2, 1, failed=1), "evaluate": Count(1, skipped=1)}
    assert told.models["small"].variants == ("lorc-0.5",)
    assert [failure.key for failure in told.failures] == ["d-2"]
    assert told.running == ()


def test_what_will_be_run_again_waits_again():
    watch = Watch("zoo")
    watch.plan(PLAN)
    watch.start(Started("e-1", "a", watch.started))
    watch.postpone(outcome(PLAN[2], "failed", error="disk full", obstacle="the disk is full"))
    told = watch.status()
    assert told.models["small"].stages["evaluate"] == Count(1)
    assert not told.failures
    watch.advance(Milestone("e-1", 3, 40))
    watch.start(Started("e-1", "b", watch.started))
    assert [(one.host, one.parts) for one in watch.status().running] == [("b", None)]


def test_a_model_that_cannot_be_read_is_a_failure_of_its_own_row():
    watch = Watch("zoo")
    watch.record(Outcome("resolve-gone", "resolve", "gone", None, "failed", "it does not exist"))
    watch.plan(PLAN)
    told = watch.status()
    assert list(told.models) == ["gone", "small"]
    assert told.models["gone"].stages == {"texts": Count(1, failed=1)}
    assert told.models["gone"].state == "failed"


@pytest.mark.parametrize("terminal", [True, False])
def test_failures_and_notes_are_told_as_they_come_and_the_table_once_more_at_the_end(terminal):
    screen = Console(width=80, height=24, file=io.StringIO(), force_terminal=terminal, color_system=None)
    with StepProgress(screen).shown() as progress:
        progress.plan(PLAN)
        progress.note("d-1 was damaged")
        progress.record(outcome(PLAN[2], "failed", error="disk [full]"))
        before = screen.file.getvalue()
    lines = screen.file.getvalue().splitlines()
    assert "small lorc-0.5: evaluate: disk [full]" in before
    assert "note: d-1 was damaged" in before
    assert "0 s, 1 failure" in lines[-1 - terminal]
    assert screen.file.getvalue().endswith("\n") or terminal
    assert ("\x1b" in screen.file.getvalue()) == terminal
    assert terminal or sum("✗ small" in line for line in lines) == 1
