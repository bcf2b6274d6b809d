"""Whether a checkpoint holds the model that its config describes: every tensor there, in its shape, in numbers.

transformers fills what is missing with random numbers and goes on; a model like that must never be scored. Only the
files' headers are read, and the model is built without memory, so a checkpoint of 140 GB takes as long as a small one.
"""

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lorc_core.errors import ArtifactError, UnsupportedModelError, first_line
from lorc_core.model.sizes import check_sizes
from lorc_core.model.stored.checkpoint import FP8, SCALE_ENDINGS, Checkpoint, read_config

# safetensors' names of the numbers that a weight may be stored in.
WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What transformers' model classes raise for values of a config that they do not know or cannot use.
BUILDING_ERRORS = (
    ArithmeticError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Masks and their constants, which GPT-2's relatives once saved as if they were weights.
OLD_BUFFERS = re.compile(r"\.attn(\.attention)?\.(masked_)?bias$")
MAX_NAMED = 3  # tensors that an error names


def check_model(directory: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Refuse a model directory that is not whole, before anything runs; see `check_checkpoint`.

    Args:
        directory: Holds config and safetensors.
        trust_remote_code: Whether the model's own code may be run.

    Raises:
        LorcError: As `Checkpoint`, `check_sizes` and `check_checkpoint` do.
    """
    checkpoint, config = Checkpoint(directory), read_config(directory, trust_remote_code=trust_remote_code)
    check_sizes(config)
    check_checkpoint(checkpoint, config, trust_remote_code=trust_remote_code)
    return checkpoint


def check_checkpoint(checkpoint: Checkpoint, config: PreTrainedConfig, *, trust_remote_code: bool = False) -> None:
    """Refuse a checkpoint that is not whole, before anything runs.

    Args:
        checkpoint: Its headers are read, no tensor is.
        config: Of the model; its sizes were checked, see `check_sizes`.
        trust_remote_code: Whether the model's own code may be run.

    Raises:
        ArtifactError: A tensor is missing, unexpected, of another shape or no float; the message names it.
        UnsupportedModelError: The weights are quantized.
    """
    stored = checkpoint.stored
    if (quantization := quantization_of(config)) is not None:
        if quantization != "fp8":
            raise UnsupportedModelError(
                f"{checkpoint.url}: the weights are quantized ({quantization}), which lorc cannot read; take the model "
                "in bfloat16, float16, float32 or fp8"
            )
        config = copy.deepcopy(config)
        del config.quantization_config
        stored = dequantized(checkpoint)
    empty = {
        name: torch.empty(entry["shape"], dtype=WEIGHT_DTYPES[entry["dtype"]], device="meta")
        for name, entry in stored.items()
        if entry["dtype"] in WEIGHT_DTYPES
    }
    problems = loading_problems(
        causal_model_class(checkpoint, config, trust_remote_code=trust_remote_code), config, empty, checkpoint
    )
    missing = problems["missing_keys"]
    if not_floats := sorted(missing & (stored.keys() - empty.keys())):
        dtype = stored[not_floats[0]]["dtype"]
        raise ArtifactError(
            f"{checkpoint.url}: tensor {not_floats[0]} is stored as {dtype}; weights must be one of "
            f"{', '.join(WEIGHT_DTYPES)}"
        )
    if missing:
        raise ArtifactError(f"{checkpoint.url}: {named(missing)} missing, which the config's model has")
    if mismatched := sorted(problems["mismatched_keys"], key=lambda problem: problem[0]):
        name, shape, expected = mismatched[0]
        raise ArtifactError(
            f"{checkpoint.url}: tensor {name} is {tuple(shape)}, the config's model has {tuple(expected)}"
        )
    if unexpected := [name for name in problems["unexpected_keys"] if not OLD_BUFFERS.search(name)]:
        raise ArtifactError(f"{checkpoint.url}: {named(unexpected)} unexpected: the config's model has no such")


def quantization_of(config: PreTrainedConfig) -> str | None:
    """How the config says that the weights are quantized; None where they are not."""
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return None
    named = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
    return str(named)


def dequantized(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The tensors of the model that weights of 8 bits make with their scales; ArtifactError where one has no scale."""
    tensors = {}
    for name, entry in checkpoint.stored.items():
        if entry["dtype"] in FP8:
            checkpoint.scale_name(name)
            tensors[name] = entry | {"dtype": "BF16"}
        elif not name.endswith(SCALE_ENDINGS):
            tensors[name] = entry
    return tensors


def loading_problems(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    empty: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
) -> dict[str, set[Any]]:
    """What transformers itself finds wrong when it loads tensors of these names and shapes, none of which has memory.

    Its own renaming and tied weights are thereby taken into account.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # its report of the same problems
    transformers_logging.disable_progress_bar()
    try:
        with torch.device("meta"):
            loaded: Any = model_class.from_pretrained(
                None,  # there are files, but the state dict is given
                config=config,
                state_dict=empty,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except BUILDING_ERRORS as error:
        raise unbuildable(checkpoint, error) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    return loaded[1]


def causal_model_class(
    checkpoint: Checkpoint, config: PreTrainedConfig, *, trust_remote_code: bool
) -> type[PreTrainedModel]:
    """The class that `AutoModelForCausalLM` would take; the model's own where its code may be run."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        known: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return known
    try:
        with torch.device("meta"):
            return type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    except BUILDING_ERRORS as error:
        raise unbuildable(checkpoint, error) from error


def unbuildable(checkpoint: Checkpoint, error: Exception) -> ArtifactError:
    """What to raise where transformers cannot build a model from a checkpoint's config."""
    told = f"{type(error).__name__}: {first_line(error)}"
    return ArtifactError(f"{checkpoint.url}/config.json: no model can be built from it ({told})")


def named(tensors: Iterable[str]) -> str:
    """ "tensor a is", or "tensors a, b, c and 40 more are"."""
    names = sorted(tensors)
    if len(names) == 1:
        return f"tensor {names[0]} is"
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"tensors {', '.join(names[:MAX_NAMED])}{more} are"
