"""The reference of calibration and methods: every token's queries, keys and values, held whole, and dense projections.

Nothing here calls lorc's hooks, moments, blocks or rotation: projections' outputs are caught by plain forward hooks,
rotated as complex numbers by transformers' own frequencies, and blocks are lists of channels written out by loops.
"""

from dataclasses import dataclass

import torch

from lorc_core.measurement.gradients import draws_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass
class Layer:
    """One layer's states of T tokens in float64: keys and values (T, G, d), queries (T, G, m, d), and W_o (D, G, m, d)."""

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    rotated_keys: torch.Tensor
    rotated_queries: torch.Tensor
    output: torch.Tensor
    inputs: torch.Tensor


def attention_modules(model):
    modules = [module for name, module in model.base_model.named_modules() if name.endswith(".self_attn")]
    assert len(modules) == model.config.num_hidden_layers
    return modules


def output_linear(module):
    return module.out_proj if hasattr(module, "out_proj") else module.o_proj


@torch.no_grad()
def materialise(model, ids):
    """Every layer's states on (sequences, tokens), tokens of all sequences one after another."""
    seen = {}
    handles = [
        getattr(module, name).register_forward_hook(
            lambda _, args, output, place=(idx, name): seen.update({place: output, (place[0], "input"): args[0]})
        )
        for idx, module in enumerate(attention_modules(model))
        for name in PROJECTIONS
    ]
    model.base_model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [layer_of(model, idx, module, seen) for idx, module in enumerate(attention_modules(model))]


def layer_of(model, idx, module, seen):
    config = model.config
    num_kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    found = {}
    for name in PROJECTIONS:
        states = seen[idx, name].double()
        heads = states.unflatten(-1, (config.num_attention_heads if name == "q_proj" else num_kv_heads, -1))
        found[name] = heads.flatten(0, 1)
        if name != "v_proj":
            found[f"rotated_{name}"] = rotated(model, heads).flatten(0, 1)
    width = output_linear(module).weight.shape[1] // config.num_attention_heads
    output = output_linear(module).weight.detach().double()
    return Layer(
        keys=found["k_proj"],
        values=found["v_proj"],
        queries=found["q_proj"].unflatten(1, (num_kv_heads, -1)),
        rotated_keys=found["rotated_k_proj"],
        rotated_queries=found["rotated_q_proj"].unflatten(1, (num_kv_heads, -1)),
        output=output.view(len(output), num_kv_heads, -1, width),
        inputs=seen[idx, "input"].double().flatten(0, 1),
    )


def rotated(model, states):
    """(B, T, heads, d) at positions 0 .. T - 1; as they are where the model has no rotary embedding."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return states
    assert rotary.attention_scaling == 1.0
    angles = torch.arange(states.shape[1], dtype=torch.float64)[:, None] * rotary.inv_freq.double()
    real, imaginary = states.double().chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def channels_of(block, num_kv_heads, head_dim):
    """The channels of each block, in the order of its latents' factors."""
    if block == "frequency":
        half = head_dim // 2
        return [
            [head * head_dim + part * half + frequency for part in (0, 1) for head in range(num_kv_heads)]
            for frequency in range(half)
        ]
    if block == "interleaved_frequency":
        return [
            [head * head_dim + 2 * frequency + part for part in (0, 1) for head in range(num_kv_heads)]
            for frequency in range(head_dim // 2)
        ]
    heads = {"joint": num_kv_heads, "head": 1}.get(block) or int(block.removeprefix("group(").removesuffix(")"))
    return [
        [head * head_dim + channel for head in range(first, first + heads) for channel in range(head_dim)]
        for first in range(0, num_kv_heads, heads)
    ]


def dense_projection(factors):
    """The (kv_width, kv_width) matrix that factors stand for."""
    partition = factors.partition
    width = partition.num_kv_heads * partition.head_dim
    projection, done = torch.zeros(width, width, dtype=torch.float64), 0
    for channels, rank in zip(
        channels_of(partition.block, partition.num_kv_heads, partition.head_dim), factors.ranks, strict=True
    ):
        own = slice(done, done + rank)
        done += rank
        place = torch.tensor(channels)
        projection[place[:, None], place] = factors.up[:, own].double() @ factors.down[own].double()
    assert done == factors.up.shape[1]
    return projection


@dataclass
class LayerGradients:
    """Gradients of the summed loss with respect to one layer's keys and values (T, G, d), in the model's dtype."""

    keys: torch.Tensor
    rotated_keys: torch.Tensor
    values: torch.Tensor


def materialise_gradients(model, ids, labels):
    """Every layer's gradients on (sequences, tokens), by autograd on the outputs of the projections."""
    seen = {}
    handles = [
        getattr(module, name).register_forward_hook(
            lambda _, args, output, place=(idx, name): seen.update({place: output})
        )
        for idx, module in enumerate(attention_modules(model))
        for name in ("k_proj", "v_proj")
    ]
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        chances = logits.log_softmax(dim=-1)
        if labels == "text":
            loss = -chances[:, :-1].gather(-1, ids[:, 1:, None]).sum()
        else:
            loss = -chances.gather(-1, drawn_labels(logits.detach(), ids)[..., None]).sum()
        gradients = dict(zip(seen, torch.autograd.grad(loss, list(seen.values())), strict=True))
    for handle in handles:
        handle.remove()
    num_kv_heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    found = []
    for idx in range(model.config.num_hidden_layers):
        keys, values = (gradients[idx, name].unflatten(-1, (num_kv_heads, -1)) for name in ("k_proj", "v_proj"))
        # a rotation is orthogonal: the gradient is rotated as the key is
        found.append(LayerGradients(keys.flatten(0, 1), rotated(model, keys).flatten(0, 1), values.flatten(0, 1)))
    return found


def drawn_labels(logits, ids):
    """By the runtime's draws, the first label of which the cumulative probability is above the draw."""
    draws = torch.stack([draws_of(sequence) for sequence in ids])
    return (logits.double().softmax(-1).cumsum(-1) <= draws[..., None]).sum(-1)
