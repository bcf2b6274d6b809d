"""What the tables show on a narrow screen: every name whole, the rise with its error, and columns by importance."""

import io
from itertools import product

import pytest
from rich.console import Console
from rich.text import Text

from jobs.fitted_table import Column, FittedTable
from jobs.results_table import results_table
from jobs.screen import size
from pipeline.results import Result, Unscored

METHODS = "lorc", "kq_joint", "phasor_freq"
SCHEDULES = "progressive", "error_budget"
LABELS = [f"{method}-{schedule}-{kept}" for method, schedule, kept in product(METHODS, SCHEDULES, (0.75, 0.5))]
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
