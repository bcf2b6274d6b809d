"""Benchmark of a compressed cache at work: `lorc bench decode`.

Seconds for one new token and for a prefill, and the bytes of the cache, of the untouched model and of variants of it,
turn by turn in one run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache

from jobs.bench.models import (
    BASELINE,
    Contender,
    Subject,
    attached,
    bench_model,
    check_known,
    contenders_of,
)
from jobs.bench.timing import seconds_of
from jobs.screen.console import console, size
from jobs.screen.fitted_table import Column, FittedTable
from lorc_core.attention.attach import Attachment
from lorc_core.caches.growing import GrowingCache
from lorc_core.caches.memory import cache_bytes
from lorc_core.model.architecture import architecture_of
from lorc_core.model.kinds import KINDS

CACHES = ("static", "growing")
PREFILL_ROUNDS = 5
TOKENS_A_TURN = 4


@dataclass(frozen=True)
class Settings:
    """Where the model's caches stand.

    Raises:
        ConfigError: A cache is not known.
    """

    caches: Sequence[str] = CACHES
    contexts: Sequence[int] = (8192,)
    batch_sizes: Sequence[int] = (1,)
    num_tokens: int = 16
    prefill_tokens: int = 2048

    def __post_init__(self) -> None:
        check_known("cache", self.caches, CACHES)


@dataclass(frozen=True)
class Measured:
    """Of one contender in one setting; seconds are medians. `empty_s` is the untouched model's with nothing cached."""

    contender: str
    cache: str
    context: int
    batch_size: int
    token_s: float
    empty_s: float
    prefill_s: float
    cache_bytes: int
    peak_bytes: int | None


def new_cache(model: PreTrainedModel, kind: str, num_tokens: int) -> Cache:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=num_tokens)
    return GrowingCache(config=model.config)


def filled_cache(
    model: PreTrainedModel, contender: Contender, kind: str, context: int, room: int, batch_size: int
) -> Cache:
    """A cache of random states as the contender keeps them, with room for more tokens."""
    architecture, cache = architecture_of(model.config), new_cache(model, kind, context + room)
    shape = (batch_size, architecture.num_kv_heads, context, architecture.head_dim)
    with Attachment(model, architecture, contender.factors) as attachment:
        for layer_idx, state in enumerate(attachment.layers):
            keys, values = (torch.randn(shape, device=model.device, dtype=model.dtype) for _ in KINDS)
            if state is not None:
                keys, values = (
                    state.projections.project_down(*pair) for pair in zip((keys, values), KINDS, strict=True)
                )
            cache.update(keys, values, layer_idx)
    return cache


def token_seconds(model: PreTrainedModel, cache: Cache, ids: Int[Tensor, "b t"]) -> list[float]:
    """Of some tokens in a row, after one that is not counted: what is kept from token to token is made then."""
    work = partial(model, ids[:, :1], past_key_values=cache)
    return [seconds_of(work) for _ in range(TOKENS_A_TURN + 1)][1:]


