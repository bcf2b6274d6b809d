"""The pipeline's tables: fixed Parquet schemas, so that a whole zoo's results open in one pyarrow query."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from lorc_core.manifest import checked_file

TableName = Literal[
    "spectra",
    "ranks",
    "projection_errors",
    "training",
    "scores",
    "window_losses",
    "regressions",
    "outcomes",
]
SCHEMAS: dict[TableName, pa.Schema] = {
    "spectra": pa.schema(
        [
            ("layer", pa.int32()),
            ("kind", pa.string()),
            ("block", pa.string()),
            ("num_kv_heads", pa.int32()),
            ("head_dim", pa.int32()),
            ("rotated", pa.bool_()),
            ("singular_values", pa.list_(pa.float64())),
            ("weight_energies", pa.list_(pa.float64())),
            ("state_energies", pa.list_(pa.float64())),
            ("read_energies", pa.list_(pa.float64())),
            ("log10_condition", pa.float64()),
        ]
    ),
    "ranks": pa.schema(
        [
            ("layer", pa.int32()),
            ("kind", pa.string()),
            ("floats", pa.int32()),
            ("width", pa.int32()),
            ("block_ranks", pa.list_(pa.int32())),
            ("note", pa.string()),
            ("predicted_rise", pa.float64()),
        ]
    ),
    "projection_errors": pa.schema(
        [
            ("layer", pa.int32()),
            ("kind", pa.string()),
            ("bound", pa.float64()),
            ("error", pa.float64()),
            ("read_error", pa.float64()),
            ("least_read_error", pa.float64()),
        ]
    ),
    "training": pa.schema([("step", pa.int32()), ("best", pa.float64()), ("last", pa.float64())]),
    "scores": pa.schema(
        [
            ("text", pa.string()),
            ("loss", pa.float64()),
            ("loss_standard_error", pa.float64()),
            ("perplexity", pa.float64()),
            ("scored_tokens", pa.int64()),
            ("bytes_per_token", pa.float64()),
            ("factor_bytes", pa.int64()),
            ("eval_s", pa.float64()),
        ]
    ),
    "window_losses": pa.schema([("text", pa.string()), ("window", pa.int32()), ("loss", pa.float64())]),
    "regressions": pa.schema(
        [
            ("name", pa.string()),
            ("version", pa.string()),
            ("started_at", pa.string()),
            ("text", pa.string()),
            ("registered_loss", pa.float64()),
            ("loss", pa.float64()),
            ("loss_rise_standard_error", pa.float64()),
            ("registered_bytes_per_token", pa.float64()),
            ("bytes_per_token", pa.float64()),
            ("fell", pa.bool_()),
        ]
    ),
    "outcomes": pa.schema(
        [
            ("model", pa.string()),
            ("variant", pa.string()),
            ("step", pa.string()),
            ("status", pa.string()),
            ("error", pa.string()),
            ("wall_s", pa.float64()),
            ("cpu_s", pa.float64()),
            ("peak_bytes", pa.int64()),
            ("read_bytes", pa.int64()),
            ("host", pa.string()),
            ("attempts", pa.int32()),
        ]
    ),
}


def rows_table(name: TableName, rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Rows in the schema of that name; a row that does not fit it is a bug and raises."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMAS[name])


def write_table(directory: Path, name: TableName, rows: Iterable[dict[str, Any]]) -> None:
    """Write an artifact's rows as `name.parquet`."""
    replace_table(directory / f"{name}.parquet", rows_table(name, rows))


def read_rows(directory: Path, name: TableName) -> list[dict[str, Any]]:
    """The rows of an artifact's table."""
    return pq.read_table(checked_file(directory / f"{name}.parquet"), schema=SCHEMAS[name]).to_pylist()


def collect(path: Path, name: TableName, parts: Iterable[tuple[dict[str, str], Path]]) -> None:
    """Join the tables of many artifacts into one file, each with the labels given for it, replacing the file at once.

    Args:
        path: The Parquet file to write.
        name: Of the table and its schema.
        parts: Labels (the same columns for all) and the artifact's directory.
    """
    tables = []
    for labels, directory in parts:
        table = pq.read_table(checked_file(directory / f"{name}.parquet"), schema=SCHEMAS[name])
        for position, (column, value) in enumerate(labels.items()):
            table = table.add_column(position, column, pa.array([value] * len(table), pa.string()))
        tables.append(table)
    if tables:
        replace_table(path, pa.concat_tables(tables))
    else:
        path.unlink(missing_ok=True)  # what an earlier run wrote of what this zoo file no longer asks for


def replace_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file that is whole from its first moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial)
    partial.rename(path)
