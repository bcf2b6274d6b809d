"""How a run stands, as plain data that a file holds and a table shows."""

from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from lorc_core.errors import ArtifactError

STATUS_FILE = "status.json"
VERSION = 1

# What users see in the place of kinds of steps. "resolve" is a model that cannot be read, "candidate" one for which no
# candidate could be chosen: both are told where they fail, and are no steps.
STAGES = {
    "texts": ("resolve", "windows"),
    "calibrate": ("calibrate", "gradients"),
    "decompose": ("decompose", "train", "change_basis"),
    "ranks": ("probe", "schedule", "search"),
    "variants": ("variant", "projection_errors"),
    "evaluate": ("evaluate", "regress"),
    "register": ("register", "candidate"),
}
STAGE_OF = {kind: stage for stage, kinds in STAGES.items() for kind in kinds}


@dataclass(frozen=True)
class Count:
    """Steps of one model and stage; those that are nothing of this wait. `skipped` are those whose input failed."""

    total: int = 0
    done: int = 0
    running: int = 0
    failed: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class ModelStatus:
    """One model's variants, by their labels, and the counts of its stages, those without steps left out."""

    variants: tuple[str, ...]
    stages: dict[str, Count]

    @property
    def state(self) -> str:
        """ "failed", "running", "done" or "waiting": the first that is true of anything, done if all is."""
        counts = self.stages.values()
        if any(count.failed for count in counts):
            return "failed"
        if any(count.running for count in counts):
            return "running"
        return "done" if all(count.done == count.total for count in counts) else "waiting"


@dataclass(frozen=True)
class Running:
    """A step at work; of a long one, how many of all parts are done. `since` is in seconds since 1970."""

    step: str
    model: str
    variant: str | None
    host: str
    since: float
    parts_done: int | None
    parts: int | None


@dataclass(frozen=True)
class Failure:
    """A step that failed; its log is named by its key."""

    key: str
    step: str
    model: str
    variant: str | None
    error: str
    host: str | None

    @property
    def whose(self) -> str:
        return f"{self.model} {self.variant}" if self.variant else self.model


@dataclass(frozen=True)
class Status:
    """How a run stands. Times are in seconds since 1970.

    Attributes:
        version: Of this schema.
        zoo: The zoo's name.
        host: Of the run's process.
        pid: Of the run's process.
        started: When it began.
        updated: When this was true.
        ended: When it ended; None while it runs, or where it died.
        error: What ended it, if not its last step: one line.
        ends_at: About when it will end; None where nothing tells.
        waits_for: What it does or waits for while no step runs.
        notes: Its last notes, what was damaged say.
        models: By name, in the zoo's order.
        running: The steps that run, the longest first.
        failures: In the order in which they came.
    """

    version: int
    zoo: str
    host: str
    pid: int
    started: float
    updated: float
    ended: float | None
    error: str | None
    ends_at: float | None
    waits_for: str | None
    notes: tuple[str, ...]
    models: dict[str, ModelStatus]
    running: tuple[Running, ...]
    failures: tuple[Failure, ...]


ADAPTER = TypeAdapter(Status)


def status_json(status: Status) -> bytes:
    return ADAPTER.dump_json(status)


def read_status(content: str) -> Status:
    """What `status_json` wrote.

    Raises:
        ArtifactError: It is of another version.
    """
    try:
        status = ADAPTER.validate_json(content)
    except ValidationError as error:
        raise ArtifactError(f"{STATUS_FILE}: cannot be read ({error.error_count()} fields are wrong)") from error
    if status.version != VERSION:
        raise ArtifactError(f"{STATUS_FILE}: is of version {status.version}, this lorc reads {VERSION}")
    return status
