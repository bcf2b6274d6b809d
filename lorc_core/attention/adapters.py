"""LoRA adapters beside a variant's factors: applied by hooks, the weights untouched.

Names are `layers.3.q.down` (rank, in_features) and `layers.3.q.up` (out_features, rank), the scale folded into `up`.
"""

from functools import partial

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lorc_core.attention.placement import placement_of
from lorc_core.errors import UnsupportedModelError
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import Projection

PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v")

AdapterTensors = dict[str, Tensor]


def adapted_modules(architecture: Architecture) -> dict[str, str]:
    """Where the projections are that LoRA adapts: W_q, W_k, W_v and W_o.

    Args:
        architecture: Of the model.

    Returns:
        Paths below `model.base_model`, by the adapter's name.

    Raises:
        UnsupportedModelError: One tensor holds several projections.
    """
    if architecture.family.fused:
        raise UnsupportedModelError(
            f"lora_rank needs separate projections; {architecture.model_type} holds W_q, W_k and W_v in one tensor"
        )
    paths = {}
    for layer_idx in range(architecture.num_layers):
        for projection in PROJECTIONS:
            weight_name = architecture.projection_name(layer_idx, projection, "weight")
            paths[f"layers.{layer_idx}.{projection}"] = weight_name.removesuffix(".weight")
        paths[f"layers.{layer_idx}.o"] = architecture.output_name(layer_idx).removesuffix(".weight")
    return paths


def hook_adapters(model: PreTrainedModel, architecture: Architecture, tensors: AdapterTensors) -> list[RemovableHandle]:
    """Add the adapters' products to the outputs of their projections.

    Args:
        model: That the adapters were trained for.
        architecture: Of the model.
        tensors: `down` and `up` of every adapted projection; empty for no adapters.

    Returns:
        What removes them.
    """
    handles = []
    for name, path in adapted_modules(architecture).items() if tensors else ():
        module = model.base_model.get_submodule(path)
        down, up = (tensors[f"{name}.{part}"].to(*placement_of(module)) for part in ("down", "up"))
        handles.append(module.register_forward_hook(partial(add_product, down, up)))
    return handles


def add_product(
    down: Float[Tensor, "r i"], up: Float[Tensor, "o r"], module: nn.Module, args: tuple[Tensor], output: Tensor
) -> Tensor:
    """Forward hook: W x + up @ down @ x."""
    return output + args[0] @ down.T @ up.T
