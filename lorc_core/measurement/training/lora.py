"""LoRA adapters while they are trained: put into a model through `peft`, taken out as plain tensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lorc_core.attention.adapters import AdapterTensors, adapted_modules
from lorc_core.errors import ConfigError
from lorc_core.model.architecture import Architecture

ADAPTER = "lorc"


class LoraLayers:
    """The layers that `peft` put into a model; none where the rank is 0.

    Args:
        layers: By the adapter's name; see `adapted_modules`.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self.layers = layers

    def enable(self, enabled: bool) -> None:
        """Whether the model runs with them."""
        for layer in self.layers.values():
            layer.enable_adapters(enabled)

    def modules(self) -> nn.ModuleList:
        """What is trained."""
        return nn.ModuleList(
            part for layer in self.layers.values() for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
        )

    def tensors(self) -> AdapterTensors:
        """The adapters as they are now."""
        tensors: AdapterTensors = {}
        for name, layer in self.layers.items():
            tensors[f"{name}.down"] = layer.lora_A[ADAPTER].weight.detach().clone().cpu()
            tensors[f"{name}.up"] = (layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]).cpu()
        return tensors


@contextmanager
def injected_lora(model: PreTrainedModel, architecture: Architecture, rank: int, seed: int) -> Iterator[LoraLayers]:
    """LoRA layers on W_q, W_k, W_v and W_o of a model while the block runs; the model's own modules come back.

    Args:
        model: Whose projections are wrapped.
        architecture: Of the model.
        rank: Of the adapters; 0 for none.
        seed: Of their first factors. The global generator is left as it was.

    Raises:
        ConfigError: `peft` is not installed.
        UnsupportedModelError: The projections are fused into one tensor.
    """
    if rank == 0:
        yield LoraLayers({})
        return
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ConfigError("training with lora_rank needs peft: pip install peft") from error
    base, paths = model.base_model, adapted_modules(architecture)
    own = {path: base.get_submodule(path) for path in paths.values()}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # peft draws the first factors from the global generator
            LoraModel(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(own)), ADAPTER)
        layers = LoraLayers({name: base.get_submodule(path) for name, path in paths.items()})
        layers.modules().float()  # Adam's steps are lost in half precision
        yield layers
    finally:
        for path, module in own.items():
            base.set_submodule(path, module)
        vars(base).pop("peft_config", None)
