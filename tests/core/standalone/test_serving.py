"""The identities of docs/serving.md: attention at the smaller head size from folded weights, against attached variants.

Nothing here calls lorc's runtime or folding; weights are folded by loops over heads, in float64; the
models are float32.
"""

import pytest
import torch

import lorc_core
from lorc_core.ranks.schedules import Uniform
from tests.materialised import attention_modules, output_linear, rotated
from tests.runs import one_pass, tokens
from tests.variants import case


@torch.no_grad()
def plain_attention(model, module, factors, inputs):
    """Attention of head size r: stock softmax attention between folded projections, scaled by the full head size."""
    heads = module.q_proj.out_features // factors["keys"].partition.head_dim
    kv_heads, head_dim = factors["keys"].partition.num_kv_heads, factors["keys"].partition.head_dim
    rotary = factors["keys"].rotated
    exact, total = inputs.double(), output_linear(module).bias
    total = torch.zeros(inputs.shape[-1]).double() if total is None else total.double()
    causal = torch.ones(inputs.shape[1], inputs.shape[1]).tril().bool()
    for head in range(heads):
        group = head * kv_heads // heads
        own = slice(head * head_dim, (head + 1) * head_dim)
        shared = slice(group * head_dim, (group + 1) * head_dim)
        up_k, down_k, _ = of_head(factors["keys"], group)
        up_v, down_v, offset_v = of_head(factors["values"], group)
        w_q, b_q = rows(module.q_proj, own)
        w_k, b_k = rows(module.k_proj, shared)
        w_v, b_v = rows(module.v_proj, shared)
        if rotary:  # two products after the rotation
            queries = turn(model, exact @ w_q.T + b_q) @ up_k
            keys = turn(model, exact @ w_k.T + b_k) @ down_k.T
        else:  # nothing but other weights; the keys' offset is the same for all keys, softmax does not see it
            queries, keys = exact @ (up_k.T @ w_q).T + up_k.T @ b_q, exact @ (down_k @ w_k).T + down_k @ b_k
        values = exact @ (down_v @ w_v).T + down_v @ b_v
        logits = (queries @ keys.mT * head_dim**-0.5).masked_fill(~causal, -torch.inf)
        w_o = output_linear(module).weight.double()[:, own]
        total = total + logits.softmax(-1) @ values @ (w_o @ up_v).T + w_o @ offset_v
    return total


def of_head(factors, group):
    rank, width = factors.ranks[group], factors.partition.head_dim
    own = slice(group * rank, (group + 1) * rank)
    offset = torch.zeros(factors.partition.kv_width) if factors.offset() is None else factors.offset()
    return factors.up.double()[:, own], factors.down.double()[own], offset.double()[group * width : (group + 1) * width]


def rows(linear, own):
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
    return linear.weight.double()[own], bias.double()[own]


def turn(model, states):
    return rotated(model, states[:, :, None])[:, :, 0]


@pytest.mark.parametrize(
    ("name", "method"), [("opt", "kq_svd"), ("opt", "k_svd"), ("qwen2", "kq_svd"), ("llama", "k_svd")]
)
def test_stock_attention_at_the_smaller_head_size_is_exact(name, method):
    model, variant = case(name, method, Uniform(), kept=0.5)
    seen = {}

    def remember(module, args, kwargs, output):
        seen[module.layer_idx] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], output[0])

    modules = attention_modules(model)
    handles = [module.register_forward_hook(remember, with_kwargs=True) for module in modules]
    untouched = one_pass(model, tokens(model))
    before = dict(seen)
    with lorc_core.attach(model, variant):
        assert not torch.equal(one_pass(model, tokens(model)), untouched)
    for handle in handles:
        handle.remove()
    for layer_idx, module in enumerate(modules):
        inputs, output = seen[layer_idx]
        found = plain_attention(model, module, variant.factors[layer_idx], inputs)
        assert ((found - output).norm() / output.norm()).item() < 1e-5
    inputs, output = before[0]  # the control: it is not the untouched model's attention
    found = plain_attention(model, modules[0], variant.factors[0], inputs)
    assert ((found - output).norm() / output.norm()).item() > 1e-2
