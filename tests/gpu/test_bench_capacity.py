"""The largest batch that fits a GPU, in a small part of its memory. Unproven: no GPU was at hand, none has run."""

from functools import partial

import pytest
import torch

from jobs.bench.capacity import largest, try_to_decode
from jobs.bench.models import Subject, bench_model, contenders_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TWO_GIB, CONTEXT = 2 << 30, 2048


@pytest.fixture
def little_memory():
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(TWO_GIB / torch.cuda.mem_get_info()[1])
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_half_of_the_cache_lets_nearly_twice_the_batch_in(little_memory):
    model = bench_model(Subject(num_layers=4, intermediate_size=64, dtype="bfloat16"))
    untouched, half = (one for one in contenders_of(model, None) if one.name in ("untouched", "kq_svd 0.5"))
    whole, compressed = (largest(partial(try_to_decode, model, one, CONTEXT)) for one in (untouched, half))
    assert whole.peak_bytes <= TWO_GIB
    assert compressed.cache_bytes * whole.batch_size * 2 == whole.cache_bytes * compressed.batch_size
    assert 1.5 * whole.batch_size < compressed.batch_size <= 2.1 * whole.batch_size
