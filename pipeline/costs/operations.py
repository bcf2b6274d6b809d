"""Linear algebra of a step in float64, counted from shapes.

Counts are nominal: rates are measured at several widths with the same counts, so that their constants cancel.

Shapes: N kv_width, I in_features, W width of a block, D head_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from lorc_core.methods import Axes
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import KeysValues, Kind

Algebra = Literal["product", "gram", "eigh", "eigvalsh", "svd", "qr"]
ALGEBRA: tuple[Algebra, ...] = get_args(Algebra)
VALUES_ALONE = 0.45  # of an SVD with its vectors; one thread took 0.41 of it at a width of 256, 0.44 at 768
PRODUCTS_OF_ROOTS = 7  # two roots of C and of M, their product, and the two factors; see `balanced_factors`


@dataclass(frozen=True)
class Operation:
    """One or several operations of a kind.

    Attributes:
        width: Of the matrix that is decomposed or, of products, the narrowest side: what the rate depends on.
        flops: Nominal floating-point operations, of all together.
    """

    algebra: Algebra
    width: int
    flops: float


def product(rows: int, inner: int, columns: int, times: int = 1) -> Operation:
    """(rows, inner) @ (inner, columns)."""
    return Operation("product", min(rows, inner, columns), 2.0 * times * rows * inner * columns)


def gram(width: int, inner: int, times: int = 1) -> Operation:
    """X X^T of a (width, inner) matrix, half of a product."""
    return Operation("gram", width, float(times) * width**2 * inner)


def spectral(algebra: Literal["eigh", "eigvalsh", "svd"], width: int, times: float = 1) -> Operation:
    """Of a square matrix; a cube, whatever the constant is."""
    return Operation(algebra, width, float(times) * width**3)


def reduced(width: int, inner: int) -> Operation:
    """R of the QR of an (inner, width) matrix."""
    return Operation("qr", min(width, inner), 2.0 * width * inner * min(width, inner))


@lru_cache(maxsize=4096)
def layer_operations(architecture: Architecture, axes: KeysValues[Axes], layer_idx: int) -> tuple[Operation, ...]:
    """Those of `decompose_layer`, in its order; weights are taken to be well-conditioned."""
    operations: list[Operation] = []
    for kind in ("keys", "values"):
        operations += kind_operations(architecture, axes[kind], kind, layer_idx)
    return tuple(operations)


def kind_operations(architecture: Architecture, axes: Axes, kind: Kind, layer_idx: int) -> Iterator[Operation]:
    """Those of `decompose_kind`."""
    partition = axes.partition(architecture)
    width, blocks = partition.width, partition.num_blocks
    whole, inner = architecture.kv_width, architecture.hidden_size
    if axes.statistics == "weights" and axes.reader == "none" and not axes.rotated(architecture, layer_idx):
        if width > inner:
            yield reduced(width, inner)
            yield spectral("svd", width, blocks)
        else:
            yield gram(width, inner, blocks)
            yield spectral("eigh", width, blocks)
        if blocks > 1:
            yield from singular_values(whole, inner)
        return
    if axes.statistics != "calibration":
        yield gram(whole, inner)
    if axes.statistics != "calibration" or kind == "values":  # what reads them is a weight: W_q or W_o
        readers = architecture.num_heads // architecture.num_kv_heads if axes.gqa == "stack" else 1
        yield product(architecture.head_dim, readers * inner, architecture.head_dim, architecture.num_kv_heads)
    # A complex block is half as wide and each of its products takes four: W^3 / 2 in all.
    side, times = (width // 2, 4 * blocks) if partition.is_complex else (width, blocks)
    if axes.is_balanced:
        yield spectral("eigh", side, 2 * times)
        yield product(side, side, side, PRODUCTS_OF_ROOTS * times)
        yield spectral("svd", side, times)
    else:
        yield spectral("eigh", side, times)
    if axes.reader != "none":
        yield spectral("eigvalsh", side, times)
    yield from singular_values(whole, inner)
    if partition.width < whole or partition.is_complex:
        yield gram(whole, inner)
        yield spectral("eigvalsh", side, times)


def singular_values(width: int, inner: int) -> Iterator[Operation]:
    """Those of `singular_values_of`."""
    if width > inner:
        yield reduced(width, inner)
        yield spectral("svd", inner, VALUES_ALONE)
    else:
        yield gram(width, inner)
        yield spectral("eigvalsh", width)


def projection_error_operations(architecture: Architecture, *, calibrated: bool) -> list[Operation]:
    """Those of `projection_errors` for the keys and values of all layers."""
    whole, times = architecture.kv_width, 2 * architecture.num_layers
    operations = [
        product(whole, whole, whole, times),
        product(whole, whole, architecture.hidden_size, times),
        gram(whole, architecture.hidden_size, times),
        spectral("eigvalsh", whole, times),
    ]
    if calibrated:
        operations += [
            product(whole, whole, whole, 7 * times),  # two traces, and the product of two roots
            spectral("eigh", whole, 2 * times),
            spectral("svd", whole, VALUES_ALONE * times),
        ]
    return operations


def moment_operations(architecture: Architecture, tokens: int, *, join_rotated_heads: bool) -> list[Operation]:
    """Those of calibrating all layers on so many tokens, beside running the model."""
    whole, head_dim, layers = architecture.kv_width, architecture.head_dim, architecture.num_layers
    spaces = 2 if architecture.rotary else 1
    joined = spaces if join_rotated_heads else 1
    narrow = spaces * (architecture.num_heads + architecture.num_kv_heads)  # queries, stacked and summed
    narrow += (spaces - joined) * architecture.num_kv_heads
    return [
        product(whole, tokens, whole, (joined + 1) * layers),
        product(head_dim, tokens, head_dim, narrow * layers),
    ]
