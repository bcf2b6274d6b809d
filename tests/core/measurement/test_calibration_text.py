"""Calibration text: cut by the model's tokenizer as that cuts the whole text, no more of it than asked, and checked."""

import inspect
import io
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorc_core
from lorc_core.errors import ArtifactError, ConfigError
from lorc_core.measurement.calibrated_model import CalibratedModel
from lorc_core.measurement.calibration_text import calibration_text, first_tokens
from tests.models import CONFIGS, tiny_model
from tests.paths import DEMO

LLAMA = DEMO / "stdlib-llama"
WINDOW = 2048
CODE = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(500))


@pytest.fixture(scope="module")
def llama():
    return AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LLAMA)


def tiny_model_at(directory):
    """A random model with windows of 64 tokens that says it was loaded from `directory`."""
    model = tiny_model("llama")
    model.name_or_path = str(directory)
    return model


def test_a_text_file_is_cut_into_whole_windows_of_the_models_tokens(llama, tokenizer, tmp_path):
    (tmp_path / "text.py").write_text(CODE)
    text = calibration_text(tmp_path / "text.py", llama, 10**6)
    expected = tokenizer(CODE)["input_ids"]
    assert text.sequences.shape == (len(expected) // WINDOW, WINDOW)
    assert text.sequences.shape[0] >= 2
    assert text.sequences.flatten().tolist() == expected[: text.sequences.numel()]
    assert not text.is_beginning


def test_no_more_windows_are_taken_than_asked_and_it_is_said(llama, tokenizer):
    expected = tokenizer(CODE)["input_ids"]
    for max_tokens, num_windows in ((WINDOW, 1), (3 * WINDOW - 1, 2), (3 * WINDOW, 3)):
        text = calibration_text([CODE], llama, max_tokens)
        assert text.sequences.flatten().tolist() == expected[: num_windows * WINDOW]
        assert str(text) == f"the first {num_windows * WINDOW:,} tokens"
    assert str(calibration_text([CODE], llama, len(expected))) == f"{len(expected) // WINDOW * WINDOW:,} tokens"


def test_texts_follow_one_another(llama, tokenizer):
    texts = [CODE[:3000], CODE[3000:]]
    expected = [token for text in texts for token in tokenizer(text)["input_ids"]]
    sequences = calibration_text(texts, llama, 10**6).sequences
    assert sequences.flatten().tolist() == expected[: sequences.numel()]


def test_a_long_text_is_not_tokenized_past_the_tokens_that_are_used(tokenizer, monkeypatch):
    class Counting(type(tokenizer)):
        lengths = ()

        def __call__(self, text, **settings):
            self.lengths += (len(text),)
            return super().__call__(text, **settings)

    counting = Counting.from_pretrained(LLAMA)
    assert first_tokens([CODE * 10, CODE], counting, 500) == tokenizer(CODE * 10)["input_ids"][:500]
    assert counting.lengths == (16 * 500,)
    monkeypatch.setattr("lorc_core.measurement.calibration_text.CHARS_PER_TOKEN", 1)
    assert first_tokens([CODE], counting, 500) == tokenizer(CODE)["input_ids"][:500]
    assert counting.lengths[1:] == (500, 1000, 2000)


def test_texts_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    model = tiny_model_at(LLAMA)
    with pytest.raises(ConfigError, match=r"short\.txt: \d+ tokens are fewer than one window of 64"):
        calibration_text(tmp_path / "short.txt", model, 10**6)
    with pytest.raises(ConfigError, match=r"calibration texts: \d+ tokens are fewer than one window of 64"):
        calibration_text(["a few words", "and a few"], model, 10**6)
    with pytest.raises(ConfigError, match=r"calibration_tokens must be at least 64, .*, got 63"):
        calibration_text(tmp_path / "short.txt", model, 63)
    with pytest.raises(ConfigError, match=r"calibration text file .*nowhere' does not exist"):
        calibration_text(tmp_path / "nowhere", model, 10**6)
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes\.bin is not UTF-8 text"):
        calibration_text(tmp_path / "bytes.bin", model, 10**6)
    with pytest.raises(ConfigError, match="needs the model's tokenizer: compress a directory"):
        calibration_text(tmp_path / "short.txt", tiny_model("llama"), 10**6)
    with pytest.raises(ArtifactError, match="the tokenizer cannot be loaded"):
        calibration_text(tmp_path / "short.txt", tiny_model_at(tmp_path), 10**6)


@pytest.mark.parametrize(
    "bad",
    [
        torch.arange(8),
        torch.zeros(2, 3, 4, dtype=torch.long),
        torch.zeros(2, 3),
        [1, 2, 3],
        [[1.5, 2.5]],
        [[1, 2, 3], [4, 5]],
        torch.zeros(0, 5, dtype=torch.long),
        torch.zeros(5, 0, dtype=torch.long),
        torch.zeros(5, 1, dtype=torch.long),
    ],
)
def test_what_is_no_table_of_token_ids_is_refused(bad):
    plain = inspect.unwrap(calibration_text)  # users run without the shape checks of the tests
    with pytest.raises(ConfigError, match=r"calibration must be token ids \(sequences, tokens\), "):
        plain(bad, tiny_model("llama"), 10**6)


@pytest.mark.parametrize("token_id", [1024, -1])
def test_token_ids_past_the_vocabulary_are_refused(token_id):
    ids = torch.zeros(2, 64, dtype=torch.long)
    ids[1, 5] = token_id
    with pytest.raises(ConfigError, match=f"calibration has token id {token_id}, the model's vocabulary has 0..1023"):
        lorc_core.compress(tiny_model("llama"), "kq_joint", calibration=ids)


def test_a_tokenizer_with_ids_past_the_vocabulary_is_refused_by_name(save_tiny):
    """The tokenizer of another model, or one that was given a token which the embedding has no row for."""
    directory = save_tiny("llama")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == 1024
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(directory)
    text = ["word " * 3000 + "<extra>" + " word" * 3000]
    message = f"the tokenizer of {directory} has token id 1024, the model's vocabulary has 0..1023"
    with pytest.raises(ConfigError, match=message):
        lorc_core.compress(directory, "kq_joint", calibration=text)
    lorc_core.compress(directory, "kq_joint", calibration=text, calibration_tokens=2048)  # the control: before it


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown_on(stream, monkeypatch, method, schedule=None, rows=4):
    """A variant of the tiny Llama, and what was written to the standard error, which is `stream`."""
    enable_progress_bars()  # off in all other tests, see tests/conftest.py
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        calibration = torch.arange(rows * 64).view(rows, 64)
        variant = lorc_core.compress(tiny_model("llama"), method, 0.5, schedule, calibration=calibration)
    disable_progress_bars()
    return variant, stream.getvalue()


@pytest.mark.parametrize(
    ("method", "schedule", "bars"),
    [
        ("kq_joint", None, ["calibrating on 256 tokens: 100%", "decomposing: 100%"]),
        ("lorc_q", "fisher", ["decomposing: 100%", "measuring on 256 tokens: 100%"]),
        ("lorc_q", "error_budget", ["decomposing: 100%", "measuring on 256 tokens: 100%"]),
        ("lorc_q", "sensitivity", ["decomposing: 100%", "measuring on 256 tokens: ", "exchanging on 256 tokens: "]),
    ],
)
def test_a_terminal_shows_what_is_measured_and_a_log_nothing(method, schedule, bars, monkeypatch):
    variant, shown = shown_on(Terminal(), monkeypatch, method, schedule)
    last_states = [line.rpartition("\r")[2] for line in shown.removesuffix("\n").split("\n")]
    for bar, line in zip(bars, last_states, strict=True):
        assert line.startswith(bar)
        percent = int(line.partition("%")[0].rpartition(" ")[2])
        assert 50 <= percent <= 100
    logged_variant, logged = shown_on(io.StringIO(), monkeypatch, method, schedule)
    assert logged == ""
    assert logged_variant.ranks == variant.ranks


def test_a_pass_of_any_family_moves_the_bar_once(monkeypatch):
    """OPT's model calls its decoder past its base model."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    for name in CONFIGS:
        model, passes = tiny_model(name), []
        calibrated = CalibratedModel(model, torch.arange(16).view(2, 8), 16)
        monkeypatch.setattr(
            "lorc_core.measurement.calibrated_model.progress_bar", lambda *_, passes=passes: Counted(passes)
        )
        with calibrated.progress("measuring", 1), torch.inference_mode():
            model(calibrated.sequences)
        assert len(passes) == 1, name


class Counted:
    """In place of a bar."""

    def __init__(self, passes):
        self.passes = passes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self):
        self.passes.append(1)


def test_a_terminal_shows_how_far_training_is(monkeypatch):
    training = replace(lorc_core.METHODS["matryoshka"].training, num_steps=4, eval_every=2)
    method = replace(lorc_core.METHODS["matryoshka"], training=training)
    _, shown = shown_on(Terminal(), monkeypatch, method, rows=16)
    assert "training on 1,024 tokens: 100%" in shown
