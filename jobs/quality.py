"""The quality table: every preset with every schedule on the sample models, `python -m jobs.quality [--workdir DIR]`.

Writes docs/quality.md. The sample models and texts are not part of this repository; $LORC_SHARED, or ../shared, has
them.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.screen.console import console
from jobs.screen.progress import StepProgress
from lorc_core.errors import ConfigError
from lorc_core.methods import METHODS, Method
from lorc_core.model.architecture import architecture_of
from lorc_core.model.stored.checkpoint import read_config
from lorc_core.ranks.budgets import KEPT_FRACTION_TOLERANCE
from lorc_core.ranks.schedules import SCHEDULES
from pipeline.results import Result, results
from pipeline.zoo.schema import Zoo
from pipeline.zoo_run import ZooRun, run_zoo

REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("LORC_SHARED", REPOSITORY.parent / "shared")).resolve()
PAGE = REPOSITORY / "docs" / "quality.md"
KEPT_FRACTIONS = (0.75, 0.6, 0.5, 0.4)
LEVELS = ("weights", "states", "read")  # of the energy schedule, for the methods that know their readers
WINDOWS = {"window_tokens": 256, "seed": 0}
CALIBRATION = {**WINDOWS, "num_windows": 128, "batch_size": 8}
EVALUATION = {**WINDOWS, "batch_size": 16}
EXCHANGE_ROUNDS = 1


@dataclass(frozen=True)
class Sample:
    """Models of one text, evaluated on so many windows; schedules that measure use so many calibration windows."""

    name: str
    text: dict[str, Any]
    models: tuple[str, ...]
    num_windows: int
    probe_windows: int
    trains: bool


SAMPLES = (
    Sample(
        "tinystories",
        {"source": "data/tinystories_validation.txt", "separator": "<|endoftext|>"},
        ("stories260K", "babyllama-tok361", "TinyStories-656K-np"),
        num_windows=32,
        probe_windows=8,
        trains=True,
    ),
    Sample(
        "stdlib-d64",
        {"source": "data/stdlib_heldout_tokens.npy"},
        ("stdlib-llama-d64",),
        num_windows=16,
        probe_windows=4,
        trains=False,
    ),
)


def quality_zoo(sample: Sample) -> Zoo:
    """Every preset that such models can have, with every schedule and budget; the text's first quarter calibrates."""
    source = {**sample.text, "name": "text", "source": str(SHARED / sample.text["source"])}
    content = {
        "name": f"quality-{sample.name}",
        "models": [
            {"name": name, "source": str(SHARED / "models" / name), "dtype": "float32", "document_marks": "begin"}
            for name in sample.models
        ],
        "variants": [entry for method in METHODS.values() if can_have(method, sample) for entry in entries(method)],
        "calibration": {
            **CALIBRATION,
            "probe_windows": sample.probe_windows,
            "texts": [{**source, "part": [0, 0.25]}],
        },
        "evaluation": {
            **EVALUATION,
            "num_windows": sample.num_windows,
            "texts": [{**source, "part": [0.25, 1]}],
        },
        "gates": {"max_perplexity_rise": 0.05},
    }
    return Zoo.model_validate(content, context={"folder": REPOSITORY})


def can_have(method: Method, sample: Sample) -> bool:
    """Whether all models of a sample can be compressed so, and the sample trains if the method does."""
    try:
        for name in sample.models:
            method.check(architecture_of(read_config(SHARED / "models" / name)))
    except ConfigError:
        return False
    return sample.trains or method.training is None


def entries(method: Method) -> list[dict[str, Any]]:
    """A preset with every schedule, as a zoo file writes them."""
    written = []
    for schedule in SCHEDULES:
        settings: list[dict[str, Any]] = [{"name": schedule}]
        if schedule == "energy" and method.keys.block == "joint" and method.name != "lorc":
            settings = [{"name": schedule, "spectrum": level} for level in LEVELS]
        if schedule == "sensitivity":
            settings = [{"name": schedule, "num_rounds": EXCHANGE_ROUNDS}]
        for fields in settings:
            level = [fields["spectrum"]] if "spectrum" in fields else []
            name = "-".join([method.name, schedule, *level])
            kept = list(KEPT_FRACTIONS)
            written.append({"name": name, "method": method.name, "schedule": fields, "kept_fraction": kept})
    return written


