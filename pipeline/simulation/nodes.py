"""Nodes at work: what is free on each, which of its workers are there, and what they have imported."""

from dataclasses import dataclass, field

from pipeline.steps.step import Need

ROUNDING = 1e-9  # of CPUs that come and go in fractions


@dataclass
class Worker:
    """A process that runs one task at a time; its first step of a kind imports what that kind needs."""

    kinds: set[str] = field(default_factory=set)
    is_new: bool = True


@dataclass
class Node:
    """One machine.

    Attributes:
        kind: Name of its kind.
        reading_until: When each task that reads model files now will have read them.
    """

    name: str
    kind: str
    num_cpus: float
    num_gpus: float
    memory_bytes: float
    idle: list[Worker] = field(default_factory=list)
    reading_until: list[float] = field(default_factory=list)

    def has_room(self, need: Need) -> bool:
        return (
            need.num_cpus <= self.num_cpus + ROUNDING
            and need.num_gpus <= self.num_gpus + ROUNDING
            and need.memory_bytes <= self.memory_bytes
        )

    def take(self, need: Need) -> Worker:
        """A worker for a task, and its resources. Ray ends workers that had a GPU, so such a task gets a new one."""
        assert self.has_room(need)
        self.num_cpus -= need.num_cpus
        self.num_gpus -= need.num_gpus
        self.memory_bytes -= need.memory_bytes
        return self.idle.pop() if self.idle and not need.num_gpus else Worker()

    def give_back(self, need: Need, worker: Worker) -> None:
        self.num_cpus += need.num_cpus
        self.num_gpus += need.num_gpus
        self.memory_bytes += need.memory_bytes
        if not need.num_gpus:
            self.idle.append(worker)

    def readers(self, now: float) -> int:
        """Tasks that read model files at a time."""
        self.reading_until = [until for until in self.reading_until if until > now]
        return len(self.reading_until)
