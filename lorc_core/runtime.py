"""Run a model on a compressed cache, without rewriting the model.

A pre-hook on each attention module swaps the cache for a view that hands *latents* to the real cache and, for keys
compressed before the rotation, the rotation for the identity. A registered attention function rebuilds keys and values
from the latents, rotates what arrived unrotated, and calls the implementation the model had before. Calibration looks
at a model's queries, keys and values through the same hooks.

Shapes: B batch, H query heads, G kv heads, D head_dim, Q new tokens, S cached and new tokens, K rank, N = G * D.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorc_core.adapters import AdapterTensors, hook_adapters
from lorc_core.architecture import KINDS, Architecture, Kind, architecture_of
from lorc_core.checkpoint import Checkpoint, model_directory
from lorc_core.errors import ArtifactError, ConfigError, UnsupportedModelError
from lorc_core.projection import Factors
from lorc_core.variant import Variant, load_variant

PREFIX = "lorc_"
STATE_ATTRIBUTE = "_lorc_layer"
ATTACHMENT_ATTRIBUTE = "_lorc_attachment"

Rotation = tuple[Float[Tensor, "#b s d"], Float[Tensor, "#b s d"]]


@dataclass
class Call:
    """What one forward call of one attention module must remember between its hook and its attention function."""

    rotation: Rotation | None
    position_ids: Int[Tensor, "#b q"] | None
    inputs: Float[Tensor, "b q i"] | None = None
    past: int | Tensor = 0
    first_slot: int = 0


@dataclass(frozen=True)
class Observed:
    """What one attention module is about to attend with, before and after the rotation (the same where there is none).

    Queries are those whose logits are scaled by head_dim ** -0.5. `attend` is the module's own attention on other
    rotated keys or values, without the output projection.
    """

    module: nn.Module
    inputs: Float[Tensor, "b q i"]
    query: Float[Tensor, "b h q d"]
    key: Float[Tensor, "b g s d"]
    value: Float[Tensor, "b g s d"]
    rotated_query: Float[Tensor, "b h q d"]
    rotated_key: Float[Tensor, "b g s d"]
    rotation: Rotation | None
    attend: Callable[[Tensor, Tensor], Float[Tensor, "b q h d"]]


LayerFactors = dict[Kind, Factors | None]


@dataclass
class LayerState:
    """The factors of one attention module, on its device, what looks at it, and the call in progress."""

    placed_at: tuple[torch.device, torch.dtype]
    rotary: nn.Module | None
    num_kv_heads: int
    positions: "RowPositions"
    factors: LayerFactors = field(default_factory=lambda: dict.fromkeys(KINDS))
    observe: Callable[[Observed], None] | None = None
    call: Call | None = None

    @property
    def compresses(self) -> bool:
        return any(self.factors.values())

    @property
    def unrotates_keys(self) -> bool:
        """Whether keys must arrive before their rotation."""
        keys = self.factors["keys"]
        return self.rotary is not None and (self.observe is not None or (keys is not None and not keys.rotated))

    @cached_property
    def offsets(self) -> dict[Kind, Tensor | None]:
        return {kind: found.offset() if found else None for kind, found in self.factors.items()}

    def use(self, factors: LayerFactors) -> None:
        """Take other factors, wherever they are."""
        device, dtype = self.placed_at
        self.factors = {kind: found.to(device, dtype) if found else None for kind, found in factors.items()}
        self.__dict__.pop("offsets", None)


class LatentCache:
    """A view of a model's cache, or of none, that stores latents: the attention module sees no difference."""

    def __init__(self, cache: Cache | None, state: LayerState) -> None:
        self._cache = cache
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(
        self,
        keys: Float[Tensor, "b g q d"],
        values: Float[Tensor, "b g q d"],
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Project down, let the real cache append, return all latents (or states, where a kind is not compressed)."""
        states = {"keys": keys, "values": values}
        latents = [project_down(states[kind], self._state, kind) for kind in KINDS]
        if self._cache is None:
            return latents[0], latents[1]
        call = self._state.call
        assert call is not None
        past = self._cache.get_query_offset(layer_idx)
        if self._state.unrotates_keys:
            self._state.positions.check(self._cache, layer_idx, call.position_ids, past)
        call.past = past.clone() if isinstance(past, Tensor) else past  # static caches count in place
        _, call.first_slot = self._cache.get_mask_sizes(keys.shape[-2], layer_idx)
        return self._cache.update(latents[0], latents[1], layer_idx, *args, **kwargs)


class RowPositions:
    """Refuses positions from which those of cached keys could not be told.

    Each row's positions must be contiguous, through all calls on one cache: its newest position minus its newest
    slot never changes. What falls below position 0, counted back from the newest token, must be padding.
    """

    def __init__(self) -> None:
        self._shifts: WeakKeyDictionary[Cache, Tensor] = WeakKeyDictionary()
        self._layer_idx: int | None = None

    def check(self, cache: Cache, layer_idx: int, position_ids: Int[Tensor, "#b q"] | None, past: int | Tensor) -> None:
        """Look at one call of the first layer that asks; the others have the same positions.

        Raises:
            ConfigError: Positions are absent, have a gap, or do not go on from the cached ones.
        """
        if self._layer_idx is None:
            self._layer_idx = layer_idx
        if layer_idx != self._layer_idx or torch.compiler.is_compiling():
            return
        if position_ids is None:
            raise ConfigError("keys compressed before the rotation need position_ids")
        q_len, slots_before = position_ids.shape[-1], int(past)
        shifts = position_ids[:, -1] - (slots_before + q_len - 1)
        if not rows_are_contiguous(position_ids):
            raise ConfigError("position_ids have gaps; keys compressed before the rotation need contiguous positions")
        known = self._shifts.get(cache)
        if slots_before == 0 or known is None:
            self._shifts[cache] = shifts
        elif not torch.isin(shifts, known).all():
            raise ConfigError(
                "position_ids do not go on from those of the cached tokens; keys compressed before the rotation need "
                "contiguous positions (pad on the left)"
            )


def rows_are_contiguous(position_ids: Int[Tensor, "#b q"]) -> bool:
    """Whether each row counts up by one to its last position, after constant padding if it has any."""
    steps = torch.arange(position_ids.shape[-1] - 1, -1, -1, device=position_ids.device)
    expected = position_ids[:, -1:] - steps
    padding = (expected < 0) & (position_ids == position_ids[:, :1])
    return bool(((position_ids == expected) | padding).all())


def project_down(states: Float[Tensor, "b g q d"], state: LayerState, kind: Kind) -> Float[Tensor, "b _ q _"]:
    """(B, G, Q, D) states to (B, 1, Q, K) latents.

    Whole keys beside compressed values, or the reverse, become one head too: static caches have as many of both.
    """
    if not state.compresses:
        return states
    joint, factors = states.transpose(1, 2).flatten(2), state.factors[kind]
    return (joint if factors is None else factors.project_down(joint)).unsqueeze(1)


def rebuild(latents: Float[Tensor, "b _ s _"], state: LayerState, kind: Kind) -> Float[Tensor, "b g s d"]:
    """(B, 1, S, K) latents to (B, G, S, D) states."""
    if not state.compresses:
        return latents
    joint, factors, offset = latents.squeeze(1), state.factors[kind], state.offsets[kind]
    if factors is not None:
        joint = factors.rebuild(joint)
    if offset is not None:
        joint = joint + offset
    return joint.unflatten(-1, (state.num_kv_heads, -1)).transpose(1, 2)


def project_states(states: Float[Tensor, "b g s d"], factors: Factors) -> Float[Tensor, "b g s d"]:
    """The states that a cache of their latents gives back."""
    joint = factors.rebuild(factors.project_down(states.transpose(1, 2).flatten(2)))
    offset = factors.offset()
    joint = joint if offset is None else joint + offset
    return joint.unflatten(-1, (states.shape[1], -1)).transpose(1, 2)


def rotate(states: Float[Tensor, "b h s d"], rotation: Rotation) -> Float[Tensor, "b h s d"]:
    """Rotary embedding in the half-split layout of Llama and its relatives."""
    cos, sin = (part.to(states.device).unsqueeze(1) for part in rotation)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def key_rotation(state: LayerState, call: Call, keys: Float[Tensor, "b g s d"], q_len: int) -> Rotation:
    """cos and sin for every cached key: those given for this call, or from the slots' positions.

    Positions are contiguous along a row, so a slot's position follows from the newest one; that holds under left
    padding, beams, static and sliding caches and needs no storage.
    """
    kv_len = keys.shape[-2]
    if kv_len == q_len:
        assert call.rotation is not None
        return call.rotation
    assert state.rotary is not None
    assert call.position_ids is not None
    slots = torch.arange(kv_len, device=keys.device) + call.first_slot
    newest = call.position_ids[:, -1:].to(keys.device)
    cos, sin = state.rotary(keys, newest - (call.past + q_len - 1 - slots))
    return cos, sin


def latent_attention(
    underlying: str,
    module: nn.Module,
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b _ s _"],
    value: Float[Tensor, "b _ s _"],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over latents, by the implementation called `underlying` on rebuilt keys and values."""
    attend = implementation(underlying, module)
    state: LayerState | None = getattr(module, STATE_ATTRIBUTE, None)
    if state is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    call, state.call = state.call, None
    assert call is not None
    key, value = rebuild(key, state, "keys"), rebuild(value, state, "values")
    rotated_key, rotated_query = key, query
    if call.rotation is not None:
        rotated_key = rotate(key, key_rotation(state, call, key, query.shape[-2]))
        rotated_query = rotate(query, call.rotation)
    if state.observe is not None:

        def attend_with(keys: Tensor, values: Tensor) -> Tensor:
            return attend(module, rotated_query, keys, values, attention_mask, **kwargs)[0]

        assert call.inputs is not None
        scale = kwargs["scaling"] * query.shape[-1] ** 0.5  # OPT scales its queries itself, not the logits
        states = (query * scale, key, value, rotated_query * scale, rotated_key)
        state.observe(Observed(module, call.inputs, *states, call.rotation, attend_with))
    return attend(module, rotated_query, rotated_key, value, attention_mask, **kwargs)


def implementation(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' attention function of that name; eager attention lives beside each model's own classes."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def enter_attention(
    state: LayerState, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: the view in place of the cache and, for compressed rotary keys, no rotation."""
    kwargs = dict(kwargs)
    position_ids = kwargs.get("position_ids")
    rotation = kwargs["position_embeddings"] if state.unrotates_keys else None
    if rotation is not None:
        cos, _ = rotation
        kwargs["position_embeddings"] = (torch.ones_like(cos[:1, :1]), torch.zeros_like(cos[:1, :1]))
    inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    state.call = Call(rotation, position_ids, inputs)
    kwargs["past_key_values"] = LatentCache(kwargs.get("past_key_values"), state)
    return args, kwargs


class Attachment:
    """Factors, or observers, attached to a model until `detach` or the end of the `with` block.

    `layers[layer_idx]` is None where a layer is left alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        factors: Sequence[LayerFactors],
        observers: Sequence[Callable[[Observed], None] | None] | None = None,
        adapters: AdapterTensors | None = None,
    ) -> None:
        self.model = model
        self.architecture = architecture
        self.layers: list[LayerState | None] = []
        self._factors = factors
        self._adapters = adapters or {}
        self._observers = observers or [None for _ in factors]
        self._underlying = model.config._attn_implementation
        self._handles: list[RemovableHandle] = []
        self._modules: list[nn.Module] = []
        self._positions = RowPositions()

    def detach(self) -> None:
        """Restore the model bit for bit. Doing so twice is harmless."""
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            delattr(module, STATE_ATTRIBUTE)
        self._handles, self._modules = [], []
        if self.model.__dict__.pop(ATTACHMENT_ATTRIBUTE, None) is not None:
            self.model.set_attn_implementation(self._underlying)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _hook(self, layer_idx: int, factors: LayerFactors, observe: Callable[[Observed], None] | None) -> LayerState:
        base = self.model.base_model
        module = base.get_submodule(self.architecture.attention_module(layer_idx))
        placed_at = (execution_device(module), next(module.parameters()).dtype)
        rotary = base.get_submodule("rotary_emb") if self.architecture.rotary else None
        state = LayerState(placed_at, rotary, self.architecture.num_kv_heads, self._positions, observe=observe)
        state.use(factors)
        setattr(module, STATE_ATTRIBUTE, state)
        self._modules.append(module)
        self._handles.append(module.register_forward_pre_hook(partial(enter_attention, state), with_kwargs=True))
        return state

    def use(self, factors: Sequence[LayerFactors]) -> None:
        """Take other factors; layers that were left alone stay so."""
        for state, found in zip(self.layers, factors, strict=True):
            if state is not None:
                state.use(found)

    def start(self) -> "Attachment":
        """Hook the layers; a failure leaves the model as it was.

        Raises:
            ConfigError: Something is attached already.
            UnsupportedModelError: The model does not use transformers' attention interface.
        """
        if ATTACHMENT_ATTRIBUTE in self.model.__dict__:
            raise ConfigError("a variant is attached to this model already; detach it first")
        self.model.__dict__[ATTACHMENT_ATTRIBUTE] = self
        with ExitStack() as undo:
            undo.callback(self.detach)
            use_latent_attention(self.model, self._underlying)
            for layer_idx, (factors, observe) in enumerate(zip(self._factors, self._observers, strict=True)):
                idle = observe is None and not any(factors.values())
                self.layers.append(None if idle else self._hook(layer_idx, factors, observe))
            self._handles += hook_adapters(self.model, self.architecture, self._adapters)
            undo.pop_all()
        return self


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: its weights' device or, while accelerate keeps those elsewhere, the one they go to."""
    weight = next(module.parameters())
    if weight.device.type != "meta":
        return weight.device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    return torch.device(next(hook.execution_device for hook in hooks if hook is not None))


def use_latent_attention(model: PreTrainedModel, underlying: str) -> None:
    """Register latent attention over `underlying`, with its mask function, and switch the model to it."""
    name = PREFIX + underlying
    AttentionInterface.register(name, partial(latent_attention, underlying))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[underlying])
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not dispatch its attention through transformers' attention interface"
        )


