"""The quality table: every preset with every schedule on the sample models, `python -m jobs.quality [--workdir DIR]`.

Writes docs/quality.md. The sample models and texts are not part of this repository; $LORC_SHARED, or ../shared, has
them.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.screen import StepProgress, console
from lorc_core.methods import METHODS
from lorc_core.schedule import SCHEDULES
from pipeline.results import Result, results
from pipeline.zoo import Zoo
from pipeline.zoo_run import ZooRun, run_zoo

REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("LORC_SHARED", REPOSITORY.parent / "shared")).resolve()
PAGE = REPOSITORY / "docs" / "quality.md"
KEPT_FRACTIONS = (0.75, 0.6, 0.5, 0.4)
LEVELS = ("weights", "states", "read")  # of the energy schedule, for the methods that know their readers
WINDOWS = {"window_tokens": 256, "seed": 0}
CALIBRATION = {**WINDOWS, "num_windows": 128, "probe_windows": 8, "batch_size": 8}
EVALUATION = {**WINDOWS, "num_windows": 32, "batch_size": 16}
EXCHANGE_ROUNDS = 1

STORIES = {"source": "data/tinystories_validation.txt", "separator": "<|endoftext|>"}
STDLIB = {"source": "data/stdlib_heldout_tokens.npy"}
SAMPLES = (
    ("tinystories", STORIES, ("stories260K", "babyllama-tok361", "TinyStories-656K-np")),
    ("stdlib-d64", STDLIB, ("stdlib-llama-d64",)),
)


def quality_zoo(name: str, text: dict[str, Any], models: Sequence[str], num_kv_heads: int) -> Zoo:
    """Every preset that such models can have, with every schedule and budget; the text's first quarter calibrates."""
    source = {**text, "name": "text", "source": str(SHARED / text["source"])}
    content = {
        "name": f"quality-{name}",
        "models": [
            {"name": one, "source": str(SHARED / "models" / one), "dtype": "float32", "document_marks": "begin"}
            for one in models
        ],
        "variants": [entry for method in METHODS for entry in entries(method, num_kv_heads)],
        "calibration": {**CALIBRATION, "texts": [{**source, "part": [0, 0.25]}]},
        "evaluation": {**EVALUATION, "texts": [{**source, "part": [0.25, 1]}]},
        "gates": {"max_perplexity_rise": 0.05},
    }
    return Zoo.model_validate(content, context={"folder": REPOSITORY})


def entries(method: str, num_kv_heads: int) -> list[dict[str, Any]]:
    """A preset with every schedule; none where its groups do not divide the kv heads."""
    if method == "palu" and num_kv_heads % 4:
        return []
    found = []
    for schedule in SCHEDULES:
        settings: list[dict[str, Any]] = [{"name": schedule}]
        if schedule == "energy" and METHODS[method].keys.block == "joint" and method != "lorc":
            settings = [{"name": schedule, "spectrum": level} for level in LEVELS]
        if schedule == "sensitivity":
            settings = [{"name": schedule, "num_rounds": EXCHANGE_ROUNDS}]
        found += [
            {
                "name": "-".join([method, schedule, *([one["spectrum"]] if "spectrum" in one else [])]),
                "method": method,
                "schedule": one,
                "kept_fraction": list(KEPT_FRACTIONS),
            }
            for one in settings
        ]
    return found


def quality_page(runs: Sequence[ZooRun]) -> str:
    """Markdown: what was measured on what, and a table of rises for each model."""
    lines = [HEAD.format(**EVALUATION, calibration_windows=CALIBRATION["num_windows"], **rounds())]
    for run in runs:
        for model in run.models:
            rows = [row for row in results(run) if row.model == model.model.entry.name]
            lines += [f"## {model.model.entry.name}", "", *model_table(rows), ""]
    return "\n".join(lines)


def rounds() -> dict[str, int]:
    return {"rounds": EXCHANGE_ROUNDS, "probe_windows": CALIBRATION["probe_windows"]}


def model_table(rows: Sequence[Result]) -> list[str]:
    """One line per method and schedule; the least rise of each budget is in bold."""
    baseline = next(row for row in rows if row.variant == "baseline")
    rises: dict[str, dict[str, Result]] = {}
    for row in rows:
        if row is not baseline:
            label, _, kept = row.variant.rpartition("-")
            rises.setdefault(label, {})[kept] = row
    budgets = [f"{kept:g}" for kept in KEPT_FRACTIONS]
    least = {kept: min(found[kept].loss_rise for found in rises.values() if kept in found) for kept in budgets}
    lines = [
        f"Baseline loss {baseline.loss:.4f} nats per token, {baseline.bytes_per_token:,.0f} bytes per token.",
        "",
        "| method | schedule | " + " | ".join(budgets) + " |",
        "|---|---|" + "---|" * len(budgets),
    ]
    for label, found in rises.items():
        method, _, schedule = label.partition("-")
        cells = [rise_cell(found.get(kept), least[kept]) for kept in budgets]
        lines.append(f"| {method} | {schedule.replace('-', ', ')} | " + " | ".join(cells) + " |")
    return lines


def rise_cell(result: Result | None, least: float) -> str:
    if result is None:
        return "out of reach"
    text = f"{result.loss_rise:+.4f} ± {result.loss_rise_standard_error:.4f}"
    return f"**{text}**" if result.loss_rise == least else text


HEAD = """# What each method costs, at equal bytes

Rise of the loss over the uncompressed model in nats per token, with its paired standard error, at 0.75, 0.6, 0.5 and
0.4 of all cached floats, scored through the cache. Written by `python -m jobs.quality`.

Calibration takes {calibration_windows} windows of {window_tokens} tokens from the first quarter of the text, evaluation
{num_windows} windows from the rest, both drawn with seed {seed}. TinyStories are separated by each tokenizer's begin
mark, as the models were trained. `sensitivity` measures on the first {probe_windows} calibration windows, with
{rounds} round of exchanges; `matryoshka` is trained once, from `kq_joint`, for all budgets. The least rise of each
budget is in bold.
"out of reach": the schedule cannot go so low, or so exactly, on this model.
"""


def main(workdir: Path = Path("lorc-work/quality")) -> None:
    """Run both zoos and write the page."""
    screen = console()
    runs = []
    for name, text, models in SAMPLES:
        progress = StepProgress(screen)
        zoo = quality_zoo(name, text, models, num_kv_heads=2 if name == "stdlib-d64" else 4)
        with progress.bars:
            runs.append(
                run_zoo(
                    zoo,
                    workdir,
                    until="evaluate",
                    on_plan=progress.plan,
                    on_outcome=progress.record,
                    on_progress=progress.advance,
                )
            )
    PAGE.write_text(quality_page(runs))
    screen.print(f"wrote {PAGE}")


if __name__ == "__main__":
    from jobs.cli import run_command

    run_command(main)
