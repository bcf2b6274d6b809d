"""What projections lose of keys and values, against the same measured from the model's own linear layers."""

import pytest
import torch

import lorc_core
from lorc_core.compression import LoadedWeights
from lorc_core.decomposition.projection_errors import projection_errors
from lorc_core.measurement.calibration import calibrate
from lorc_core.model.architecture import architecture_of
from lorc_core.model.kinds import KINDS, LayerKind
from tests.materialised import attention_modules, dense_projection
from tests.models import tiny_model
from tests.runs import tokens


def opt_whose_norms_cancel():
    """Random LayerNorm gains, and biases that cancel most of what the gains let through.

    A common part of all embeddings makes the normalised inputs alike, so that inputs are short and W beta is long.
    """
    model = tiny_model("opt")
    generator = torch.Generator().manual_seed(3)
    decoder = model.model.decoder
    with torch.no_grad():
        decoder.embed_positions.weight += 2 * torch.randn(64, generator=generator)
        for layer in decoder.layers:
            norm = layer.self_attn_layer_norm
            norm.weight.copy_(0.5 + torch.rand(64, generator=generator))
            norm.bias.zero_()
            mean = inputs_of(model, layer.self_attn.k_proj).mean(dim=0)
            norm.bias.copy_(0.2 * torch.randn(64, generator=generator) - mean)
    return model


@torch.no_grad()
def inputs_of(model, linear):
    """What a linear layer reads on the text: (tokens, in_features)."""
    seen = []
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    model(input_ids=tokens(model, rows=8))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("method", ["lorc", "lorc_q", "kq_joint", "eigen"])
def test_the_bound_holds_where_layer_norms_have_biases(method):
    """Control: without the constant that is lost of the bias, the same inputs break the bound."""
    model = opt_whose_norms_cancel()
    architecture, source, ids = architecture_of(model.config), LoadedWeights(model), tokens(model, rows=8)
    moments = calibrate(model, [ids])
    variant = lorc_core.compress(model, method, 0.5, "uniform", calibration=ids)
    broken = 0
    for idx, module in enumerate(attention_modules(model)):
        for kind, linear in zip(KINDS, (module.k_proj, module.v_proj), strict=True):
            factors = variant.factors[idx][kind]
            found = projection_errors(source, architecture, LayerKind(idx, kind), factors, moments[idx])
            inputs, weight = inputs_of(model, linear).double(), linear.weight.detach().double()
            rest = torch.eye(64).double() - dense_projection(factors)
            lost = (inputs @ weight.T + linear.bias.detach().double() - factors.mean.double()) @ rest.T
            error = lost.square().sum(dim=1).mean().sqrt().item()
            assert found.error == pytest.approx(error, rel=1e-4)
            assert error <= found.bound * (1 + 1e-9)
            length = inputs.square().sum(dim=1).mean().sqrt()
            broken += error > (torch.linalg.matrix_norm(rest @ weight, 2) * length).item()
    if method == "lorc_q":
        assert broken > 0  # the others lose nothing of the bias (`lorc`), or have seen that the inputs are alike
