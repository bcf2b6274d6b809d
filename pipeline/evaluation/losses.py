"""Evaluate a model, baseline or with a variant attached: loss on pinned tokens and bytes of the cache.

Windows are scored through the cache: the first half is prefilled, the second half reads it, so that what a variant
loses is seen where serving would see it.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import get_max_memory
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lorc_core.caches.memory import cache_bytes
from lorc_core.errors import ArtifactError, NumericsError, first_line
from lorc_core.model.stored.checkpoint import read_config
from lorc_core.model.stored.integrity import check_model
from pipeline.evaluation.device_map import device_plan
from pipeline.zoo.sections import ELEMENT_BYTES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ELEMENT_BYTES}


@contextmanager
def loaded_model(
    model_dir: Path, dtype: str, *, batch_size: int, window_tokens: int, trust_remote_code: bool = False
) -> Iterator[PreTrainedModel]:
    """A model in evaluation mode, spread over the devices this process may use, with room for what it will run.

    Args:
        model_dir: A transformers directory.
        dtype: Of its weights in memory.
        batch_size: Windows that it will be given at a time.
        window_tokens: Tokens of each.
        trust_remote_code: Whether code that comes with it may run.

    Raises:
        ArtifactError: transformers cannot load it, or it does not fit the devices.
    """
    transformers_logging.disable_progress_bar()
    check_model(model_dir, trust_remote_code=trust_remote_code)
    config = read_config(model_dir, trust_remote_code=trust_remote_code)
    try:
        plan = device_plan(config, DTYPES[dtype], get_max_memory(), batch_size=batch_size, window_tokens=window_tokens)
    except ArtifactError as error:
        raise ArtifactError(f"{model_dir}: {error}") from error
    with ExitStack() as opened:
        # What safetensors have as it is wanted is read from there; only other weights are written to the folder.
        folder = (
            opened.enter_context(tempfile.TemporaryDirectory(prefix="lorc-"))
            if "disk" in plan.devices.values()
            else None
        )
        try:
            model = AutoModelForCausalLM.from_pretrained(
                model_dir,
                dtype=DTYPES[dtype],
                device_map=plan.devices,
                offload_folder=folder,
                trust_remote_code=trust_remote_code,
            )
        except (OSError, ValueError, RuntimeError) as error:  # all that transformers raises for files it cannot use
            raise ArtifactError(f"{model_dir}: cannot be loaded: {first_line(error)}") from error
        try:
            yield model.eval()
        finally:
            del model
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def window_losses(
    model: PreTrainedModel, windows: Int[np.ndarray, "windows tokens"], batch_size: int
) -> tuple[Float[np.ndarray, " windows"], float]:
    """Mean loss of each window in nats per token, and the measured cache bytes per token.

    Args:
        model: With or without a variant attached.
        windows: Token ids; the first token of each window is not scored.
        batch_size: Windows at a time.

    Raises:
        NumericsError: A loss is NaN or infinite.
    """
    losses, held_bytes = losses_and_bytes(model, windows, batch_size)
    return losses, held_bytes / windows.size


@torch.inference_mode()
def losses_and_bytes(
    model: PreTrainedModel, windows: Int[np.ndarray, "windows tokens"], batch_size: int, first_window: int = 0
) -> tuple[Float[np.ndarray, " windows"], int]:
    """See `window_losses`; cache bytes of all batches together, which may be added to those of others.

    Args:
        model: With or without a variant attached.
        windows: Token ids.
        batch_size: Windows at a time.
        first_window: The number, among those of the text, of the first one.

    Raises:
        NumericsError: A loss is NaN or infinite.
    """
    losses, held_bytes = [], 0
    for batch in torch.from_numpy(windows).split(batch_size):
        ids = batch.to(model.device)
        logits, batch_bytes = logits_through_cache(model, ids)
        held_bytes += batch_bytes
        token_losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), ids[:, 1:].to(logits.device), reduction="none"
        )
        losses.append(token_losses.mean(dim=1).double().cpu().numpy())
    joined = np.concatenate(losses)
    if not np.isfinite(joined).all():
        window = first_window + int(np.argmin(np.isfinite(joined)))
        raise NumericsError(f"window {window}: the loss is NaN or infinite")
    return joined, held_bytes


def logits_through_cache(
    model: PreTrainedModel, ids: Int[Tensor, "b tokens"]
) -> tuple[Float[Tensor, "b tokens vocab"], int]:
    """Logits of all tokens, the second half computed from the first half's cache, and that cache's final bytes."""
    half = ids.shape[1] // 2
    cache = DynamicCache(config=model.config)
    first = model(input_ids=ids[:, :half], past_key_values=cache, use_cache=True).logits
    second = model(input_ids=ids[:, half:], past_key_values=cache, use_cache=True).logits
    return torch.cat([first, second], dim=1), cache_bytes(cache)