def attach(model: PreTrainedModel, variant: Variant) -> Attachment:
    """Make a loaded model cache latents as `variant` says; nothing of the model is copied or rewritten.

    Use it as a context manager, or keep the result and call `detach`. Swapping variants on one loaded model never
    reloads it.

    Args:
        model: The base model, loaded by transformers, in any dtype and on any devices.
        variant: Made by `compress` or read by `load_variant`, for this model's architecture.

    Raises:
        ConfigError: The model has another architecture, or a variant is attached already.
        UnsupportedModelError: The model does not use transformers' attention interface.
    """
    found = architecture_of(model.config)
    if found != variant.architecture:
        raise ConfigError(f"the variant is for {variant.architecture}, the model is {found}")
    return Attachment(model, found, variant.factors, adapters=variant.adapters).start()


def load(variant_dir: Path | str, *, base: Path | str | None = None, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """Load a variant's base model and attach the variant to it, for good.

    Args:
        variant_dir: A variant's directory.
        base: Directory of the base model now, if not where it was when the variant was made.
        from_pretrained_kwargs: Passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, ...).

    Returns:
        The model, in evaluation mode; its caches hold latents.

    Raises:
        ArtifactError: The variant is unfinished, altered or of another schema, or the base is another model.
        ConfigError: The variant does not know where its base is, or it is not there, and `base` is absent.
    """
    variant = load_variant(variant_dir)
    source = str(Path(base).resolve()) if base is not None else variant.base.source
    if not source:
        raise ConfigError(f"{variant_dir}: made from a model in memory, so name its base model with base=")
    directory = model_directory(source, None if base is not None else variant.base.revision)
    check_base(directory, variant)
    model = AutoModelForCausalLM.from_pretrained(directory, **from_pretrained_kwargs)
    attach(model, variant)
    return model


def check_base(directory: Path, variant: Variant) -> None:
    """Raise ArtifactError unless the directory holds the model that the variant was made for."""
    if variant.base.fingerprint is None:
        return
    if Checkpoint(directory).fingerprint(variant.architecture.tensor_names()) != variant.base.fingerprint:
        raise ArtifactError(f"{directory}: not the base model this variant was made for ({variant.base.source})")
