"""Run a model on a compressed cache, without rewriting the model.

A pre-hook on each attention module swaps the cache for a view that hands *latents* to the real cache and, for keys
compressed before the rotation, the rotation for the identity; `latent_attention` is what the module then calls.
Observers look at a model's queries, keys and values through the same hooks.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from lorc_core.attention.adapters import AdapterTensors, hook_adapters
from lorc_core.attention.call import AttentionCall, Observer
from lorc_core.attention.latent_attention import STATE_ATTRIBUTE, latent_attention
from lorc_core.attention.latent_cache import LatentCache
from lorc_core.attention.layer_state import LayerState
from lorc_core.attention.placement import placement_of
from lorc_core.attention.positions import RowPositions
from lorc_core.attention.scores.slot_turns import SlotTurns
from lorc_core.attention.self_attending import OwnAttention, RebuildingCache
from lorc_core.decomposition.factors import LayerFactors
from lorc_core.errors import ConfigError, UnsupportedModelError
from lorc_core.model.architecture import Architecture, architecture_of
from lorc_core.model.rotation import LayerRotation
from lorc_core.variant import Variant

PREFIX = "lorc_"
ATTACHMENT_ATTRIBUTE = "_lorc_attachment"
EARLY_CACHE_SHAPE = "_get_static_cache_init_shape"  # transformers' method


def enter_attention(
    state: LayerState,
    architecture: Architecture,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: the view in place of the cache and, for compressed rotary keys, no rotation.

    A module that attends by itself rotates its keys whatever it is told; its view takes the rotation off again.

    Args:
        state: Of the module; keeps the call for `latent_attention`.
        architecture: Of the model.
        module: That is called.
        args: Of its `forward`.
        kwargs: Of its `forward`.

    Returns:
        The arguments that it is called with instead.
    """
    kwargs = dict(kwargs)
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    rotation = None
    if state.unrotates_keys:
        assert state.rotary is not None
        rotation = state.rotary.of_call(hidden_states, kwargs)
        if architecture.family.interface:
            kwargs["position_embeddings"] = rotation.identity()
    state.call = call = AttentionCall(rotation, kwargs.get("position_ids"), hidden_states)
    argument = architecture.family.cache_argument
    if architecture.family.interface:
        kwargs[argument] = LatentCache(
            kwargs.get(argument), state.projections, call, state.positions if state.unrotates_keys else None
        )
    else:
        own = OwnAttention(module, architecture, args, dict(kwargs))
        kwargs[argument] = RebuildingCache(kwargs.get(argument), state, own)
    return args, kwargs


class Attachment:
    """Factors, or observers, attached to a model from its making until `detach` or the end of the `with` block.

    `layers[layer_idx]` is None where a layer is left alone. A failure to attach leaves the model as it was.

    Args:
        model: Loaded by transformers.
        architecture: Of the model.
        factors: Of each layer.
        observers: Of each layer, called with what its attention module is about to attend with; None for none at all.
        adapters: LoRA matrices that were trained with the factors.

    Raises:
        ConfigError: Something is attached already.
        UnsupportedModelError: The model does not use transformers' attention interface where that is needed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        factors: Sequence[LayerFactors],
        observers: Sequence[Observer | None] | None = None,
        adapters: AdapterTensors | None = None,
    ) -> None:
        self.model = model
        self.architecture = architecture
        self.layers: list[LayerState | None] = []
        self._underlying = model.config._attn_implementation
        self._handles: list[RemovableHandle] = []
        self._adapter_handles: list[RemovableHandle] = []
        self._modules: list[nn.Module] = []
        self._own_methods: list[str] = []  # of the model alone, in place of its class's
        self._adapters = adapters or {}
        self._positions = RowPositions()
        self._turns = SlotTurns()
        self._attach(factors, observers or [None for _ in factors])

    def detach(self) -> None:
        """Restore the model bit for bit. Doing so twice is harmless."""
        for handle in (*self._handles, *self._adapter_handles):
            handle.remove()
        for module in self._modules:
            delattr(module, STATE_ATTRIBUTE)
        for name in self._own_methods:
            del self.model.__dict__[name]
        self._handles, self._adapter_handles, self._modules, self._own_methods = [], [], [], []
        attached = self.model.__dict__.pop(ATTACHMENT_ATTRIBUTE, None) is not None
        if attached and self.architecture.family.interface:
            self.model.set_attn_implementation(self._underlying)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _hook(self, layer_idx: int, factors: LayerFactors, observe: Observer | None) -> LayerState:
        base = self.model.base_model
        module = base.get_submodule(self.architecture.attention_module(layer_idx))
        state = LayerState(
            placement_of(module),
            self._rotation(layer_idx),
            self.architecture.num_kv_heads,
            self.architecture.head_dim,
            self.architecture.family.interface,
            self._positions,
            self._turns,
            factors=factors,
            observe=observe,
        )
        setattr(module, STATE_ATTRIBUTE, state)
        self._modules.append(module)
        hook = partial(enter_attention, state, self.architecture)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return state

    def _rotation(self, layer_idx: int) -> LayerRotation | None:
        """How the layer's keys are rotated; None where they are not."""
        rotary = self.architecture.layer_rotary(layer_idx)
        if rotary is None:
            return None
        inside = self.architecture.family.rotary == "inside"
        return LayerRotation(rotary, None if inside else self.model.base_model.get_submodule("rotary_emb"))

    def use(self, factors: Sequence[LayerFactors]) -> None:
        """Take other factors.

        Args:
            factors: Of each layer, on any device.

        Raises:
            ConfigError: A layer would get factors that was left alone when this was attached.
        """
        for layer_idx, (state, layer_factors) in enumerate(zip(self.layers, factors, strict=True)):
            if state is None and any(layer_factors):
                raise ConfigError(f"layer {layer_idx} was left alone when the variant was attached; attach anew")
        with tensors_for_training():
            for state, layer_factors in zip(self.layers, factors, strict=True):
                if state is not None:
                    state.use(layer_factors)

    def replace_method(self, name: str, method: Callable[..., Any]) -> None:
        """Give the model a method of its own, in place of its class's, until `detach`.

        Args:
            name: Of the method.
            method: Called without the model, as a bound method is.
        """
        self.model.__dict__[name] = method
        self._own_methods.append(name)

    def follow_model(self) -> None:
        """Bring the factors to where the model's layers are now, in their precision."""
        states = [state for state in self.layers if state is not None]
        with tensors_for_training():
            for state, module in zip(states, self._modules, strict=True):
                state.move(placement_of(module))
            for handle in self._adapter_handles:
                handle.remove()
            self._adapter_handles = hook_adapters(self.model, self.architecture, self._adapters)

    def _attach(self, factors: Sequence[LayerFactors], observers: Sequence[Observer | None]) -> None:
        if ATTACHMENT_ATTRIBUTE in self.model.__dict__:
            raise ConfigError("a variant is attached to this model already; detach it first")
        self.model.__dict__[ATTACHMENT_ATTRIBUTE] = self
        caches_copies = self.architecture.num_cached_heads != self.architecture.num_kv_heads
        with ExitStack() as undo, tensors_for_training():
            undo.callback(self.detach)
            self.replace_method(EARLY_CACHE_SHAPE, no_early_shape)
            if self.architecture.family.interface:
                use_latent_attention(self.model, self._underlying)
            for layer_idx, (layer_factors, observe) in enumerate(zip(factors, observers, strict=True)):
                idle = observe is None and not any(layer_factors) and not caches_copies
                self.layers.append(None if idle else self._hook(layer_idx, layer_factors, observe))
            self._adapter_handles = hook_adapters(self.model, self.architecture, self._adapters)
            undo.pop_all()


