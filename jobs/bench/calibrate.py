"""Benchmark of calibration: `lorc bench calibrate`.

Calibration against a plain forward pass over the same tokens in one run, and the peak memory of calibrating ever more
tokens, each in a process of its own.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.bench.timing import device, device_line, seconds_of
from jobs.screen.console import console, size
from jobs.screen.fitted_table import Column, FittedTable
from lorc_core.measurement.calibration import batches, calibrate

# Two layers as wide as LLaMA-3.2-1B's, and as its keys and values; the vocabulary is small, since no logits are needed.
SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "vocab_size": 4096,
}
NUM_KV_HEADS = (8, 32)  # LLaMA-3.2-1B's, and one for every query head: the widest keys there are
SEQUENCE_TOKENS = 1024
REPEATS = 5
SEQUENCE_COUNTS = (4, 8, 16)  # of the memory table


def random_llama(num_kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=num_kv_heads)).eval().to(device())


def random_sequences(count: int) -> Int[Tensor, "s t"]:
    return torch.randint(SHAPE["vocab_size"], (count, SEQUENCE_TOKENS), generator=torch.Generator().manual_seed(0))


def seconds(num_kv_heads: int) -> tuple[float, float]:
    """Best seconds of a plain forward pass through all layers and of calibrating, over the same tokens."""
    model, sequences = random_llama(num_kv_heads), random_sequences(4)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches(sequences):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)

    def calibrated() -> None:
        calibrate(model, batches(sequences))

    forward()
    turns = [(seconds_of(forward), seconds_of(calibrated)) for _ in range(REPEATS)]  # other load meets both alike
    forwards, calibrations = zip(*turns, strict=True)
    return min(forwards), min(calibrations)


def peak_bytes(count: int) -> int:
    """Most memory that this process, or its GPU, ever held while it calibrated so many sequences."""
    calibrate(random_llama(NUM_KV_HEADS[0]), batches(random_sequences(count)))
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux alone; not getrusage, where a child begins with the peak of the process that started it
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def peak_in_new_process(count: int) -> int:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_bytes, count).result()


def main() -> None:
    """Print both tables."""
    screen = console()
    screen.print(f"{device_line()}, {SHAPE['num_hidden_layers']} layers as wide as LLaMA-3.2-1B's")
    for num_kv_heads in NUM_KV_HEADS:
        with screen.status("timing"):
            plain_s, calibrated_s = seconds(num_kv_heads)
        screen.print(
            f"{num_kv_heads} kv heads of {SHAPE['num_attention_heads']}: forward {plain_s:.2f} s, calibrate "
            f"{calibrated_s:.2f} s: {calibrated_s / plain_s:.2f} times, float32"
        )
    table = FittedTable("tokens", [Column("peak memory")])
    with screen.status("measuring memory"):
        for count in SEQUENCE_COUNTS:
            table.add_row(f"{count * SEQUENCE_TOKENS:,}", size(peak_in_new_process(count)))
    screen.print(table)


if __name__ == "__main__":
    main()
