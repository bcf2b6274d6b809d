"""What the tables show on a narrow screen: every name whole, the rise with its error, and columns by importance."""

import io
from dataclasses import replace
from itertools import product

import pytest
from rich.console import Console
from rich.text import Text

from jobs.screen.console import size
from jobs.screen.fitted_table import Column, FittedTable
from jobs.screen.results_table import results_table
from jobs.show.methods import AXES, methods_table
from jobs.show.spectrum import choices_table, floats_tables, spectrum_table
from lorc_core.methods import METHODS
from lorc_core.model.kinds import KINDS
from pipeline.results import Result, Unscored
from pipeline.spectrum import LayerChoice, ModelSpectrum, SpectrumRow

NAMES = "lorc", "kq_joint", "phasor_freq"
SCHEDULES = "progressive", "error_budget"
LABELS = [f"{method}-{schedule}-{kept}" for method, schedule, kept in product(NAMES, SCHEDULES, (0.75, 0.5))]
REASON = "method palu, keys: block group(4): 4 does not divide the model's 2 kv heads; possible are 1, 2"


def printed(renderable, width):
    screen = Console(width=width, file=io.StringIO(), highlight=False)
    screen.print(renderable)
    return screen.file.getvalue()


def result(variant, **changed):
    figures = {"kept_fraction": 0.5, "loss": 2.3419, "loss_rise": 0.0029, "loss_rise_standard_error": 0.0006}
    sizes = {"perplexity": 10.401, "bytes_per_token": 2560.0, "factor_bytes": 327680, "eval_s": 12.5}
    return Result(**{"model": "stdlib-llama", "variant": variant, "text": "stdlib", **figures, **sizes, **changed})


def results():
    verdicts = ["passed", "failed", "candidate"] * 4
    return [result("baseline")] + [
        result(label, version=str(idx), verdict=verdict)
        for idx, (label, verdict) in enumerate(zip(LABELS, verdicts, strict=True))
    ]


@pytest.mark.parametrize("width", [140, 80, 60, 40])
def test_no_name_is_cut_and_the_rise_has_its_error(width):
    lines = printed(results_table(results()), width).splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line or "..." in line for line in lines)
    for label, verdict in zip(LABELS, ["passed", "failed", "candidate"] * 4, strict=True):
        (at,) = [idx for idx, line in enumerate(lines) if label in line.split()]
        row = lines[at] if width >= 80 else lines[at + 1]
        assert "+0.0029 ±0.0006" in row
        assert verdict in row.split()


def test_columns_go_by_importance_and_are_named():
    wide, narrow = (printed(results_table(results()), width) for width in (140, 80))
    for title in ("kept", "loss", "rise", "perplexity", "B/token", "factors", "seconds", "gates", "v."):
        assert title in wide.splitlines()[1].split()
    assert narrow.splitlines()[1].split() == ["kept", "rise", "B/token", "gates", "v."]
    assert narrow.splitlines()[-1] == "no room here for loss, perplexity, factors, seconds"
    assert "no room" not in wide


@pytest.mark.parametrize("width", [140, 80, 40])
def test_variants_without_scores_stand_with_the_reason(width):
    missing = [Unscored("stdlib-llama", "palu-fisher-0.5", REASON), Unscored("other", "", "it does not exist")]
    out = printed(results_table(results(), missing), width)
    assert "palu-fisher-0.5" in out.split()
    assert REASON in " ".join(out.split())
    assert out.index("other") < out.index("it does not exist")


def test_gates_and_versions_have_no_column_where_there_are_none():
    titles = printed(results_table([result("baseline"), result("lorc-uniform-0.5")]), 140).splitlines()[1].split()
    assert "gates" not in titles
    assert "v." not in titles


def test_texts_have_a_column_where_there_are_several():
    rows = [result("lorc-uniform-0.5", text=text) for text in ("wiki", "code")]
    lines = printed(results_table(rows), 80).splitlines()
    assert [line.split()[1] for line in lines if "lorc-uniform-0.5" in line] == ["wiki", "code"]


def test_a_screen_too_narrow_for_anything_loses_nothing():
    table = FittedTable("name", [Column("a"), Column("b", importance=1)])
    table.add_row("a-long-name-that-fits-nowhere", "1", Text("2"), note="a note")
    assert printed(table, 12).replace("\n", "").count("a-long-name-that-fits-nowhere") == 1


def spectrum_of(labels, gap):
    rows = [
        SpectrumRow("kq_joint", layer, kind, 1024, 3.21, (700.1, 80.2, 60.3), dict.fromkeys(labels, 512), gap)
        for layer in range(2)
        for kind in KINDS
    ]
    choices = [
        LayerChoice(layer, tuple((name, 0.0123) for name in ("phasor_freq", "kq_joint", "lorc_q"))) for layer in (0, 1)
    ]
    return ModelSpectrum("stdlib-llama", 0.4321, tuple(rows), tuple(choices))


def test_spectra_fit_80_columns_with_every_name_and_column():
    spectrum = spectrum_of(LABELS, gap=0.0456)
    conditions = printed(spectrum_table(spectrum, "kq_joint", spectrum.rows), 80)
    floats = [printed(table, 80) for table in floats_tables(spectrum, "kq_joint", spectrum.rows)]
    choices = printed(choices_table(spectrum, spectrum.choices), 80)
    for out in (conditions, *floats, choices):
        assert max(map(len, out.splitlines())) <= 80
        assert "no room" not in out
    assert "gap at 0.432" in conditions
    assert "at 0.432 of the floats" in choices
    assert [[label for label in LABELS if label in out.split()] for out in floats] == [LABELS[:8], LABELS[8:]]
    assert [line.split().count("512") for line in floats[0].splitlines()[-4:]] == [8] * 4


def test_methods_fit_80_columns_with_every_axis_and_source():
    out = printed(methods_table(), 80)
    assert max(map(len, out.splitlines())) <= 80
    for method in METHODS.values():
        assert method.source in " ".join(out.split())
        for axes in (method.keys, method.values):
            assert all(getattr(axes, axis) in out.split() for axis in AXES)
            assert replace(axes, **{axis: getattr(METHODS["lorc"].keys, axis) for axis in AXES}) == METHODS["lorc"].keys


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1034240, "1010 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (2**40, "1024.00 GiB"),
    ],
)
def test_sizes_have_binary_units(num_bytes, text):
    assert size(num_bytes) == text
