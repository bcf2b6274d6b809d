"""Orthogonal bases of latents: one matrix a block, trained, and what a decomposition is in another basis.

Shapes: B blocks, W channels of a block.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from lorc_core.decomposition.factors import Decomposition, LayerDecomposition
from lorc_core.methods import BALANCED_READERS, Method, Reader
from lorc_core.model.kinds import KeysValues, by_layer, layer_kinds

Bases = list[KeysValues[Float[Tensor, "b w w"]]]  # of the latents of each layer: one orthogonal matrix per block


class LatentBasis(nn.Module):
    """One orthogonal matrix per block, the identity at the start.

    Args:
        decomposition: Whose latents, and on which device.
    """

    def __init__(self, decomposition: Decomposition) -> None:
        super().__init__()
        num_blocks, width = decomposition.up.shape[:2]
        identity = torch.eye(width, device=decomposition.up.device).repeat(num_blocks, 1, 1)
        self.weight = nn.Parameter(identity)
        # identity @ exp(a skew matrix): orthogonal at every step, and exactly the identity at first
        orthogonal(self, "weight", orthogonal_map="matrix_exp", use_trivialization=True)


def in_basis(decomposition: Decomposition, basis: Float[Tensor, "b w w"]) -> Decomposition:
    """The same projections at full rank, along other directions: up Q, Q^T down. Energies stay those before.

    Args:
        decomposition: Of real blocks.
        basis: Q of each block, orthogonal, on the device and in the dtype of `up`. Gradients flow to it.
    """
    own_down = None if decomposition.own_down is None else basis.mT @ decomposition.own_down
    return replace(decomposition, up=decomposition.up @ basis, own_down=own_down)


def change_basis(decomposition: Decomposition, basis: Float[Tensor, "b w w"], reader: Reader) -> Decomposition:
    """`in_basis`, with what each new direction saves of the error that the start's method minimises.

    With `interaction` and `gradient`, latents and what reads them have the same second moment, S =
    diag(sqrt(energies)); in the basis it is G = Q^T S Q, and what is cut past rank K costs the sum of G_ij^2 over
    i, j > K. With the other readers latents have the moment E = diag(energies), of which the cut costs the sum of
    (Q^T E Q)_ii over i > K.

    Args:
        decomposition: The start, of real blocks.
        basis: Q of each block, orthogonal.
        reader: Of the start's method.

    Returns:
        Factors in the start's dtype; `read_energies` past K add up to the error at rank K. They need not fall.
    """
    basis = basis.to(decomposition.up.device)
    exact = basis.double()
    energies = decomposition.read_energies.double()
    if reader in BALANCED_READERS:
        squares = (exact.mT * energies.sqrt()[:, None, :] @ exact).square()  # G_ij^2
        # sums over i, j >= K of each K, by cumulative sums from the last row and column; a direction saves what the
        # sum loses from K to K + 1
        corner = squares.flip(-1, -2).cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1).flip(-1)
        saved = corner - torch.cat([corner[:, 1:], corner.new_zeros(len(corner), 1)], dim=1)
    else:
        saved = (exact.mT * energies[:, None, :] @ exact).diagonal(dim1=-2, dim2=-1)
    rotated = in_basis(decomposition, basis.to(decomposition.up.dtype))
    return replace(rotated, read_energies=saved.clamp(min=0))


def trained_layers(layers: Sequence[LayerDecomposition], bases: Bases, method: Method) -> list[LayerDecomposition]:
    """The start's decompositions, rotated.

    Args:
        layers: The start, decomposed by `method`.
        bases: Of each layer.
        method: Whose readers say what a direction saves.
    """
    return list(
        by_layer(
            [
                change_basis(layers[idx][kind], bases[idx][kind], method.axes(idx, kind).reader)
                for idx, kind in layer_kinds(len(layers))
            ]
        )
    )
