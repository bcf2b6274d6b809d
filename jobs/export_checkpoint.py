"""Write a variant as a standalone checkpoint: `lorc export VARIANT DIR`."""

from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from transformers.utils import logging as transformers_logging

from jobs.generate import find_variant
from lorc_core.errors import ArtifactError, ConfigError
from lorc_core.export import export_variant


def export_checkpoint(reference: str, directory: Path, base: Path | None, workdir: Path) -> int:
    """Export and say what was folded. Returns the exit code."""
    transformers_logging.disable_progress_bar()
    with TemporaryDirectory() as scratch:
        variant_dir, _ = find_variant(reference, workdir, Path(scratch))
        try:
            exported = export_variant(variant_dir, directory, base=base)
        except ArtifactError as error:  # what was named on the command line cannot be exported
            raise ConfigError(str(error)) from error
    console = Console(soft_wrap=True)
    sizes = f"{exported.weight_bytes:,} bytes of weights, the base model has {exported.base_weight_bytes:,}"
    console.print(f"exported to {exported.directory}: {sizes}", highlight=False)
    for kind, reason in exported.kept.items():
        console.print(f"{kind}: projections of full size stay, because {reason}", highlight=False)
    return 0
