"""Forty models from 1B to 405B parameters, by their configs alone, as a zoo file."""

import json

import yaml

# Layers, hidden size, MLP, query heads, kv heads, GPUs: LLaMA-like ones, and neighbours of them.
SHAPES = {
    "1b": (16, 2048, 8192, 32, 8, 1),
    "3b": (28, 3072, 8192, 24, 8, 1),
    "7b": (32, 4096, 11008, 32, 32, 1),
    "8b": (32, 4096, 14336, 32, 8, 1),
    "13b": (40, 5120, 13824, 40, 40, 1),
    "14b": (48, 5120, 13824, 40, 8, 1),
    "32b": (64, 5120, 27648, 40, 8, 2),
    "70b": (80, 8192, 28672, 64, 8, 4),
    "123b": (88, 12288, 28672, 96, 8, 8),
    "405b": (126, 16384, 53248, 128, 8, 8),
}
COPIES = 4  # of each shape: fine-tunes, each a model of its own
VARIANTS = [
    {"method": "lorc", "schedule": "progressive", "kept_fraction": [0.6, 0.5]},
    {"method": "lorc_q", "kept_fraction": [0.5, 0.25]},
    {"method": "kq_joint", "kept_fraction": [0.5, 0.25]},
]


def config_of(layers, hidden_size, mlp, heads, kv_heads):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def write_large_zoo(directory, copies=COPIES, shapes=SHAPES):
    """The zoo file; nothing of its models is on any disk but their configs."""
    models = []
    for name, (*shape, num_gpus) in shapes.items():
        (directory / f"{name}.json").write_text(json.dumps(config_of(*shape)))
        for copy in range(copies):
            models.append(
                {
                    "name": f"{name}-{copy}",
                    "source": f"example/{name}-{copy}",
                    "config": f"{name}.json",
                    "resources": {"num_cpus": 8, "num_gpus": num_gpus, "memory_gib": 64},
                }
            )
    text = {"source": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"}
    zoo = {
        "name": "large",
        "models": models,
        "variants": VARIANTS,
        "calibration": {"texts": [text | {"name": "train", "split": "train"}]},
        "evaluation": {"texts": [text | {"name": "test", "split": "test"}]},
        "gates": {"max_perplexity_rise": 0.05},
    }
    path = directory / "large.yaml"
    path.write_text(yaml.safe_dump(zoo, sort_keys=False))
    return path


if __name__ == "__main__":
    import sys
    from pathlib import Path

    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    print(write_large_zoo(Path(sys.argv[1])))
