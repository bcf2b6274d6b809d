"""Write a variant as a standalone checkpoint: `lorc export VARIANT DIR [--plain]`."""

from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from transformers.utils import logging as transformers_logging

from jobs.generate import find_variant
from lorc_core.standalone.export import Exported, export_variant
from lorc_core.standalone.plain_export import PlainExported, export_plain


def export_checkpoint(reference: str, directory: Path, base: Path | None, workdir: str, *, plain: bool) -> int:
    """Export and say what was folded, or at which head size a plain model attends. Returns the exit code."""
    transformers_logging.disable_progress_bar()
    with TemporaryDirectory() as scratch:
        variant_dir, _ = find_variant(reference, workdir, Path(scratch))
        if plain:
            exported: Exported | PlainExported = export_plain(variant_dir, directory, base=base)
        else:
            exported = export_variant(variant_dir, directory, base=base)
    console = Console(soft_wrap=True)
    sizes = f"{exported.weight_bytes:,} bytes of weights, the base model has {exported.base_weight_bytes:,}"
    console.print(f"exported to {exported.directory}: {sizes}", highlight=False)
    for line in notes(exported):
        console.print(line, highlight=False)
    return 0


def notes(exported: Exported | PlainExported) -> list[str]:
    """What one should know of the export beside its size."""
    if isinstance(exported, Exported):
        kept = [f"{kind}: projections of full size stay, because {reason}" for kind, reason in exported.kept.items()]
        return [*kept, "load after `import lorc_core`, or with trust_remote_code=True; both need lorc installed"]
    size = exported.head_size
    padded = [
        f"{kind}: rank {rank}, padded to {size} with zeros, in the cache too"
        for kind, rank in exported.ranks.items()
        if rank < size
    ]
    return [f"attention and cache at head size {size}; load with trust_remote_code=True", *padded]