@torch.inference_mode()
def measure(
    model: PreTrainedModel, contenders: Sequence[Contender], settings: Settings, cache: str, place: tuple[int, int]
) -> list[Measured]:
    """Every contender in turn, some tokens at a time, so that other load on the machine meets them alike."""
    context, batch_size = place
    num_turns = -(-settings.num_tokens // TOKENS_A_TURN)
    room = num_turns * (TOKENS_A_TURN + 1)
    held = [filled_cache(model, contender, cache, context, room, batch_size) for contender in contenders]
    empty = new_cache(model, cache, room)
    ids = torch.randint(model.config.vocab_size, (batch_size, settings.prefill_tokens), device=model.device)
    on_gpu = torch.cuda.is_available()
    steps: list[list[float]] = [[] for _ in contenders]
    peaks: list[int | None] = [None for _ in contenders]
    without: list[float] = []
    for _ in range(num_turns):
        without += token_seconds(model, empty, ids)
        for idx, contender in enumerate(contenders):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            with attached(model, contender):
                steps[idx] += token_seconds(model, held[idx], ids)
            if on_gpu:
                others = sum(cache_bytes(other) for other in held if other is not held[idx])
                peaks[idx] = torch.cuda.max_memory_allocated() - others
    sizes = [cache_bytes(filled) for filled in held]
    del held
    prefills: list[list[float]] = [[] for _ in contenders]
    for _ in range(PREFILL_ROUNDS):
        for idx, contender in enumerate(contenders):
            fresh = new_cache(model, cache, settings.prefill_tokens)
            with attached(model, contender):
                prefills[idx].append(seconds_of(partial(model, ids, past_key_values=fresh, logits_to_keep=1)))
    return [
        Measured(
            contender=contender.name,
            cache=cache,
            context=context,
            batch_size=batch_size,
            token_s=median(steps[idx]),
            empty_s=median(without),
            prefill_s=median(prefills[idx]),
            cache_bytes=total,
            peak_bytes=peaks[idx],
        )
        for idx, (contender, total) in enumerate(zip(contenders, sizes, strict=True))
    ]


def decode_table(measured: Sequence[Measured]) -> FittedTable:
    """Each setting's figures, over those of the untouched model."""
    titles = ["tokens/s", "token", "its cache", "prefill", "cache", "of whole"]
    titles += ["peak"] if measured[0].peak_bytes is not None else []
    table = FittedTable("variant", [Column(title) for title in titles])
    baseline = measured[0]
    for figures in measured:
        if figures.contender == BASELINE:
            baseline = figures
            rows = "row" if figures.batch_size == 1 else "rows"
            table.add_heading(f"{figures.cache} cache, {figures.context:,} tokens, {figures.batch_size} {rows}")
        table.add_row(
            figures.contender,
            f"{figures.batch_size / figures.token_s:.1f}",
            f"{figures.token_s / baseline.token_s:.2f}",
            f"{(figures.token_s - figures.empty_s) / (baseline.token_s - figures.empty_s):.2f}",
            f"{figures.prefill_s / baseline.prefill_s:.2f}",
            size(figures.cache_bytes),
            f"{figures.cache_bytes / baseline.cache_bytes:.3f}",
            *([size(figures.peak_bytes)] if figures.peak_bytes is not None else []),
        )
    return table


def plot(measured: Sequence[Measured], path: Path) -> None:
    """Tokens per second and cache bytes over the context, one line for each contender, batch size and cache."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    settings = sorted({(figures.cache, figures.batch_size) for figures in measured})
    for (cache, batch_size), name in product(settings, dict.fromkeys(figures.contender for figures in measured)):
        line = [
            figures
            for figures in measured
            if (figures.cache, figures.batch_size, figures.contender) == (cache, batch_size, name)
        ]
        label = name if len(settings) == 1 else f"{name}, {cache}, batch {batch_size}"
        contexts = [figures.context for figures in line]
        speed.plot(contexts, [batch_size / figures.token_s for figures in line], marker="o", label=label)
        memory.plot(contexts, [figures.cache_bytes / 2**30 for figures in line], marker="o")
    speed.set(xlabel="cached tokens", ylabel="new tokens per second", ylim=(0, None))
    memory.set(xlabel="cached tokens", ylabel="cache, GiB", ylim=(0, None))
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(subject: Subject, settings: Settings, plot_path: Path | None) -> None:
    """Print the table, and draw the plot if a path is given."""
    screen = console()
    with screen.status("loading"):
        model = bench_model(subject)
        contenders = contenders_of(model, subject.variant)
    screen.print(f"{subject}, {model.config.num_hidden_layers} layers, MLP {model.config.intermediate_size}")
    screen.print(
        f"token, prefill: median seconds for a token of every row, and to prefill {settings.prefill_tokens:,} tokens, "
        "over the untouched model's; its cache: of a token's, what comes on top of the time with nothing cached"
    )
    measured = []
    for cache, context, batch_size in product(settings.caches, settings.contexts, settings.batch_sizes):
        with screen.status(f"{cache} cache, {context:,} tokens, batch {batch_size}"):
            measured += measure(model, contenders, settings, cache, (context, batch_size))
    screen.print(decode_table(measured))
    if plot_path is not None:
        plot(measured, plot_path)
        screen.print(f"plot: {plot_path}")
