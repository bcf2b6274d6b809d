"""What a person at a terminal, or in a notebook, sees of long work. Logs and pipes see nothing of it."""

import sys

from huggingface_hub.utils import is_notebook, tqdm  # tqdm's own, silent under $HF_HUB_DISABLE_PROGRESS_BARS=1


def on_screen() -> bool:
    """Whether somebody watches what is written to the standard error."""
    return sys.stderr.isatty() or is_notebook()


def progress_bar(description: str, total: int, unit: str) -> tqdm:
    """A bar that stays when it is done, to be used as a context manager.

    Args:
        description: What is done, for the left end.
        total: Calls of its `update` that are to come, or as many at most.
        unit: What one of them is.
    """
    return tqdm(desc=description, total=total, unit=f" {unit}", disable=not on_screen())
