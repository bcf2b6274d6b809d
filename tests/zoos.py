"""Zoo files with their models and texts, and what came back of their steps."""

import json
import shutil

import pyarrow.parquet as pq

from pipeline.steps.outcome import Listener
from pipeline.steps.step import Step
from tests.models import save_tiny_model
from tests.paths import DEMO

ZOO = """
name: tiny
models:
  - {{name: small-llama, source: ./small-llama, dtype: float32}}
  - {{name: tiny-opt, source: ./tiny-opt, dtype: float32}}
variants:
  - {{method: lorc, schedule: uniform, kept_fraction: {kept}}}
  - {{method: lorc, schedule: progressive, kept_fraction: 0.75}}
evaluation:
  texts: [{{name: stdlib, source: text.jsonl}}]
  window_tokens: 32
  num_windows: 8
  batch_size: 4
gates: {{max_perplexity_rise: 0.1}}
"""


def write_zoo(directory, kept="[0.9, 0.1]"):
    """A zoo of a trained demo model and a tiny random one, with their text; returns the zoo file."""
    shutil.copytree(DEMO / "stdlib-llama", directory / "small-llama")
    save_tiny_model("opt", directory / "tiny-opt")
    lines = (DEMO / "heldout.jsonl").read_text().splitlines()[:8]
    (directory / "text.jsonl").write_text("\n".join(lines))
    (directory / "zoo.yaml").write_text(ZOO.format(kept=kept))
    return directory / "zoo.yaml"


CALIBRATED_ZOO = """
name: calibrated
models:
  - {{name: rotary, source: ./rotary, dtype: float32}}
  - {{name: plain, source: ./plain, dtype: float32}}
calibration:
  texts: [{{name: first, source: text.jsonl, part: [0, 0.5]}}]
  window_tokens: 32
  num_windows: 12
  probe_windows: 3
  shards: {shards}
variants:
{variants}
evaluation:
  texts: [{{name: rest, source: text.jsonl, part: [0.5, 1]}}]
  window_tokens: 32
  num_windows: 4
gates: {{max_perplexity_rise: 0.5}}
"""


def write_calibrated_zoo(directory, *variants, shards=1):
    """A rotary model with four kv heads, one without rotation, and their text; returns the zoo file."""
    if not (directory / "text.jsonl").is_file():
        save_tiny_model("llama-mha", directory / "rotary")
        save_tiny_model("opt", directory / "plain")
        lines = (DEMO / "heldout.jsonl").read_text().splitlines()[:8]
        (directory / "text.jsonl").write_text("\n".join(lines))
    rows = "\n".join(f"  - {json.dumps(variant)}" for variant in variants)
    (directory / "zoo.yaml").write_text(CALIBRATED_ZOO.format(variants=rows, shards=shards))
    return directory / "zoo.yaml"


class Noted(Listener):
    """Keeps what a run tells."""

    def __init__(self):
        self.phases, self.notes = [], []

    def phase(self, what):
        self.phases.append(what)

    def note(self, line):
        self.notes.append(line)


TABLES = ("scores", "window_losses", "ranks", "projection_errors", "spectra")


def rows(work, table, zoo="tiny"):
    """All rows of a zoo's table but what depends on the clock, or on where the models are."""
    read = pq.read_table(work / "tables" / table / f"{zoo}.parquet")
    return read.drop_columns([name for name in ("eval_s", "fingerprint") if name in read.column_names]).to_pylist()


def copy_of(work, place):
    """A copy of a finished work directory, which another test may disturb."""
    return shutil.copytree(work, place, ignore=shutil.ignore_patterns("lease.json"))


def statuses(run):
    found = {}
    for outcome in run.outcomes:
        found.setdefault((outcome.name, outcome.status), []).append(outcome)
    return {key: len(outcomes) for key, outcomes in found.items()}


def kinds_of_steps(base=Step):
    """All that are declared where this is called."""
    for child in base.__subclasses__():
        if "name" in vars(child):
            yield child
        yield from kinds_of_steps(child)
