"""Every preset against its source's own recipe on materialised tokens: `torch.linalg.svd` of K, Q, V, never of Grams.

Models are random, in float64, with gains, biases (qwen2, llama-mha) and a LayerNorm's shift (opt). Projections are
compared by what they make of the states: worst over all cases and 12 seeds of the models 4.9e-7 (transformers' rotary
angles are float32); bound 2e-6.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from lorc_core.compression import LoadedWeights, decompose_layer
from lorc_core.measurement.calibration import calibrate
from lorc_core.measurement.gradients import gradient_moments
from lorc_core.methods import METHODS, Axes
from lorc_core.model.architecture import architecture_of
from lorc_core.model.kinds import KINDS
from tests.materialised import attention_modules, channels_of, dense_projection, materialise, materialise_gradients
from tests.models import tiny_model
from tests.runs import tokens

BOUND = 2e-6
LAYER = 1
MODELS = ["llama", "qwen2", "llama-mha", "opt"]
SMALL_PALU = replace(METHODS["palu"], **{kind: Axes("calibration", block="group(2)") for kind in KINDS})
SUMMED = replace(METHODS["kq_svd"], **{kind: replace(METHODS["kq_svd"].axes(0, kind), gqa="sum") for kind in KINDS})
GRADIENTS = replace(
    METHODS["kq_svd"], **{kind: replace(METHODS["kq_svd"].axes(0, kind), reader="gradient") for kind in KINDS}
)
JOINED = replace(METHODS["k_svd"], keys=replace(METHODS["k_svd"].keys, block="group(2)"))
METHODS_TESTED = METHODS | {
    "palu of 2": SMALL_PALU,
    "kq_svd summed": SUMMED,
    "k_svd of 2": JOINED,
    "fisher per head": GRADIENTS,
}


@cache
def case(name, join_rotated_heads=False):
    """A model, its states on some text, and what calibration measured."""
    model = tiny_model(name).double()
    ids = tokens(model, rows=4, columns=24)
    layer = materialise(model, ids)[LAYER]
    layer.gradients = materialise_gradients(model, ids, "sampled")[LAYER]
    calibrated = calibrate(model, [ids], join_rotated_heads=join_rotated_heads)[LAYER]
    of_loss = gradient_moments(model, [ids], join_rotated_heads=join_rotated_heads)[LAYER]
    return model, layer, calibrated.beside(of_loss)


def norm_of(model):
    if hasattr(model.model, "decoder"):
        return model.model.decoder.layers[LAYER].self_attn_layer_norm
    return model.model.layers[LAYER].input_layernorm


def linear_of(model, projection):
    return getattr(attention_modules(model)[LAYER], f"{projection}_proj")


def constant(model, projection):
    """The bias, and what the LayerNorm's bias adds."""
    linear, norm = linear_of(model, projection), norm_of(model)
    found = torch.zeros(len(linear.weight), dtype=torch.float64)
    if linear.bias is not None:
        found = found + linear.bias.detach()
    return found + linear.weight.detach() @ norm.bias.detach() if hasattr(norm, "bias") else found


def rotary(model):
    return hasattr(model.base_model, "rotary_emb")


def kq_svd(states, readers, rank):
    """KQ-SVD as printed, with K Q^H in full: A = K^+ U, B = K^H U, K~ = K A B^H; returns P with K~ = K P^T."""
    left = torch.linalg.svd(states @ readers.mH, full_matrices=False)[0][:, :rank]
    return (torch.linalg.pinv(states) @ left @ (states.mH @ left).mH).T


def right_singular(states, rank):
    """The orthogonal projector on the top right singular vectors."""
    right = torch.linalg.svd(states, full_matrices=False)[2][:rank]
    return right.T @ right


def padded_readers(heads):
    """(G, R, d): each kv head's readers, as rows over the channels of all kv heads."""
    return torch.cat(
        [
            torch.cat([one if i == g else torch.zeros_like(one) for i in range(len(heads))], dim=1)
            for g, one in enumerate(heads)
        ]
    )


def readers_of(layer, kind, space="", gqa="stack"):
    """(G, rows, d): queries, or rows of W_o, of the query heads that read each kv head."""
    heads = getattr(layer, f"{space}queries") if kind == "keys" else layer.output
    if gqa == "sum":
        heads = heads.sum(dim=2, keepdim=True)
    return heads.transpose(0, 1).flatten(1, 2)


def centred(model, layer, kind):
    return layer_states(layer, kind).flatten(1) - constant(model, kind[0])


def layer_states(layer, kind):
    return layer.keys if kind == "keys" else layer.values


def white_states(model, projection, *, gain):
    """Rows whose second moment is that of W on white inputs: one row for each direction of the input."""
    weight = linear_of(model, projection).weight.detach()
    if not gain:
        return weight.T
    norm, size = norm_of(model), weight.shape[1]
    inputs = torch.eye(size, dtype=torch.float64)
    if hasattr(norm, "bias"):
        inputs = inputs - inputs.mean(dim=1, keepdim=True)  # a LayerNorm centres what it reads
    return inputs * norm.weight.detach() @ weight.T


