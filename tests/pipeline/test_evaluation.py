"""Texts, windows, losses and device plans against straightforward computations of the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import lorc_core
from lorc_core.errors import ArtifactError, ConfigError, NumericsError
from lorc_core.model.stored.checkpoint import read_config
from pipeline.evaluation.device_map import device_plan
from pipeline.evaluation.losses import loaded_model, window_losses
from pipeline.zoo.texts import Text, load_rows, pin_windows, text_tokens, token_stream, tokenizer_identity
from tests.models import tiny_model
from tests.paths import REPOSITORY

GIB = 1024**3


@pytest.fixture
def tokenizer(save_tiny):
    return AutoTokenizer.from_pretrained(save_tiny("llama"))


def test_documents_are_joined_between_the_tokenizers_marks(tokenizer):
    one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("import os", "x = 1"))
    for marks, expected in (
        ("both", [0, *one, 1, 0, *two, 1]),
        ("begin", [0, *one, 0, *two]),
        ("end", [*one, 1, *two, 1]),
        ("none", [*one, *two]),
    ):
        assert token_stream(["import os", "x = 1"], tokenizer, marks).tolist() == expected


def test_a_text_is_cut_at_its_separator_and_into_parts(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one<|end|>\ntwo\n<|end|>three<|end|>four<|end|>\n")
    entry = Text(name="t", source=str(tmp_path / "a.txt"), separator="<|end|>")
    assert load_rows(entry, tmp_path / "cache") == ["one", "two", "three", "four"]
    halves = [
        text_tokens(replace(entry, part=part), tokenizer, "begin", tmp_path / "cache").tolist()
        for part in ((0, 0.5), (0.5, 1))
    ]
    assert halves[0] == token_stream(["one", "two"], tokenizer, "begin").tolist()
    assert halves[1] == token_stream(["three", "four"], tokenizer, "begin").tolist()


def test_token_ids_are_taken_as_they_are_and_checked(tmp_path, tokenizer):
    np.save(tmp_path / "a.npy", np.arange(40, dtype=np.uint16))
    entry = Text(name="t", source=str(tmp_path / "a.npy"), part=(0.25, 0.75))
    assert text_tokens(entry, tokenizer, "both", tmp_path).tolist() == list(range(10, 30))
    for wrong in (np.array([2000]), np.array([0.5])):
        np.save(tmp_path / "a.npy", wrong)
        with pytest.raises(ConfigError, match=r"text t: .*a\.npy must hold token ids below 1024 of this tokenizer"):
            text_tokens(entry, tokenizer, "both", tmp_path)
    (tmp_path / "a.npy").write_text("no array")
    with pytest.raises(ConfigError, match="text t: cannot be read"):
        text_tokens(entry, tokenizer, "both", tmp_path)


def test_windows_do_not_overlap_are_pinned_by_the_seed_and_keep_their_order():
    stream = np.arange(100)
    windows = pin_windows(stream, window_tokens=8, num_windows=5, seed=0, name="t")
    assert all(row[0] % 8 == 0 and (np.diff(row) == 1).all() for row in windows)
    assert sorted({int(row[0]) for row in windows}) == [int(row[0]) for row in windows]
    assert (windows == pin_windows(stream, window_tokens=8, num_windows=5, seed=0, name="t")).all()
    assert (windows != pin_windows(stream, window_tokens=8, num_windows=5, seed=1, name="t")).any()


def test_a_short_text_says_how_many_windows_it_gives():
    with pytest.raises(ConfigError, match="text t: 10 tokens give 0 windows of 32, 2 are asked"):
        pin_windows(np.arange(10), window_tokens=32, num_windows=2, seed=0, name="t")


@pytest.mark.parametrize(
    ("file", "content"),
    [("a.txt", "one\n\ntwo"), ("a.jsonl", '{"text": "one\\n\\ntwo"}\n'), ("a.json", '[{"text": "one\\n\\ntwo"}]')],
)
def test_text_files_are_read_through_datasets(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    assert load_rows(Text(name="t", source=str(tmp_path / file)), tmp_path / "cache") == ["one\n\ntwo"]


def test_parquet_is_read_and_a_missing_column_lists_those_there(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["one", "two"]}), tmp_path / "a.parquet")
    source = str(tmp_path / "a.parquet")
    assert load_rows(Text(name="t", source=source, column="body"), tmp_path / "cache") == ["one", "two"]
    with pytest.raises(ConfigError, match="text t: no column 'text'; it has body"):
        load_rows(Text(name="t", source=source), tmp_path / "cache")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", "", "cannot be read"),
        ("a.jsonl", "{broken", "cannot be read"),
        ("a.jsonl", '{"text": null}\n', "holds something that is not text"),
        ("a.parquet", "no parquet", "cannot be read"),
    ],
)
def test_a_text_that_cannot_be_used_is_named(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match=f"text t: .*{message}"):
        load_rows(Text(name="t", source=str(tmp_path / file)), tmp_path / "cache")


def test_a_model_without_a_tokenizer_is_refused(save_tiny):
    directory = save_tiny("opt")
    before = tokenizer_identity(directory, "opt")
    assert tokenizer_identity(directory, "llama") != before
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(ArtifactError, match="no tokenizer files"):
        tokenizer_identity(directory, "opt")


def test_window_losses_equal_one_uncached_pass_and_bytes_are_those_held():
    model = tiny_model("llama")
    windows = np.random.default_rng(0).integers(3, 1024, (5, 20))
    losses, bytes_per_token = window_losses(model, windows, batch_size=2)
    ids = torch.from_numpy(windows)
    with torch.inference_mode():
        log_probabilities = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    expected = -log_probabilities[:, :-1].gather(2, ids[:, 1:, None])[:, :, 0].mean(1)
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-5)
    assert bytes_per_token == 3 * 2 * 32 * 4  # layers x kinds x width x float32
    variant = lorc_core.compress(model, kept_fraction=0.5, schedule="uniform")
    with lorc_core.attach(model, variant):
        worse, fewer = window_losses(model, windows, batch_size=5)
    assert fewer == bytes_per_token / 2
    assert np.abs(worse - losses).max() > 0.01


def test_a_loss_that_is_not_finite_is_refused():
    model = tiny_model("llama")
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="window 0: the loss is NaN or infinite"):
        window_losses(model, np.full((2, 8), 5), batch_size=2)


def test_a_70b_model_is_spread_evenly_from_its_config_alone():
    config = read_config(REPOSITORY / "examples" / "configs" / "llama-3.1-70b.json")
    plan = device_plan(config, torch.bfloat16, dict.fromkeys(range(4), 80 * GIB), batch_size=8, window_tokens=2048)
    assert set(plan.devices.values()) == {0, 1, 2, 3}
    weights = [held.weight_bytes for held in plan.held.values()]
    assert sum(weights) == pytest.approx(70.55e9 * 2, rel=0.01)  # parameters at two bytes
    assert max(weights) < 1.1 * min(weights)


def test_a_model_that_cannot_be_loaded_is_an_artifact_error(save_tiny):
    directory = save_tiny("llama")
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(config.replace('"intermediate_size": 96', '"intermediate_size": 32'))
    loading = loaded_model(directory, "float32", batch_size=2, window_tokens=20)
    with pytest.raises(ArtifactError, match=r"down_proj.weight is \(64, 96\)"), loading:
        pass
