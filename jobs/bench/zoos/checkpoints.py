"""Checkpoints with the shapes of large models, and holes for what is not read of them."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.bench.zoos.generated_zoo import write_tokenizer
from lorc_core.model.stored.shards import INDEX_FILE

LLAMA_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
DENSE = ("k_proj.weight", "v_proj.weight")  # what is written; all else are holes


def save_with_holes(directory: Path, num_layers: int) -> int:
    """A checkpoint as large as so many layers of a LLaMA of 70B, in bfloat16: keys and values random, the rest holes.

    Args:
        directory: Made; the files take no more of the disk than keys and values.
        num_layers: One file each, and one for what is not in layers.

    Returns:
        Bytes of keys and values.
    """
    config = LlamaConfig(
        **LLAMA_70B, num_hidden_layers=num_layers, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    write_tokenizer(directory)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    files: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    dense_bytes = 0
    for part in range(num_layers + 1):
        of_layer = f"model.layers.{part}."
        names = [
            name for name in shapes if (name.startswith(of_layer) if part < num_layers else ".layers." not in name)
        ]
        file = f"model-{part + 1:05d}-of-{num_layers + 1:05d}.safetensors"
        dense_bytes += write_file(directory / file, {name: shapes[name] for name in names}, generator)
        files |= dict.fromkeys(names, file)
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return dense_bytes


def write_file(path: Path, shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> int:
    """One safetensors file, whose format is a length, a header in JSON and the tensors; returns what is dense of it."""
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    told = json.dumps(header).encode()
    dense_bytes = 0
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for name, shape in shapes.items():
            if name.endswith(DENSE):
                tensor = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
                file.seek(8 + len(told) + header[name]["data_offsets"][0])
                dense_bytes += file.write(tensor.view(torch.uint8).numpy().data)
        file.truncate(8 + len(told) + end)
    return dense_bytes
