"""Print what the spectra of a zoo's models say: `lorc spectrum ZOO`."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from string import ascii_lowercase

from jobs.screen.console import console
from jobs.screen.fitted_table import Column, FittedTable
from jobs.screen.progress import StepProgress
from jobs.stopping import stoppable
from pipeline.spectrum import LayerChoice, ModelSpectrum, SpectrumRow, model_spectra
from pipeline.zoo.schema import Zoo

NUM_PRESETS = 3  # of a layer's best
VARIANTS_ABREAST = 8  # in one table: their columns have letters, since names would not fit


def show_spectrum(zoo: Zoo, workdir: str) -> int:
    """Print the tables. Returns the exit code: 1 if a step failed, else 0."""
    screen = console()
    with stoppable(screen, workdir), StepProgress(screen).shown() as progress:
        spectra, failures = model_spectra(zoo, workdir, progress)
    for spectrum in spectra:
        for method, rows in groupby(spectrum.rows, key=lambda row: row.method):
            of_method = list(rows)
            screen.print(spectrum_table(spectrum, method, of_method))
            screen.print()
            for table in floats_tables(spectrum, method, of_method):
                screen.print(table)
                screen.print()
        if spectrum.choices:
            screen.print(choices_table(spectrum, spectrum.choices))
            screen.print()
    return 1 if failures else 0


def spectrum_table(spectrum: ModelSpectrum, method: str, rows: Sequence[SpectrumRow]) -> FittedTable:
    """Conditions, effective ranks and, with calibration, KQ-SVD's gap."""
    gap = [Column(f"gap at {spectrum.kept_fraction:.3g}")] if rows[0].gap is not None else []
    table = FittedTable(
        "layer",
        [*map(Column, ("log10 cond.", "eff. rank W", "states", "read")), *gap],
        title=f"{spectrum.name}, {method}: {rows[0].width} floats per token, layer and kind",
    )
    for row in rows:
        table.add_row(
            layer_name(row),
            f"{row.log10_condition:.2f}",
            *(f"{rank:.1f}" for rank in row.effective_ranks),
            *([] if row.gap is None else [f"{row.gap:.4f}"]),
        )
    return table


def floats_tables(spectrum: ModelSpectrum, method: str, rows: Sequence[SpectrumRow]) -> Iterator[FittedTable]:
    """The floats that each variant keeps of each layer, a few variants at a time."""
    labels = list(rows[0].floats)
    for start in range(0, len(labels), VARIANTS_ABREAST):
        letters = dict(zip(ascii_lowercase, labels[start : start + VARIANTS_ABREAST], strict=False))
        title = f"{spectrum.name}, {method}: floats kept by"
        table = FittedTable("layer", [Column(letter) for letter in letters], title)
        table.legend += [f"  {letter}  {label}" for letter, label in letters.items()]
        for row in rows:
            table.add_row(layer_name(row), *(str(row.floats[label]) for label in letters.values()))
        yield table


def layer_name(row: SpectrumRow) -> str:
    return f"{row.layer:5} {row.kind}"


def choices_table(spectrum: ModelSpectrum, choices: Sequence[LayerChoice]) -> FittedTable:
    """Which method for which layer: the presets of the least attention error, best first."""
    title = f"{spectrum.name}: relative error of the attention output at {spectrum.kept_fraction:.3g} of the floats"
    places = ["least", *(f"{place}." for place in range(2, NUM_PRESETS + 1))]
    table = FittedTable("layer", [Column(place, align_right=False) for place in places], title)
    for choice in choices:
        cells = [f"{name} {error:.4f}" for name, error in choice.errors[:NUM_PRESETS]]
        table.add_row(f"{choice.layer:5}", *cells, *[""] * (NUM_PRESETS - len(cells)))
    return table
