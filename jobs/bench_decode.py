"""Benchmark of a compressed cache at work: `lorc bench decode`.

Seconds for one new token and for a prefill, and the bytes of the cache, of the untouched model and of variants of it,
turn by turn in one run. Weights and factors are random: speed and memory depend on their shapes alone.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from jobs.screen import console, size
from lorc_core.architecture import KINDS, Architecture, Kind, architecture_of
from lorc_core.errors import ConfigError
from lorc_core.growing_cache import GrowingCache
from lorc_core.latent_cache import LayerFactors, project_down
from lorc_core.memory import cache_bytes
from lorc_core.methods import METHODS, Method
from lorc_core.projection import Factors
from lorc_core.runtime import Attachment
from lorc_core.variant import load_variant

LLAMA_3 = {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072}
SHAPES: dict[str, dict[str, Any]] = {
    # 8 kv heads of 128 as in LLaMA-3, in layers as wide as TinyLlama's; the vocabulary is small, for a laptop's memory
    "small": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 4096,
        "max_position_embeddings": 131072,
    },
    "llama-3-8b": {
        **LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
# Method, and the shares of the floats of keys and values that are kept.
CONTENDERS = (
    ("kq_svd", 0.5, 0.5),
    ("phasor_freq", 0.5, 0.5),
    ("kq_joint", 0.25, 0.75),
    ("lorc", 0.25, 0.75),
)
BASELINE = "untouched"
CACHES = ("static", "growing")
DTYPES = ("float32", "bfloat16", "float16")
PREFILL_ROUNDS = 3
TOKENS_A_TURN = 4


@dataclass(frozen=True)
class Settings:
    """What is run: a model's directory or a named shape, and where its caches stand.

    Raises:
        ConfigError: A shape or a cache is not known, or a variant has no model.
    """

    model: Path | None = None
    variant: Path | None = None
    shape: str = "small"
    num_layers: int | None = None
    dtype: str = "float32"
    caches: Sequence[str] = CACHES
    contexts: Sequence[int] = (8192,)
    batch_sizes: Sequence[int] = (1,)
    num_tokens: int = 16
    prefill_tokens: int = 2048

    def __post_init__(self) -> None:
        for name, given, known in (
            ("shape", [self.shape], SHAPES),
            ("cache", self.caches, CACHES),
            ("dtype", [self.dtype], DTYPES),
        ):
            if unknown := [one for one in given if one not in known]:
                raise ConfigError(f"{name} {unknown[0]!r} is not known; known are {', '.join(known)}")
        if self.variant is not None and self.model is None:
            raise ConfigError("a variant is measured on its base model; name its directory with --model")


@dataclass(frozen=True)
class Contender:
    """A way to run the model."""

    name: str
    factors: tuple[LayerFactors, ...]


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


def random_contender(architecture: Architecture, method: str, kept: dict[Kind, float]) -> Contender:
    """Random factors of a method's blocks and uniform ranks."""
    generator = torch.Generator().manual_seed(0)

    def factors(layer_idx: int, kind: Kind) -> Factors:
        axes = METHODS[method].axes(layer_idx, kind)
        partition = axes.partition(architecture)
        rank = round(kept[kind] * partition.width / partition.rank_step) * partition.rank_step
        total = rank * partition.num_blocks
        up = torch.randn(partition.width, total, generator=generator) / partition.width**0.5
        own_down = up.T.clone() if axes.reader == "interaction" else None
        rotated = kind == "keys" and axes.rotated(architecture, layer_idx)
        return Factors(partition, (rank,) * partition.num_blocks, up, own_down, None, rotated)

    layers: tuple[LayerFactors, ...] = tuple(
        {kind: factors(layer_idx, kind) for kind in KINDS} for layer_idx in range(architecture.num_layers)
    )
    shares = f"{kept['keys']:g}" if kept["keys"] == kept["values"] else f"{kept['keys']:g}/{kept['values']:g}"
    return Contender(f"{method} {shares}", layers)


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
    with Attachment(model, architecture, contender.factors).start() as attachment:
        for layer_idx, state in enumerate(attachment.layers):
            keys, values = (torch.randn(shape, device=model.device, dtype=model.dtype) for _ in KINDS)
            if state is not None:
                keys, values = project_down(keys, state, "keys"), project_down(values, state, "values")
            cache.update(keys, values, layer_idx)
    return cache