def quality_page(runs: Sequence[tuple[Sample, ZooRun]]) -> str:
    """Markdown: what was measured on what, and a table of rises for each model."""
    lines = [HEAD.format(**CALIBRATION, rounds=EXCHANGE_ROUNDS)]
    for sample, run in runs:
        for model in run.models:
            rows = [row for row in results(run) if row.model == model.model.entry.name]
            text = TEXT.format(**asdict(sample) | {"name": sample.text["source"]})
            lines += [f"## {model.model.entry.name}", "", text, "", *model_table(rows), ""]
    return "\n".join(lines)


def model_table(rows: Sequence[Result]) -> list[str]:
    """One line per method and schedule; the least rise of each budget is in bold."""
    baseline = next(row for row in rows if row.variant == "baseline")
    rises: dict[str, dict[str, Result]] = {}
    for row in rows:
        if row is not baseline:
            label, _, kept = row.variant.rpartition("-")
            rises.setdefault(label, {})[kept] = row
    budgets = [f"{kept:g}" for kept in KEPT_FRACTIONS]
    least = {
        kept: min(by_budget[kept].loss_rise for by_budget in rises.values() if kept in by_budget) for kept in budgets
    }
    lines = [
        f"Baseline loss {baseline.loss:.4f} nats per token, {baseline.bytes_per_token:,.0f} bytes per token.",
        "",
        "| method | schedule | " + " | ".join(budgets) + " |",
        "|---|---|" + "---|" * len(budgets),
    ]
    for label, by_budget in rises.items():
        method, _, schedule = label.partition("-")
        cells = [rise_cell(by_budget.get(kept), least[kept], kept) for kept in budgets]
        lines.append(f"| {method} | {schedule.replace('-', ', ')} | " + " | ".join(cells) + " |")
    return lines


def rise_cell(result: Result | None, least: float, kept: str) -> str:
    if result is None:
        return "out of reach"
    text = f"{result.loss_rise:+.4f} ± {result.loss_rise_standard_error:.4f}"
    text = f"**{text}**" if result.loss_rise == least else text
    off = abs(result.kept_fraction - float(kept)) > KEPT_FRACTION_TOLERANCE
    return f"{text} (kept {result.kept_fraction:.3f})" if off else text


HEAD = """# What each method costs, at equal bytes

Rise of the loss over the uncompressed model in nats per token, with its paired standard error, at 0.75, 0.6, 0.5 and
0.4 of all cached floats, scored through the cache. Written by `python -m jobs.quality`.

The first quarter of each text calibrates, with {num_windows} windows of {window_tokens} tokens; the rest is evaluated;
windows are drawn with seed {seed}. `sensitivity` has {rounds} round of exchanges; `matryoshka` is trained once, from
`kq_joint`, for all budgets. The least rise of each budget is in bold. "kept": where ranks of equal heads cannot come
closer to the budget than that.

Marks: every TinyStories document begins with the tokenizer's begin mark and has no end mark. llama2.c trains so, and
stories260K and babyllama-tok361 are its models. How TinyStories-656K-np was trained is not known; it gets the same
marks because an end mark raised its baseline loss by about 0.1 nats. The text of stdlib-llama-d64 is token ids, taken
as they are.
"""

TEXT = "`{name}`: {num_windows} windows are evaluated; schedules that measure use {probe_windows} calibration windows."


def main(workdir: Path = Path("lorc-work/quality")) -> None:
    """Run both zoos and write the page."""
    screen = console()
    runs = []
    for sample in SAMPLES:
        with StepProgress(screen).shown() as progress:
            done = run_zoo(quality_zoo(sample), workdir, until="evaluate", listener=progress)
        runs.append((sample, done))
    PAGE.write_text(quality_page(runs))
    screen.print(f"wrote {PAGE}")


if __name__ == "__main__":
    from jobs.command import run_command

    run_command(main)
