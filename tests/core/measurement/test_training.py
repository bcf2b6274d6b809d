"""Trained projections: rotations stay orthogonal, training goes on where it was stopped, and it helps."""

import copy
from dataclasses import replace

import pytest
import torch

import lorc_core
from lorc_core.compression import LoadedWeights, decompose_layer
from lorc_core.decomposition.bounds import read_error
from lorc_core.decomposition.moments import moments_of
from lorc_core.errors import ConfigError
from lorc_core.measurement.calibration import calibrate
from lorc_core.measurement.training.latent_bases import change_basis, trained_layers
from lorc_core.measurement.training.trainer import Trainer
from lorc_core.methods import METHODS, Training
from lorc_core.model.architecture import architecture_of
from lorc_core.model.channels import diagonal_blocks
from lorc_core.model.kinds import KINDS, LayerKind
from tests.models import tiny_model

SETTINGS = Training(num_steps=12, batch_size=8, eval_every=4, learning_rate=0.003)


def text(model, rows=64, columns=24):
    return torch.randint(3, model.config.vocab_size, (rows, columns), generator=torch.Generator().manual_seed(0))


def decomposed(model, method):
    architecture = architecture_of(model.config)
    moments = calibrate(model, [text(model)])
    return [
        decompose_layer(LoadedWeights(model), architecture, idx, METHODS[method], moments[idx])
        for idx in range(architecture.num_layers)
    ]


@pytest.mark.parametrize("method", ["kq_joint", "k_svd"])
def test_training_lowers_the_divergence_and_keeps_the_model_and_orthogonality(method):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = [parameter.requires_grad for parameter in model.parameters()]
    sequences = text(model, rows=256)
    longer = replace(SETTINGS, num_steps=40, eval_every=20, learning_rate=0.01)
    trainer = Trainer(model, decomposed(model, method), longer)
    states = list(trainer.train(sequences))
    with trainer.attached() as attachment:
        assert trainer.divergence(attachment, sequences[::8]) == pytest.approx(states[-2].last, rel=1e-4)
    start = Trainer(model, trainer.layers, SETTINGS)
    with start.attached() as attachment:
        # the least that 8 seeds of the model gained is 1.8 %
        assert states[-1].best < 0.99 * start.divergence(attachment, sequences[::8])
    for layer in states[-1].bases:
        for rotation in layer:
            identity = torch.eye(rotation.shape[-1]).expand_as(rotation)
            torch.testing.assert_close(rotation.mT @ rotation, identity, rtol=0, atol=1e-5)
            assert (rotation - identity).abs().max() > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == settings


def test_training_goes_on_from_its_checkpoint_to_the_same_bases(tmp_path):
    model = tiny_model("llama")
    layers = decomposed(model, "kq_joint")
    *_, whole = Trainer(model, layers, SETTINGS).train(text(model))
    interrupted = Trainer(model, layers, SETTINGS).train(text(model), tmp_path)
    assert next(interrupted).step == 4
    interrupted.close()  # as a killed worker
    resumed = list(Trainer(model, layers, SETTINGS).train(text(model), tmp_path))
    assert [state.step for state in resumed] == [8, 12, 12]
    for one, other in zip(resumed[-1].bases, whole.bases, strict=True):
        for kind in KINDS:
            torch.testing.assert_close(one[kind], other[kind], rtol=0, atol=1e-6)


def test_training_stops_when_held_out_text_gets_no_better():
    model = tiny_model("llama")
    useless = Training(num_steps=100, batch_size=1, eval_every=1, patience=2, learning_rate=3.0)
    states = list(Trainer(model, decomposed(model, "kq_joint"), useless).train(text(model)))
    assert states[-1].step < 100
    assert states[-1].best <= min(state.last for state in states[:-1])


@pytest.mark.parametrize("method", ["kq_joint", "k_svd"])
def test_rotated_energies_are_what_each_direction_saves(method):
    """Against tr(M (I - P) C (I - P)^T) at every rank, or tr((I - P) C) where nothing is known of the readers."""
    model = tiny_model("llama")
    architecture = architecture_of(model.config)
    layer = decomposed(model, method)[1]["values"]
    generator = torch.Generator().manual_seed(1)
    blocks, width = layer.up.shape[:2]
    rotation = torch.linalg.qr(torch.randn(blocks, width, width, generator=generator, dtype=torch.float64))[0]
    axes = METHODS[method].values
    found = change_basis(layer, rotation, axes.reader)
    calibrated = calibrate(model, [text(model)])[1]
    moments = moments_of(LoadedWeights(model), architecture, LayerKind(1, "values"), axes, calibrated)
    states, readers = (diagonal_blocks(moment, layer.partition) for moment in (moments.states, moments.readers))
    for block in range(blocks):
        M = readers[block] if axes.reader == "interaction" else torch.eye(width, dtype=torch.float64)
        for rank in range(width + 1):
            up = found.up[block, :, :rank]
            down = up.mT if found.own_down is None else found.own_down[block, :rank]
            left = found.read_energies[block, rank:].sum().item()
            total = found.read_energies[block].sum().item()
            rest = torch.eye(width, dtype=torch.float64) - up.double() @ down.double()
            assert read_error(states[block], M, rest) == pytest.approx(left, abs=1e-6 * total)