@contextmanager
def attached(model: PreTrainedModel, contender: Contender) -> Iterator[None]:
    """The contender's factors on the model, if it has any."""
    if not any(any(layer.values()) for layer in contender.factors):
        yield
        return
    with Attachment(model, architecture_of(model.config), contender.factors).start():
        yield


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds."""
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
    held = [filled_cache(model, one, cache, context, room, batch_size) for one in contenders]
    empty = new_cache(model, cache, room)
    ids = torch.randint(model.config.vocab_size, (batch_size, settings.prefill_tokens), device=model.device)
    on_gpu = torch.cuda.is_available()
    steps: list[list[float]] = [[] for _ in contenders]
    peaks: list[int | None] = [None for _ in contenders]
    without: list[float] = []
    for _ in range(num_turns):
        without += token_seconds(model, empty, ids)
        for idx, one in enumerate(contenders):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            with attached(model, one):
                steps[idx] += token_seconds(model, held[idx], ids)
            if on_gpu:
                others = sum(cache_bytes(other) for other in held if other is not held[idx])
                peaks[idx] = torch.cuda.max_memory_allocated() - others
    sizes = [cache_bytes(one) for one in held]
    del held
    prefills: list[list[float]] = [[] for _ in contenders]
    for _ in range(PREFILL_ROUNDS):
        for idx, one in enumerate(contenders):
            fresh = new_cache(model, cache, settings.prefill_tokens)
            with attached(model, one):
                prefills[idx].append(seconds_of(partial(model, ids, past_key_values=fresh, logits_to_keep=1)))
    return [
        Measured(
            contender=one.name,
            cache=cache,
            context=context,
            batch_size=batch_size,
            token_s=median(steps[idx]),
            empty_s=median(without),
            prefill_s=median(prefills[idx]),
            cache_bytes=total,
            peak_bytes=peaks[idx],
        )
        for idx, (one, total) in enumerate(zip(contenders, sizes, strict=True))
    ]


def bench_model(settings: Settings) -> PreTrainedModel:
    """A model from a directory, or a random one of a named shape, on a GPU if there is one."""
    dtype = getattr(torch, settings.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.model is not None:
        return AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, device_map=device)
    shape = dict(SHAPES[settings.shape])
    if settings.num_layers is not None:
        shape["num_hidden_layers"] = settings.num_layers
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=dtype).eval()


def contenders_of(model: PreTrainedModel, variant_dir: Path | None) -> list[Contender]:
    """The untouched model and a variant of it, or one of each method with random factors."""
    architecture = architecture_of(model.config)
    untouched: LayerFactors = dict.fromkeys(KINDS)
    found = [Contender(BASELINE, (untouched,) * architecture.num_layers)]
    if variant_dir is not None:
        variant = load_variant(variant_dir)
        return [*found, Contender(f"{variant.method.name} {variant.kept_fraction:.2f}", variant.factors)]
    return found + [
        random_contender(architecture, method, {"keys": keys, "values": values})
        for method, keys, values in CONTENDERS
        if applies(METHODS[method], architecture)
    ]


def applies(method: Method, architecture: Architecture) -> bool:
    """Whether a model can be compressed so; one without rotation has no frequencies."""
    try:
        method.check(architecture)
    except ConfigError:
        return False
    return True


def show(measured: Sequence[Measured]) -> Table:
    """Each setting's figures, over those of the untouched model."""
    table = Table(box=SIMPLE_HEAD)
    left, ratios = ("cache", "variant"), ("token", "its cache", "prefill")
    for name in ("cache", "context", "batch", "variant", "tokens/s", *ratios, "cache bytes", "of whole", "peak"):
        table.add_column(name, justify="left" if name in left else "right")
    baseline = measured[0]
    for one in measured:
        if one.contender == BASELINE:
            baseline = one
            table.add_section()
        table.add_row(
            one.cache,
            f"{one.context:,}",
            str(one.batch_size),
            one.contender,
            f"{one.batch_size / one.token_s:.1f}",
            f"{one.token_s / baseline.token_s:.2f}",
            f"{(one.token_s - one.empty_s) / (baseline.token_s - one.empty_s):.2f}",
            f"{one.prefill_s / baseline.prefill_s:.2f}",
            size(one.cache_bytes),
            f"{one.cache_bytes / baseline.cache_bytes:.3f}",
            size(one.peak_bytes) if one.peak_bytes is not None else "-",
        )
    return table


def plot(measured: Sequence[Measured], path: Path) -> None:
    """Tokens per second and cache bytes over the context, one line for each contender, batch size and cache."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    settings = sorted({(one.cache, one.batch_size) for one in measured})
    for cache, batch_size in settings:
        for name in dict.fromkeys(one.contender for one in measured):
            rows = [one for one in measured if (one.cache, one.batch_size, one.contender) == (cache, batch_size, name)]
            label = name if len(settings) == 1 else f"{name}, {cache}, batch {batch_size}"
            contexts = [one.context for one in rows]
            speed.plot(contexts, [batch_size / one.token_s for one in rows], marker="o", label=label)
            memory.plot(contexts, [one.cache_bytes / 2**30 for one in rows], marker="o")
    speed.set(xlabel="cached tokens", ylabel="new tokens per second", ylim=(0, None))
    memory.set(xlabel="cached tokens", ylabel="cache, GiB", ylim=(0, None))
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(settings: Settings, plot_path: Path | None) -> None:
    """Print the table, and draw the plot if a path is given."""
    screen = console()
    with screen.status("loading"):
        model = bench_model(settings)
        contenders = contenders_of(model, settings.variant)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    what = settings.model or f"{settings.shape} with random weights"
    screen.print(
        f"{where}, torch {torch.__version__}, {what}, {model.config.num_hidden_layers} layers, {settings.dtype}"
    )
    screen.print(
        f"token, prefill: median seconds for a token of every row, and to prefill {settings.prefill_tokens:,} tokens, "
        "over the untouched model's; its cache: of a token's, what comes on top of the time with nothing cached"
    )
    measured = []
    for cache, context, batch_size in product(settings.caches, settings.contexts, settings.batch_sizes):
        with screen.status(f"{cache} cache, {context:,} tokens, batch {batch_size}"):
            measured += measure(model, contenders, settings, cache, (context, batch_size))
    screen.print(show(measured))
    if plot_path is not None:
        plot(measured, plot_path)
        screen.print(f"plot: {plot_path}")
