"""Print what the spectra of a zoo's models say: `lorc spectrum ZOO`."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from jobs.screen import StepProgress, console
from pipeline.spectrum import LayerChoice, ModelSpectrum, SpectrumRow, model_spectra
from pipeline.zoo.schema import Zoo

NUM_PRESETS = 4  # of a layer's best


def show_spectrum(zoo: Zoo, workdir: Path) -> int:
    """Print the tables. Returns the exit code: 1 if a step failed, else 0."""
    screen = console()
    progress = StepProgress(screen)
    with progress.bars:
        spectra, failures = model_spectra(
            zoo, workdir, on_plan=progress.plan, on_outcome=progress.record, on_progress=progress.advance
        )
    for spectrum in spectra:
        for method, rows in groupby(spectrum.rows, key=lambda row: row.method):
            screen.print(spectrum_table(spectrum, method, list(rows)))
        if spectrum.choices:
            screen.print(choices_table(spectrum, spectrum.choices))
    return 1 if failures else 0


def spectrum_table(spectrum: ModelSpectrum, method: str, rows: Sequence[SpectrumRow]) -> Table:
    """Conditions, effective ranks, floats by variant and, with calibration, KQ-SVD's gap."""
    title = f"{spectrum.name}, {method}: {rows[0].width} floats per token, layer and kind"
    table = Table(title=title, box=SIMPLE_HEAD)
    labels = list(rows[0].floats)
    gap = [] if rows[0].gap is None else [f"gap at {spectrum.kept_fraction:g}"]
    for name in ("layer", "kind", "log10 cond.", "eff. rank W", "states", "read", *labels, *gap):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.layer),
            row.kind,
            f"{row.log10_condition:.2f}",
            *(f"{value:.1f}" for value in row.effective_ranks),
            *(str(row.floats[label]) for label in labels),
            *([] if row.gap is None else [f"{row.gap:.4f}"]),
        )
    return table


def choices_table(spectrum: ModelSpectrum, choices: Sequence[LayerChoice]) -> Table:
    """Which method for which layer: the presets of the least attention error, best first."""
    title = f"{spectrum.name}: relative error of the attention output at {spectrum.kept_fraction:g} of a layer's floats"
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("layer", justify="right")
    for place in range(NUM_PRESETS):
        table.add_column("least" if place == 0 else f"{place + 1}.")
    for choice in choices:
        table.add_row(str(choice.layer), *(f"{name} {error:.4f}" for name, error in choice.errors[:NUM_PRESETS]))
    return table
