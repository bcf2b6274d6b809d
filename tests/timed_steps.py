"""Steps that only take time, for what decides when and where steps run."""

from dataclasses import dataclass

from pipeline.steps.step import FileStep, Input, Recipe, Step


@dataclass(frozen=True, kw_only=True)
class TimedStep(FileStep):
    """Takes so many seconds; steps of one `together` are one task."""

    name = "timed"
    revision = 1

    number: Recipe[int]
    seconds: Recipe[float] = 1.0
    reads: Recipe[int] = 0
    together: Recipe[str | None] = None
    after: Input[tuple[Step, ...]] = ()

    @property
    def group(self):
        return self.together or self.key

    def run(self, output, store):
        pass