def test_the_full_rank_of_rotated_factors_is_still_the_identity():
    model = tiny_model("llama")
    layers = decomposed(model, "kq_joint")
    *_, last = Trainer(model, layers, SETTINGS).train(text(model))
    for layer in trained_layers(layers, last.bases, METHODS["matryoshka"]):
        for found in layer:
            product = found.up @ found.own_down
            identity = torch.eye(product.shape[-1], dtype=product.dtype).expand_as(product)
            torch.testing.assert_close(product, identity, rtol=0, atol=1e-4)


def test_compress_trains_where_the_method_says_so():
    model = tiny_model("qwen2")
    method = METHODS["matryoshka"]
    quick = type(method)("quick", method.keys, method.values, method.schedule, "test", training=SETTINGS)
    variant = lorc_core.compress(model, quick, 0.5, calibration=text(model))
    plain = lorc_core.compress(model, "kq_joint", 0.5, calibration=text(model))
    assert variant.method.training == SETTINGS
    assert not torch.equal(variant.factors[0]["values"].up, plain.factors[0]["values"].up)
    with lorc_core.attach(model, variant):
        model(input_ids=text(model))


def test_adapters_are_trained_kept_and_applied_and_leave_the_model_as_it_was(tmp_path):
    pytest.importorskip("peft", reason="adapters are trained through peft, an extra")
    model = tiny_model("qwen2")
    ids = text(model, rows=4)
    before = model(input_ids=ids).logits
    settings = replace(SETTINGS, lora_rank=2, num_steps=8)
    method = replace(METHODS["matryoshka"], name="recovered", training=settings)
    variant = lorc_core.compress(model, method, 0.4, calibration=text(model, rows=256))
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    assert len(variant.adapters) == 3 * 4 * 2
    assert all(variant.adapters[f"layers.{layer}.k.up"].abs().max() > 0 for layer in range(3))
    variant.save(tmp_path)
    loaded = lorc_core.load_variant(tmp_path)
    reference = copy.deepcopy(model)
    for name in ("q", "k", "v", "o"):
        for layer in range(3):
            linear = getattr(reference.model.layers[layer].self_attn, f"{name}_proj")
            down, up = (variant.adapters[f"layers.{layer}.{name}.{part}"] for part in ("down", "up"))
            linear.weight.data += up @ down
    without = replace(variant, adapters={})
    with lorc_core.attach(reference, without), torch.no_grad():
        expected = reference(input_ids=ids).logits
    with lorc_core.attach(model, loaded), torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    with lorc_core.attach(model, without), torch.no_grad():
        assert (model(input_ids=ids).logits - expected).abs().max() > 1e-2  # the control: adapters are felt
    assert torch.equal(model(input_ids=ids).logits, before)
    assert variant.factor_floats == without.factor_floats + sum(part.numel() for part in variant.adapters.values())


def test_adapters_are_those_of_their_own_seed_whatever_the_global_one():
    pytest.importorskip("peft", reason="adapters are trained through peft, an extra")
    model = tiny_model("qwen2")
    layers = decomposed(model, "kq_joint")
    found = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 7)):
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        settings = replace(SETTINGS, lora_rank=2, num_steps=1, eval_every=1, learning_rate=1e-9, seed=seed)
        *_, last = Trainer(model, layers, settings).train(text(model))
        assert torch.equal(torch.random.get_rng_state(), before)
        found.append(last.adapters)
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    downs = [name for name in found[0] if name.endswith(".down")]  # `up` starts at zero
    assert not any(torch.equal(found[0][name], found[2][name]) for name in downs)  # the control


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="num_steps must be at least 1, got 0"):
        Training(num_steps=0)
    with pytest.raises(ConfigError, match="rising shares"):
        Training(min_kept_fraction=0.9)
    with pytest.raises(ConfigError, match="two sequences of calibration text at least, got 1"):
        model = tiny_model("llama")
        list(Trainer(model, decomposed(model, "kq_joint"), SETTINGS).train(text(model, rows=1)))
