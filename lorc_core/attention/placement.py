"""Where a module computes, and in which precision: there its factors must be."""

from typing import NamedTuple

import torch
from torch import nn


class Placement(NamedTuple):
    """A device and a dtype, as `Tensor.to` takes them."""

    device: torch.device
    dtype: torch.dtype


def placement_of(module: nn.Module) -> Placement:
    """Of a module's weights; while accelerate keeps those elsewhere, the device that they go to.

    Args:
        module: With a parameter of its own, or of a submodule.
    """
    weight = next(module.parameters())
    if weight.device.type != "meta":
        return Placement(weight.device, weight.dtype)
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    device = torch.device(next(hook.execution_device for hook in hooks if hook is not None))
    return Placement(device, weight.dtype)
