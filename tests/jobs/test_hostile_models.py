"""Hostile model directories: `lorc plan` refuses each in one line that names the tensor or field, at once."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import save_tiny_model

UP = "model.layers.1.mlp.up_proj.weight"
ZOO = """
name: hostile
models: [{name: hostile, source: ./model, dtype: float32}]
variants: [{method: lorc, schedule: uniform, kept_fraction: 0.5}]
evaluation: {texts: [{name: text, source: ./text.txt}], window_tokens: 16, num_windows: 2}
gates: {max_perplexity_rise: 0.1}
"""


def tensors(change):
    def damage(directory):
        held = load_file(directory / "model.safetensors")
        change(held)
        save_file(held, directory / "model.safetensors", metadata={"format": "pt"})

    return damage


def config(**fields):
    def damage(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def shards(weight_map):
    """An index in place of the one file, which lies beside the directory."""

    def damage(directory):
        shutil.move(directory / "model.safetensors", directory.parent / "outside.safetensors")
        index = weight_map if not isinstance(weight_map, dict) else {"weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def written(name, content):
    return lambda directory: (directory / name).write_text(content)


HOSTILE = {
    "a missing tensor": (tensors(lambda held: held.pop(UP)), f"tensor {UP} is missing"),
    "an unexpected tensor": (
        tensors(lambda held: held.update({"model.layers.9.x": torch.zeros(2)})),
        "tensor model.layers.9.x is unexpected",
    ),
    "a mis-shaped tensor": (tensors(lambda held: held.update({UP: held[UP][:-1]})), f"tensor {UP} is (95, 64)"),
    "bool weights": (tensors(lambda held: held.update({UP: held[UP].bool()})), f"tensor {UP} is stored as BOOL"),
    "int8 weights": (tensors(lambda held: held.update({UP: held[UP].to(torch.int8)})), "is stored as I8"),
    "float8 weights": (tensors(lambda held: held.update({UP: held[UP].to(torch.float8_e5m2)})), "stored as F8_E5M2"),
    "head_dim 0": (config(head_dim=0), "config field head_dim must be in 1..16,384, got 0"),
    "head_dim below 0": (config(head_dim=-4), "config field head_dim must be in 1..16,384, got -4"),
    "no kv heads": (config(num_key_value_heads=0), "config field num_key_value_heads must be in 1..16,384, got 0"),
    "kv heads that do not divide": (config(num_key_value_heads=3), "num_key_value_heads is 3, which does not divide"),
    "1e9 layers": (config(num_hidden_layers=10**9), "config field num_hidden_layers must be in 1..1,000"),
    "hidden size 1e12": (config(hidden_size=10**12), "config field hidden_size must be in 1..1,048,576"),
    "a vocab_size below the tokenizer's": (
        config(vocab_size=500),
        "tensor lm_head.weight is (1024, 64), the config's model has (500, 64)",
    ),
    "sizes as text": (config(hidden_size="64"), "hidden_size"),
    "an unknown activation": (config(hidden_act="no-such-thing"), "no model can be built from it"),
    "an unknown rope type": (config(rope_parameters={"rope_type": "odd", "rope_theta": 1e4}), "odd"),
    "a config nested 10,000 deep": (written("config.json", '{"a":' * 10_000 + "1" + "}" * 10_000), "config"),
    "a config that is a list": (written("config.json", "[1]"), "config"),
    "a config that is no JSON": (written("config.json", "{"), "config"),
    "a shard in the directory above": (
        shards({UP: "../outside.safetensors"}),
        "'../outside.safetensors' is no file of this directory",
    ),
    "an absolute shard": (shards({UP: "/etc/hostname"}), "'/etc/hostname' is no file of this directory"),
    "a shard in /proc": (shards({UP: "/proc/self/mem"}), "'/proc/self/mem' is no file of this directory"),
    "a shard that is a number": (shards({UP: 7}), "7 is no file of this directory"),
    "an index that is a list": (shards([1]), "not an index of safetensors shards"),
    "weights that are text": (written("model.safetensors", "no"), "not a whole safetensors file"),
}


def without_spaces(text):
    """The screen is narrow: a line may be broken anywhere."""
    return "".join(text.split())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_model_is_refused_by_plan_in_one_line_at_once(name, lorc, tmp_path):
    damage, message = HOSTILE[name]
    save_tiny_model("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("import os\n" * 200)
    (tmp_path / "zoo.yaml").write_text(ZOO)
    before = {path.name for path in tmp_path.iterdir()}
    damage(tmp_path / "model")
    started = time.process_time()
    code, out, err = lorc("plan", tmp_path / "zoo.yaml", "--workdir", tmp_path / "work")
    assert time.process_time() - started < 5
    told = without_spaces(out).partition("hostile:")[2]  # the line of the model, which the zoo file calls so
    assert told.startswith((without_spaces(str(tmp_path / "model")), "llama:"))  # a directory, or a model type
    assert without_spaces(message) in without_spaces(out)
    assert code == 1
    assert "Traceback" not in out + err
    assert {path.name for path in tmp_path.iterdir()} <= before | {"work", "outside.safetensors"}
