"""LoRA adapters beside a variant's factors: trained through `peft`, applied by hooks, the weights untouched.

Names are `layers.3.q.down` (rank, in_features) and `layers.3.q.up` (out_features, rank), the scale folded into `up`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lorc_core.architecture import Architecture, Projection
from lorc_core.errors import ConfigError, UnsupportedModelError

ADAPTER = "lorc"
PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v")
AdapterTensors = dict[str, Tensor]


def adapted_modules(architecture: Architecture) -> dict[str, str]:
    """Paths below `model.base_model` of the projections that LoRA adapts, W_q, W_k, W_v and W_o, by adapter name."""
    if architecture.family.fused:
        raise UnsupportedModelError(
            f"lora_rank needs separate projections; {architecture.model_type} holds W_q, W_k and W_v in one tensor"
        )
    found = {}
    for layer_idx in range(architecture.num_layers):
        for projection in PROJECTIONS:
            path = architecture.projection_name(layer_idx, projection, "weight")
            found[f"layers.{layer_idx}.{projection}"] = path.removesuffix(".weight")
        found[f"layers.{layer_idx}.o"] = architecture.output_name(layer_idx).removesuffix(".weight")
    return found


class Adapters:
    """LoRA layers that `peft` put into a model; none where the rank is 0."""

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
        found: AdapterTensors = {}
        for name, layer in self.layers.items():
            found[f"{name}.down"] = layer.lora_A[ADAPTER].weight.detach().clone().cpu()
            found[f"{name}.up"] = (layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]).cpu()
        return found


@contextmanager
def injected_adapters(model: PreTrainedModel, architecture: Architecture, rank: int, seed: int) -> Iterator[Adapters]:
    """LoRA layers in a model while the block runs; the model's own modules come back.

    Raises:
        ConfigError: `peft` is not installed.
    """
    if rank == 0:
        yield Adapters({})
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
        adapters = Adapters({name: base.get_submodule(path) for name, path in paths.items()})
        adapters.modules().float()  # Adam's steps are lost in half precision
        yield adapters
    finally:
        for path, module in own.items():
            base.set_submodule(path, module)
        vars(base).pop("peft_config", None)


def hook_adapters(model: PreTrainedModel, architecture: Architecture, tensors: AdapterTensors) -> list[RemovableHandle]:
    """Add the adapters' products to the outputs of their projections."""
    handles = []
    for name, path in adapted_modules(architecture).items() if tensors else ():
        module = model.base_model.get_submodule(path)
        like = next(module.parameters())
        down, up = (tensors[f"{name}.{part}"].to(like.device, like.dtype) for part in ("down", "up"))
        handles.append(module.register_forward_hook(partial(add_product, down, up)))
    return handles


def add_product(
    down: Float[Tensor, "r i"], up: Float[Tensor, "o r"], module: nn.Module, args: tuple[Tensor], output: Tensor
) -> Tensor:
    """Forward hook: W x + up @ down @ x."""
    return output + args[0] @ down.T @ up.T
