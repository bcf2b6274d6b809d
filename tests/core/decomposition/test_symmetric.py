"""Gram matrices and eigenvectors of wide matrices against torch's own, and against what they must satisfy."""

import pytest
import torch
from threadpoolctl import threadpool_info

from lorc_core.decomposition.symmetric import WIDE, blas_threads, eigh, eigvalsh, gram


def random_rows(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("width", [1, 5, WIDE - 1, WIDE, WIDE + 1, 2 * WIDE + 37])
@pytest.mark.parametrize("columns", [1, 700])
@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
def test_gram_is_the_product_however_the_rows_are_stored(width, columns, by_columns):
    rows = random_rows(columns, width).mT if by_columns else random_rows(width, columns)
    product = gram(rows)
    torch.testing.assert_close(product, rows @ rows.mT, rtol=0, atol=1e-11)  # worst seen 1e-12
    assert product.is_contiguous()  # safetensors saves no other
    if width >= WIDE:
        assert torch.equal(product, product.mT)  # one triangle is the other's copy


def test_gram_takes_strided_batched_complex_and_single_precision():
    strided = random_rows(2 * WIDE, 40)[::2, ::2]
    torch.testing.assert_close(gram(strided), strided @ strided.mT)
    for rows in (
        random_rows(3, WIDE, 20),
        random_rows(WIDE, 20, dtype=torch.complex128),
        random_rows(WIDE, 20, dtype=torch.float32),
    ):
        torch.testing.assert_close(gram(rows), rows @ rows.mH)


@pytest.mark.parametrize("shape", [(40,), (WIDE + 3,), (2, WIDE)])
def test_eigenvectors_rebuild_the_matrix_and_are_orthonormal(shape):
    rows = random_rows(*shape, 2 * shape[-1])
    moment = rows @ rows.mT
    before = moment.clone()
    values, vectors = eigh(moment)
    scale = moment.diagonal(dim1=-2, dim2=-1).sum(-1).max()
    torch.testing.assert_close(vectors * values[..., None, :] @ vectors.mT, moment, rtol=0, atol=1e-14 * scale.item())
    identity = torch.eye(shape[-1], dtype=torch.float64).expand_as(moment)
    torch.testing.assert_close(vectors.mT @ vectors, identity, rtol=0, atol=1e-12)  # worst seen 1.3e-14
    assert (values.diff(dim=-1) >= 0).all()
    torch.testing.assert_close(eigvalsh(moment), torch.linalg.eigvalsh(moment), rtol=1e-11, atol=0)
    torch.testing.assert_close(values, eigvalsh(moment), rtol=1e-11, atol=0)
    assert torch.equal(moment, before)


def test_scipys_libraries_take_torchs_threads_and_give_them_back():
    def threads():
        return {library["filepath"]: library["num_threads"] for library in threadpool_info()}

    before, torch_threads = threads(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with blas_threads():
            of_blas = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
            assert of_blas == {1}
    finally:
        torch.set_num_threads(torch_threads)
    assert threads() == before