# By method: what its source does for one block, given the model, its states, the kind, the block's channels and rank.


def lorc(model, layer, kind, channels, rank):
    left, spectrum, right = torch.linalg.svd(linear_of(model, kind[0]).weight.detach(), full_matrices=False)
    truncated = (left[:, :rank] * spectrum[:rank]) @ right[:rank]
    return truncated @ torch.linalg.pinv(linear_of(model, kind[0]).weight.detach())


def lorc_q(model, layer, kind, channels, rank):
    if kind == "values":
        readers = readers_of(layer, kind)
    else:
        queries = torch.cat([white_states(model, "q", gain=True), constant(model, "q")[None]])
        readers = queries.unflatten(1, layer.queries.shape[1:]).transpose(0, 1).flatten(1, 2)
    return kq_svd(white_states(model, kind[0], gain=True), padded_readers(readers), rank)


def kq_joint(model, layer, kind, channels, rank):
    return kq_svd(centred(model, layer, kind), padded_readers(readers_of(layer, kind)), rank)


def fisher(model, layer, kind, channels, rank):
    return kq_svd(centred(model, layer, kind), getattr(layer.gradients, kind).flatten(1), rank)


def fisher_per_head(model, layer, kind, channels, rank):
    head = channels[0] // len(channels)
    gradients = layer.gradients.rotated_keys if kind == "keys" else layer.gradients.values
    return kq_svd(after_rotation(model, layer, kind, channels)[0], gradients[:, head], rank)


def after_rotation(model, layer, kind, channels):
    """(T, d) states of one head as cached after the rotation, and the rows that read them there."""
    head = channels[0] // len(channels)
    if kind == "keys" and rotary(model):
        return layer.rotated_keys[:, head], readers_of(layer, kind, "rotated_")[head]
    return centred(model, layer, kind)[:, channels], readers_of(layer, kind)[head]


def k_svd(model, layer, kind, channels, rank):
    return right_singular(after_rotation(model, layer, kind, channels)[0], rank)


def k_svd_of_groups(model, layer, kind, channels, rank):
    if kind == "keys" and rotary(model):
        return right_singular(layer.rotated_keys.flatten(1)[:, channels], rank)
    return right_singular(centred(model, layer, kind)[:, channels], rank)


def eigen(model, layer, kind, channels, rank):
    states, readers = after_rotation(model, layer, kind, channels)
    return right_singular(torch.cat([states, readers]) if kind == "keys" else states, rank)


def zack(model, layer, kind, channels, rank):
    states, readers = after_rotation(model, layer, kind, channels)
    scale = 1.0 if kind == "keys" else len(states) ** -0.5  # W_o is no sum over tokens
    return right_singular(torch.cat([states * scale, readers]), rank)


def per_head_kq_svd(model, layer, kind, channels, rank):
    return kq_svd(*after_rotation(model, layer, kind, channels), rank)


def summed_kq_svd(model, layer, kind, channels, rank):
    head = channels[0] // len(channels)
    space = "rotated_" if kind == "keys" and rotary(model) else ""
    states = after_rotation(model, layer, kind, channels)[0]
    return kq_svd(states, readers_of(layer, kind, space, gqa="sum")[head], rank)


def palu(model, layer, kind, channels, rank):
    """W S = U S V^T with S S^T = X^T X, X what the projection reads; L R is what becomes of W.

    A LayerNorm's output has an empty direction, so S is X's own singular vectors and values, not a Cholesky factor.
    """
    weight = linear_of(model, kind[0]).weight.detach()[channels]
    norm = norm_of(model)
    inputs = layer.inputs - norm.bias.detach() if hasattr(norm, "bias") else layer.inputs
    _, lengths, directions = torch.linalg.svd(inputs, full_matrices=False)
    seen = lengths > 1e-9 * lengths[0]
    whitening, unwhitening = directions[seen].T * lengths[seen], directions[seen] / lengths[seen, None]
    left, spectrum, right = torch.linalg.svd(weight @ whitening, full_matrices=False)
    rebuilt = left[:, :rank] * spectrum[:rank] @ right[:rank] @ unwhitening
    return rebuilt @ torch.linalg.pinv(weight @ directions[seen].T @ directions[seen])


def kv_heads(model, layer, kind, channels, rank):
    return right_singular(centred(model, layer, kind)[:, channels], rank)


