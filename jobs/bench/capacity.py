"""Benchmark of how much fits: `lorc bench capacity`.

The largest batch that decodes on one GPU with a preallocated cache, found by trying.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from transformers import PreTrainedModel, StaticCache

from jobs.bench.decode import token_seconds
from jobs.bench.models import Contender, Subject, attached, bench_model, contenders_of
from jobs.screen.console import console, size
from jobs.screen.fitted_table import Column, FittedTable
from lorc_core.caches.memory import cache_bytes
from lorc_core.errors import ConfigError


@dataclass(frozen=True)
class Capacity:
    """Of one contender at its largest batch; a token's seconds are a median, of one new token in every row."""

    contender: str
    batch_size: int
    token_s: float
    cache_bytes: int
    peak_bytes: int


def largest(decodes: Callable[[int], Capacity | None]) -> Capacity | None:
    """Of the largest batch that fits, by doubling and then halving the gap; None where not even one row does."""
    best, too_many = decodes(1), 2
    if best is None:
        return None
    while more := decodes(too_many):
        best, too_many = more, 2 * too_many
    while too_many - best.batch_size > 1:
        middle = (best.batch_size + too_many) // 2
        if more := decodes(middle):
            best = more
        else:
            too_many = middle
    return best


@torch.inference_mode()
def decode(model: PreTrainedModel, contender: Contender, context: int, batch_size: int) -> Capacity:
    """Some tokens with a cache whose room for `context` tokens is all taken from the start, and read."""
    torch.cuda.reset_peak_memory_stats()
    cache = StaticCache(config=model.config, max_cache_len=context)
    ids = torch.zeros(batch_size, 1, dtype=torch.long, device=model.device)
    with attached(model, contender):
        seconds = median(token_seconds(model, cache, ids))
    peak = torch.cuda.max_memory_allocated()
    return Capacity(contender.name, batch_size, seconds, cache_bytes(cache), peak)


def try_to_decode(model: PreTrainedModel, contender: Contender, context: int, batch_size: int) -> Capacity | None:
    """None where the GPU's memory does not suffice."""
    try:
        return decode(model, contender, context, batch_size)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):  # cuBLAS's own
            raise
    finally:
        torch.cuda.empty_cache()
    return None


def capacity_table(capacities: Sequence[Capacity]) -> FittedTable:
    """Each contender's largest batch, over that of the untouched model."""
    titles = "largest batch", "times", "tokens/s", "times", "cache", "peak"
    table = FittedTable("variant", [Column(title) for title in titles])
    baseline = capacities[0]
    for capacity in capacities:
        table.add_row(
            capacity.contender,
            str(capacity.batch_size),
            f"{capacity.batch_size / baseline.batch_size:.2f}",
            f"{capacity.batch_size / capacity.token_s:,.0f}",
            f"{capacity.batch_size / capacity.token_s / (baseline.batch_size / baseline.token_s):.2f}",
            size(capacity.cache_bytes),
            size(capacity.peak_bytes),
        )
    return table


def main(subject: Subject, context: int) -> None:
    """Print the table.

    Raises:
        ConfigError: There is no GPU, whose memory has an end that a process can meet and live, or not one row fits.
    """
    if not torch.cuda.is_available():
        raise ConfigError("bench capacity fills a GPU's memory, and there is none here; see bench decode")
    screen = console()
    with screen.status("loading"):
        model = bench_model(subject)
        contenders = contenders_of(model, subject.variant)
    screen.print(f"{subject}, {model.config.num_hidden_layers} layers, room for {context:,} tokens a row")
    capacities = []
    for contender in contenders:
        with screen.status(contender.name):
            best = largest(partial(try_to_decode, model, contender, context))
        if best is None:
            raise ConfigError(f"{contender.name}: not one row of {context:,} tokens fits; name a smaller --context")
        capacities.append(best)
    screen.print(capacity_table(capacities))
