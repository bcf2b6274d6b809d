"""Continue a text with a variant's compressed cache: `lorc generate VARIANT PROMPT`."""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedConfig, TextStreamer
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging as transformers_logging

import lorc_core
from lorc_core.errors import ArtifactError, ConfigError
from lorc_core.loading import variant_and_base
from lorc_core.model.architecture import architecture_of
from lorc_core.model.kinds import KINDS
from lorc_core.standalone.plain_model import MODELS
from lorc_core.standalone.settings import PREFIX, SETTINGS, Settings
from lorc_core.variant import CONFIG_FILE
from pipeline.registry.tracking import default_tracking_uri


def generate_text(reference: str, prompt: str, max_new_tokens: int, workdir: str) -> int:
    """Stream a greedy continuation to standard output, and its cost to standard error. Returns the exit code."""
    transformers_logging.disable_progress_bar()
    model, tokenizer_dir = load_reference(reference, workdir)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    if not (prompt_tokens := inputs["input_ids"].shape[1]):
        raise ConfigError("the prompt is empty")
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    started = time.perf_counter()
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer, return_dict_in_generate=True
    )
    elapsed_s = time.perf_counter() - started
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert output.past_key_values is not None
    num_new = output.sequences.shape[1] - prompt_tokens
    held = lorc_core.cache_bytes(output.past_key_values)
    untouched = untouched_bytes(output.past_key_values, cached_width(model.config), model.dtype.itemsize)
    Console(stderr=True, soft_wrap=True).print(
        f"{num_new} tokens, {num_new / elapsed_s:.1f} per second with the prompt's {prompt_tokens}; "
        f"cache {held:,} bytes, {held / untouched:.2f} of the untouched model's {untouched:,}",
        highlight=False,
    )
    return 0


def cached_width(config: PreTrainedConfig) -> int:
    """Floats of keys, as of values, that the model without compression caches per token and layer."""
    if hasattr(config, "lorc_plain"):
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return heads * config.lorc_plain["rotated_head_dim"]
    architecture = Settings.of(config).architecture if hasattr(config, SETTINGS) else architecture_of(config)
    return architecture.num_cached_heads * architecture.head_dim


def untouched_bytes(cache: Cache, width: int, element_bytes: int) -> int:
    """Bytes that the untouched model's cache would take for the same tokens of the same layers."""
    keys = [layer.keys for layer in cache.layers if isinstance(layer, CacheLayerMixin) and layer.keys is not None]
    return sum(len(KINDS) * cached.shape[0] * cached.shape[-2] * width * element_bytes for cached in keys)


def is_exported(directory: Path) -> bool:
    """Whether `lorc export` wrote the directory; ArtifactError where its config.json is not a model's."""
    config = directory / "config.json"
    if not config.is_file():
        return False
    try:
        return str(json.loads(config.read_text())["model_type"]).startswith(PREFIX)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{config}: not a model's config ({error!r}); expected is a JSON object with a model_type"
        ) from error


def register_plain_models() -> None:
    """Plain exports run on our copy of their code, so that none of theirs need be trusted."""
    for model_type, model in MODELS.items():
        AutoConfig.register(model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)


def load_reference(reference: str, workdir: str) -> tuple[Any, Path]:
    """A model whose cache is compressed, and the directory of its tokenizer."""
    if is_exported(Path(reference)):
        register_plain_models()
        return AutoModelForCausalLM.from_pretrained(reference, dtype="auto", device_map="auto"), Path(reference)
    with TemporaryDirectory() as scratch:
        directory, dtype = find_variant(reference, workdir, Path(scratch))
        _, location = variant_and_base(directory)
        base_dir = location.directory(weights=True)
        return lorc_core.load(directory, base=base_dir, dtype=dtype, device_map="auto"), base_dir


def names_a_path(reference: str) -> bool:
    """Whether it cannot be NAME, NAME/VERSION or NAME@ALIAS."""
    _, slash, last = reference.rpartition("/")
    return reference.startswith(("/", "./", "../", "~")) or (slash != "" and not last.isdigit())


def find_variant(reference: str, workdir: str, scratch: Path) -> tuple[Path, str]:
    """A variant on disk, or a registered one (its champion, unless a version or alias is named), and its dtype."""
    if (Path(reference) / CONFIG_FILE).is_file():
        return Path(reference), "auto"
    if names_a_path(reference) and not Path(reference).is_dir():
        raise ConfigError(f"variant directory {reference} does not exist")
    if Path(reference).is_dir():
        raise ConfigError(f"{reference}: a directory without {CONFIG_FILE} is no variant")
    from pipeline.registry.versions import CHAMPION, connect, fetch_files, find_version, read_version

    client = connect(default_tracking_uri(None, workdir))
    registered = read_version(client, find_version(client, reference, CHAMPION))
    return fetch_files(client, registered, scratch / "version")[0], registered.details["settings"]["dtype"]
