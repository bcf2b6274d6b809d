"""Variants of tiny models: in memory, and on disk beside their base."""

from dataclasses import replace
from functools import cache

import torch
from transformers import AutoModelForCausalLM

import lorc_core
from lorc_core.methods import METHODS
from lorc_core.ranks.schedules import Energy
from tests.models import save_tiny_model, tiny_model
from tests.runs import tokens

# uneven ranks and one layer left full; per head after the rotation; by frequency
VARIANTS = {
    "lorc_q": Energy(skip_layers=(1,)),
    "kq_svd": Energy(skip_layers=(1,)),
    "phasor_freq": Energy(),
}


@cache
def case(name, method, schedule=None, kept=0.6):
    """A tiny model and a variant of it; calibrated on random tokens where the method needs text."""
    model = tiny_model(name)
    calibration = None if method in ("lorc", "lorc_q") else tokens(model, rows=16, columns=24, seed=9)
    return model, lorc_core.compress(model, method, kept, schedule or VARIANTS[method], calibration=calibration)


def make_variant(tmp_path, name, method, schedule, **changes):
    """A base directory, a variant of it, and the variant's directory."""
    base = save_tiny_model(name, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    calibration = None if method in ("lorc", "lorc_q") else tokens(model, rows=16, columns=24, seed=9)
    variant = lorc_core.compress(base, METHODS[method], 0.6, schedule, calibration=calibration)
    variant = replace(variant, **changes)
    variant.save(tmp_path / "variant")
    return model, variant, tmp_path / "variant"


def random_adapters():
    """For the tiny llama."""
    generator = torch.Generator().manual_seed(0)
    adapters = {}
    for layer_idx in range(3):
        for name, width in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
            adapters[f"layers.{layer_idx}.{name}.down"] = torch.randn(2, 64, generator=generator) / 8
            adapters[f"layers.{layer_idx}.{name}.up"] = torch.randn(width, 2, generator=generator) / 8
    return adapters
