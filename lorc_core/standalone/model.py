"""Model classes of exported variants: the transformers classes with the factors inside, their caches hold latents.

`export` writes their checkpoints; `AutoModelForCausalLM.from_pretrained` reads them.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lorc_core.attention.attach import ATTACHMENT_ATTRIBUTE, Attachment
from lorc_core.decomposition.factors import LayerFactors
from lorc_core.errors import ConfigError
from lorc_core.model.architecture import Architecture
from lorc_core.model.blocks import Partition
from lorc_core.model.kinds import KINDS, PROJECTION_OF, KeysValues, Kind
from lorc_core.standalone.folding import LatentProjection, StandaloneFactors
from lorc_core.standalone.settings import PREFIX, Settings, StoredFactors


class FactorTensors(nn.Module):
    """The tensors of one layer's keys or values, where the model's weights are; fine-tuning leaves them alone.

    Args:
        stored: Which tensors there are.
        architecture: Of the base model.
    """

    def __init__(self, stored: StoredFactors, architecture: Architecture) -> None:
        super().__init__()
        self.stored = stored
        self.partition = Partition(stored.block, architecture.num_kv_heads, architecture.head_dim)
        rank = sum(stored.ranks)
        self.up = nn.Parameter(torch.empty(self.partition.width, rank))
        self.own_down = nn.Parameter(torch.empty(rank, self.partition.width)) if stored.own_down else None
        self.constant = nn.Parameter(torch.empty(architecture.kv_width)) if stored.constant else None

    def factors(self) -> StandaloneFactors:
        """As the runtime takes them: without gradients, since it keeps what it makes of them from call to call."""
        stored, own_down, constant = self.stored, self.own_down, self.constant
        return StandaloneFactors(
            self.partition,
            stored.ranks,
            self.up.detach(),
            None if own_down is None else own_down.detach(),
            None,
            stored.rotated,
            None if constant is None else constant.detach(),
            stored.folded,
        )


class StandaloneModel(PreTrainedModel):
    """Mixed into a model class of transformers: its cache holds latents, by itself.

    Args:
        config: Of an export, with a `lorc` field.
        args: Of the class that this is mixed into.
        kwargs: Of the class that this is mixed into.

    Raises:
        ArtifactError: The config has no such field, or of another schema.
    """

    base_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.lorc_settings = Settings.of(config)
        self.__dict__["_lorc_placed_at"] = None
        for layer_idx, layer in enumerate(self.lorc_settings.layers):
            for kind, stored in layer.items():
                if stored is not None:
                    self._insert(layer_idx, kind, stored)
        for module in self._owners_of_layers():
            module.register_forward_pre_hook(self._attach_before)  # no lambda: a copied model must call itself

    def _owners_of_layers(self) -> list[nn.Module]:
        """The base model and what it holds down to the list of layers: OPT's head calls the decoder past its owner."""
        owners, path = [], self.lorc_settings.architecture.attention_module(0).split(".")
        for depth in range(len(path)):
            module = self.base_model.get_submodule(".".join(path[:depth]))
            if isinstance(module, nn.ModuleList):
                break
            owners.append(module)
        return owners

    def _insert(self, layer_idx: int, kind: Kind, stored: StoredFactors) -> None:
        """Make room for one layer's factors, so that the checkpoint's tensors find their places."""
        architecture = self.lorc_settings.architecture
        module = self.base_model.get_submodule(architecture.attention_module(layer_idx))
        tensors = FactorTensors(stored, architecture)
        module.add_module(factors_name(kind), tensors)
        if stored.folded:
            path = architecture.projection_name(layer_idx, PROJECTION_OF[kind], "weight").removesuffix(".weight")
            whole = self.base_model.get_submodule(path)
            assert isinstance(whole, nn.Linear)
            projection = LatentProjection(whole.in_features, tensors.partition, stored.ranks, whole.bias is not None)
            self.base_model.set_submodule(path, projection)

    def _stored(self) -> list[KeysValues[FactorTensors | None]]:
        """The factors' tensors of each layer, as they are now."""
        architecture, layers = self.lorc_settings.architecture, []
        for layer_idx, layer in enumerate(self.lorc_settings.layers):
            module = self.base_model.get_submodule(architecture.attention_module(layer_idx))
            layers.append(KeysValues(*(getattr(module, factors_name(kind)) if layer[kind] else None for kind in KINDS)))
        return layers

    def _attach_before(self, *_: Any) -> None:
        """Forward pre-hook."""
        self.attach_factors()

    def attach_factors(self) -> None:
        """Attach the factors, again where they were moved, cast, replaced or written to since.

        Raises:
            ConfigError: Some are offloaded.
        """
        stored = self._stored()
        ups = [tensors.up for layer in stored for tensors in layer if tensors is not None]
        placed_at = [(up.device, up.dtype, id(up), None if up.is_inference() else up._version) for up in ups]
        if placed_at == self.__dict__["_lorc_placed_at"]:
            return
        if any(up.device.type == "meta" for up in ups):
            raise ConfigError("an exported variant cannot be offloaded to CPU or disk; place all of it on devices")
        self.detach_factors()
        factors: list[LayerFactors] = [
            layer.map(lambda tensors: tensors.factors() if tensors is not None else None) for layer in stored
        ]
        Attachment(self, self.lorc_settings.architecture, factors)
        self.__dict__["_lorc_placed_at"] = placed_at

    def detach_factors(self) -> None:
        """Until the next forward call, which attaches them again."""
        attachment = self.__dict__.get(ATTACHMENT_ATTRIBUTE)
        if attachment is not None:
            attachment.detach()
        self.__dict__["_lorc_placed_at"] = None

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Asked by engines that attend and cache by themselves, which then hold no latents: vLLM, SGLang."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.base_class._can_set_attn_implementation()  # it looks into the source of the class's module


def factors_name(kind: Kind) -> str:
    """The submodule of an attention module that holds its factors."""
    return f"{PREFIX}{kind}"
