"""Benchmark of the decomposition: `lorc bench svd`.

Ours against `numpy.linalg.svd` in one run with the same threads, on the key shapes of published models; the error
of our singular values against float64 SVD over condition numbers; the total for a 70B model.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from jobs.bench.timing import best_seconds_of, device_line
from jobs.screen.console import console
from jobs.screen.fitted_table import Column, FittedTable
from lorc_core.decomposition.decompose import decompose_weight
from lorc_core.decomposition.left_singular import left_singular, left_singular_by_gram, left_singular_by_qr
from lorc_core.model.blocks import Partition

SHAPES = {"8B": (1024, 4096), "70B": (1024, 8192), "13B": (5120, 5120)}  # W_k and W_v of LLaMA models
MATRICES_70B = 160
LARGE_ROWS = 2048  # timed once: they take a minute
CONDITIONS = (1e1, 1e3, 3e3, 1e4, 1e6, 1e8)


@dataclass(frozen=True)
class Timing:
    """Best seconds of each way to decompose one shape."""

    numpy_s: float
    gram_s: float
    qr_s: float


def random_weight(rows: int, columns: int, seed: int) -> Float[Tensor, "n i"]:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def weight_of_condition(rows: int, columns: int, condition: float) -> Float[Tensor, "n i"]:
    """A float64 matrix with singular values evenly spaced in logarithm from 1 down to 1 / condition."""
    left = torch.linalg.qr(random_weight(rows, rows, 1).double())[0]
    right = torch.linalg.qr(random_weight(columns, rows, 2).double())[0]
    return left * torch.logspace(0, -np.log10(condition), rows, dtype=torch.float64) @ right.T


def time_shape(rows: int, columns: int) -> Timing:
    """From a float32 weight to left singular vectors and singular values, by three ways."""
    weight = random_weight(rows, columns, 0)
    repeats = 1 if rows > LARGE_ROWS else 3
    return Timing(
        numpy_s=best_seconds_of(lambda: np.linalg.svd(weight.numpy(), full_matrices=False), repeats),
        gram_s=best_seconds_of(lambda: left_singular_by_gram(weight.double()), repeats),
        qr_s=best_seconds_of(lambda: left_singular_by_qr(weight.double()), repeats),
    )


def relative_error(computed: Float[Tensor, " n"], exact: Float[Tensor, " n"]) -> float:
    """Worst over all singular values, each relative to itself."""
    return ((computed - exact).abs() / exact).max().item()


def speed_table() -> FittedTable:
    titles = "shape", "numpy float32", "ours, Gram", "faster", "ours, QR + SVD", "faster"
    title = "seconds, and times faster than numpy.linalg.svd float32"
    table = FittedTable("W_k of", [Column(title) for title in titles], title)
    for model, (rows, columns) in SHAPES.items():
        timing = time_shape(rows, columns)
        table.add_row(
            model,
            f"{rows} x {columns}",
            f"{timing.numpy_s:.2f}",
            f"{timing.gram_s:.2f}",
            f"{timing.numpy_s / timing.gram_s:.1f}x",
            f"{timing.qr_s:.2f}",
            f"{timing.numpy_s / timing.qr_s:.1f}x",
        )
    return table


def accuracy_table(rows: int, columns: int) -> FittedTable:
    titles = "route taken", "its error", "Gram error", "QR + SVD error"
    title = f"worst relative error of a singular value against float64 SVD, {rows} x {columns}"
    table = FittedTable("condition", [Column(title) for title in titles], title)
    for condition in CONDITIONS:
        weight = weight_of_condition(rows, columns, condition)
        exact = torch.from_numpy(np.linalg.svd(weight.numpy(), compute_uv=False))
        _, ours, route = left_singular(weight)
        by_gram, by_qr = left_singular_by_gram(weight)[1], left_singular_by_qr(weight)[1]
        errors = [relative_error(values, exact) for values in (ours, by_gram, by_qr)]
        table.add_row(f"{condition:.0e}", route, *(f"{error:.1e}" for error in errors))
    return table


def total_70b_s(screen: Console) -> float:
    """Seconds to decompose as many matrices as a 70B model has, float32 in, factors out."""
    weights = [random_weight(*SHAPES["70B"], seed) for seed in range(4)]
    joint = Partition("joint", num_kv_heads=8, head_dim=SHAPES["70B"][0] // 8)
    started = time.perf_counter()
    with screen.status(f"decomposing {MATRICES_70B} matrices"):
        for index in range(MATRICES_70B):
            decompose_weight(weights[index % len(weights)], joint, None)
    return time.perf_counter() - started


def main() -> None:
    """Print all tables."""
    screen = console()
    screen.print(f"{device_line()}, numpy {np.__version__}")
    with screen.status("timing"):
        screen.print(speed_table())
    with screen.status("measuring errors"):
        screen.print(accuracy_table(*SHAPES["70B"]))
    rows, columns = SHAPES["70B"]
    screen.print(f"70B: {MATRICES_70B} matrices of {rows} x {columns} in {total_70b_s(screen):.1f} s")


if __name__ == "__main__":
    main()