@contextmanager
def tensors_for_training() -> Iterator[None]:
    """What is made within inference mode autograd refuses later; factors outlive the call that attaches them."""
    tracks = torch.is_grad_enabled()  # leaving inference mode would turn it on
    with torch.inference_mode(mode=False), torch.set_grad_enabled(tracks):
        yield


def no_early_shape() -> None:
    """With `prefill_chunk_size`, `generate` allocates static caches by the config's heads; latents have other shapes.

    None tells it to let layers allocate themselves when they see their first states.
    """


def use_latent_attention(model: PreTrainedModel, underlying: str) -> None:
    """Register latent attention over `underlying`, with its mask function, and switch the model to it.

    Args:
        model: To be switched.
        underlying: The attention implementation that it has.

    Raises:
        UnsupportedModelError: The model keeps to its own attention.
    """
    name = PREFIX + underlying
    AttentionInterface.register(name, partial(latent_attention, underlying))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[underlying])
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not dispatch its attention through transformers' attention interface"
        )


def save_base_alone(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """The model's `save_pretrained`, with a warning: it writes weights, and a variant does not change them."""
    warnings.warn(
        "save_pretrained writes the base model alone, without the variant attached to it. Write the variant with "
        "variant.save(DIR), or both as one checkpoint with lorc_core.export_variant(DIR, NEW_DIR)",
        stacklevel=2,
    )
    type(model).save_pretrained(model, *args, **kwargs)


def move_with_factors(attachment: Attachment, *args: Any, **kwargs: Any) -> PreTrainedModel:
    """The model's `_apply`, by which torch moves and casts modules (`to`, `half`, `cuda`): its factors follow."""
    model = attachment.model
    type(model)._apply(model, *args, **kwargs)
    attachment.follow_model()
    return model


def attach(model: PreTrainedModel, variant: Variant) -> Attachment:
    """Make a loaded model cache latents as `variant` says; nothing of the model is copied or rewritten.

    Use it as a context manager, or keep the result and call `detach`. Swapping variants on one loaded model never
    reloads it. The factors follow the model where it is moved, cast or deep-copied; `save_pretrained` warns that it
    saves the base model alone.

    Args:
        model: The base model, loaded by transformers, in any dtype and on any devices.
        variant: Made by `compress` or read by `load_variant`, for this model's architecture.

    Returns:
        What detaches the variant again.

    Raises:
        ConfigError: The model has another architecture, or a variant is attached already.
        UnsupportedModelError: lorc does not know the architecture.
    """
    architecture = architecture_of(model.config)
    if architecture != variant.architecture:
        raise ConfigError(f"the variant is for {variant.architecture}, the model is {architecture}")
    attachment = Attachment(model, architecture, variant.factors, adapters=variant.adapters)
    attachment.replace_method("save_pretrained", partial(save_base_alone, model))
    attachment.replace_method("_apply", partial(move_with_factors, attachment))
    return attachment
