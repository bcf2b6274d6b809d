"""Benchmark of how much fits: `lorc bench capacity`.

The largest batch that decodes on one GPU with a preallocated cache, found by trying.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import PreTrainedModel, StaticCache

from jobs.bench_decode import token_seconds
from jobs.bench_models import Contender, Subject, attached, bench_model, contenders_of
from jobs.screen import console, size
from lorc_core.errors import ConfigError
from lorc_core.memory import cache_bytes


@dataclass(frozen=True)
class Capacity:
    """Of one contender at its largest batch; a token's seconds are a median, of one new token in every row."""

    contender: str
    batch_size: int
    token_s: float
    cache_bytes: int
    peak_bytes: int


def largest(fits: Callable[[int], bool]) -> int:
    """The largest batch that fits, by doubling and then halving the gap; 0 where not even one does."""
    if not fits(1):
        return 0
    most, too_many = 1, 2
    while fits(too_many):
        most, too_many = too_many, 2 * too_many
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if fits(middle) else (most, middle)
    return most


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


def fits_with(model: PreTrainedModel, contender: Contender, context: int, batch_size: int) -> bool:
    """Whether it decodes in the GPU's memory."""
    try:
        decode(model, contender, context, batch_size)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def show(found: Sequence[Capacity]) -> Table:
    """Each contender's largest batch, over that of the untouched model."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("variant", "largest batch", "times", "tokens/s", "times", "cache bytes", "peak"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    baseline = found[0]
    for one in found:
        table.add_row(
            one.contender,
            str(one.batch_size),
            f"{one.batch_size / baseline.batch_size:.2f}",
            f"{one.batch_size / one.token_s:,.0f}",
            f"{one.batch_size / one.token_s / (baseline.batch_size / baseline.token_s):.2f}",
            size(one.cache_bytes),
            size(one.peak_bytes),
        )
    return table


def main(subject: Subject, context: int) -> None:
    """Print the table.

    Raises:
        ConfigError: There is no GPU, whose memory has an end that a process can meet and live.
    """
    if not torch.cuda.is_available():
        raise ConfigError("bench capacity fills a GPU's memory, and there is none here; see bench decode")
    screen = console()
    with screen.status("loading"):
        model = bench_model(subject)
        contenders = contenders_of(model, subject.variant)
    screen.print(f"{subject}, {model.config.num_hidden_layers} layers, room for {context:,} tokens a row")
    found = []
    for one in contenders:
        with screen.status(one.name):
            batch_size = largest(partial(fits_with, model, one, context))
            if batch_size == 0:
                raise ConfigError(f"{one.name}: not even one row of {context:,} tokens fits; name a smaller --context")
            found.append(decode(model, one, context, batch_size))
    screen.print(show(found))