def phasor_freq(model, layer, kind, channels, rank):
    """One complex SVD of K Q^H for each rotary frequency, on rotated tokens."""
    if kind == "values":
        return kq_joint(model, layer, kind, channels, rank)
    frequency, half = channels[0], layer.keys.shape[-1] // 2
    keys = torch.complex(layer.rotated_keys[..., frequency], layer.rotated_keys[..., half + frequency])
    read = torch.complex(layer.rotated_queries[..., frequency], layer.rotated_queries[..., half + frequency])
    readers = padded_readers(read.transpose(0, 1).flatten(1)[..., None])
    found = kq_svd(keys, readers, rank // 2)
    return torch.cat([torch.cat([found.real, -found.imag], 1), torch.cat([found.imag, found.real], 1)])


RECIPES = {
    "lorc": lorc,
    "lorc_q": lorc_q,
    "kq_joint": kq_joint,
    "fisher": fisher,
    "fisher per head": fisher_per_head,
    "k_svd": k_svd,
    "k_svd of 2": k_svd_of_groups,
    "eigen": eigen,
    "kq_svd": per_head_kq_svd,
    "kq_svd summed": summed_kq_svd,
    "palu": palu,
    "palu of 2": palu,
    "zack": zack,
    "kv_heads": kv_heads,
    "phasor_freq": phasor_freq,
}


def applies(method, name):
    heads = {"llama": 2, "qwen2": 2, "llama-mha": 4, "opt": 4}[name]
    return not (method == "palu" and heads < 4) and not (method == "phasor_freq" and name == "opt")


CASES = [(method, name) for method in RECIPES for name in MODELS if applies(method, name)]


def test_every_preset_has_a_recipe_here():
    assert {name for name, method in METHODS.items() if method.training is None} <= set(RECIPES)
    assert {method for method, _ in CASES} == set(RECIPES)


@pytest.mark.parametrize(("method", "name"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_preset_equals_its_sources_recipe_on_materialised_tokens(method, name, kind):
    assert worst_difference(method, method, name, kind) < BOUND


def worst_difference(method, recipe, name, kind):
    """Largest relative difference of what method and recipe make of the states, over blocks and some ranks."""
    chosen = METHODS_TESTED[method]
    model, layer, calibrated = case(name, chosen.joins_rotated_heads)
    architecture = architecture_of(model.config)
    found = decompose_layer(LoadedWeights(model), architecture, LAYER, chosen, calibrated)[kind]
    axes = chosen.axes(LAYER, kind)
    blocks = channels_of(axes.block, architecture.num_kv_heads, architecture.head_dim)
    rotated = kind == "keys" and axes.space == "post_rope" and rotary(model)
    states = layer.rotated_keys.flatten(1) if rotated else centred(model, layer, kind)
    if axes.statistics != "calibration":
        states = white_states(model, kind[0], gain=axes.statistics == "weights_with_gain")
    assert found.rotated == rotated
    assert (found.mean is None) == (rotated or name == "llama")
    worst, width, step = 0.0, len(blocks[0]), 2 if axes.block == "frequency" else 1
    for rank in {step, width // 2 // step * step, width - step, width} - {0}:
        factors = found.factors([rank] * len(blocks))
        projection = dense_projection(factors)
        if found.mean is not None:
            mean = constant(model, kind[0])
            if name == "opt" and axes.statistics == "weights":
                mean = linear_of(model, kind[0]).bias.detach()
            torch.testing.assert_close(factors.offset(), mean - projection @ mean, rtol=0, atol=1e-8)
        for channels in blocks:
            expected = RECIPES[recipe](model, layer, kind, channels, rank)
            own = states[:, channels]
            difference = own @ (projection[channels][:, channels] - expected).T
            worst = max(worst, (difference.norm() / own.norm()).item())
    return worst


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "other"),
    [
        ("kq_svd", "k_svd"),
        ("k_svd", "kq_svd"),
        ("eigen", "kq_svd"),
        ("kq_svd summed", "kq_svd"),
        ("kq_joint", "lorc_q"),
        ("fisher", "kq_joint"),
        ("fisher per head", "kq_svd"),
        ("lorc", "kq_joint"),
        ("zack", "k_svd"),
    ],
)
def test_another_methods_recipe_fails_the_bound(method, other, kind):
    """The control: on a model with grouped heads and biases the recipes differ."""
    assert worst_difference(method, other, "qwen2", kind) > 1e-2


def test_a_bias_left_in_the_values_fails_the_bound():
    """The control: with the constant uncentred, kv_heads would spend directions on qwen2's biases."""
    model, layer, calibrated = case("qwen2")
    architecture = architecture_of(model.config)
    found = decompose_layer(LoadedWeights(model), architecture, LAYER, METHODS["kv_heads"], calibrated)["values"]
    projection = dense_projection(found.factors([8]))
    wrong = right_singular(layer.values.flatten(1), 8)
    assert (projection - wrong).abs().max() > 0.05


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_kq_joint_loses_the_tail_of_one_big_svd(name, kind):
    """The spectrum that schedules read: squared singular values of K Q^T over all heads at once, per token."""
    model, layer, calibrated = case(name)
    found = decompose_layer(LoadedWeights(model), architecture_of(model.config), LAYER, METHODS["kq_joint"], calibrated)
    states, readers = centred(model, layer, kind), padded_readers(readers_of(layer, kind))
    per_token = len(states) * (len(states) if kind == "keys" else 1)
    exact = torch.linalg.svdvals(states @ readers.T)[: states.shape[1]].square() / per_token
    torch.testing.assert_close(found[kind].read_energies[0], exact, rtol=0, atol=1e-9 * exact.sum().item())
    for rank in (3, states.shape[1] // 2):
        projection = dense_projection(found[kind].factors([rank]))
        error = ((states - states @ projection.T) @ readers.T).square().sum() / per_token
        torch.testing.assert_close(error, exact[rank:].sum(), rtol=0, atol=1e-9 * exact.sum().item())
