"""What steps leave for one another: windows, moments, layers, bases, probes and ranks, written and read back.

Tensors are safetensors, numbers that people look at are tables, and the rest is JSON. An artifact's directory and its
manifest are made in `store`; each file is held against it before it is read.
"""

import json
import operator
from collections.abc import Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file

from lorc_core.decomposition.factors import ENERGIES, Decomposition, LayerDecomposition
from lorc_core.decomposition.second_moments import LayerMoments
from lorc_core.manifest import checked_file
from lorc_core.model.blocks import Partition
from lorc_core.model.kinds import KINDS, KeysValues, Kind
from lorc_core.ranks.spectra import KindSpectrum, LayerSpectrum, Probes, RankSchedule
from pipeline.storage.tables import read_rows, write_table

if TYPE_CHECKING:  # these import what loads models, for which a run that finds all done need not wait
    from lorc_core.attention.adapters import AdapterTensors
    from lorc_core.measurement.training.latent_bases import Bases

WINDOWS_FILE = "windows.npy"
LAYER_FILE = "layer.safetensors"
DIGEST_FILE = "weights.json"
SPECTRA_FILE = "spectra.parquet"
BASES_FILE = "bases.safetensors"
ADAPTERS_FILE = "adapters.safetensors"
PROBES_FILE = "probes.json"
SCHEDULE_FILE = "schedule.json"


def save_windows(output: Path, windows: Int[np.ndarray, "windows tokens"]) -> None:
    np.save(output / WINDOWS_FILE, windows)


def load_windows(directories: Sequence[Path], num_windows: int | None = None) -> Int[np.ndarray, "windows tokens"]:
    """The windows of all texts, or the first so many of each."""
    return np.concatenate([np.load(checked_file(directory / WINDOWS_FILE))[:num_windows] for directory in directories])


def save_moments(output: Path, layers: Sequence[LayerMoments]) -> None:
    for layer_idx, layer in enumerate(layers):
        save_file(layer.tensors(), output / moments_file(layer_idx))


def load_moments(calibrated: Sequence[Path], layer_idx: int) -> LayerMoments | None:
    """One layer's moments over all shards; None without any."""
    shards = (LayerMoments.of_tensors(load_file(checked_file(path / moments_file(layer_idx)))) for path in calibrated)
    return reduce(operator.add, shards) if calibrated else None


def moments_file(layer_idx: int) -> str:
    return f"layer-{layer_idx}.safetensors"


def save_layer(output: Path, layer_idx: int, layer: LayerDecomposition) -> None:
    """Factors as safetensors, spectra as a table."""
    tensors: dict[str, torch.Tensor] = {}
    rows = []
    for kind, decomposed in layer.items():
        parts = {"up": decomposed.up, "own_down": decomposed.own_down, "mean": decomposed.mean}
        tensors |= {f"{kind}.{name}": part.float().contiguous() for name, part in parts.items() if part is not None}
        rows.append(
            {
                "layer": layer_idx,
                "kind": kind,
                **asdict(decomposed.partition),
                "rotated": decomposed.rotated,
                "log10_condition": decomposed.log10_condition,
                "singular_values": decomposed.singular_values.tolist(),
                **{name: getattr(decomposed, name).flatten().tolist() for name in ENERGIES},
            }
        )
    save_file(tensors, output / LAYER_FILE)
    write_table(output, "spectra", rows)


def save_digest(output: Path, content: str, layer_idx: int, digest: str) -> None:
    """Of the weights that a layer was decomposed from, with the identity that the model had."""
    (output / DIGEST_FILE).write_text(json.dumps({"content": content, "layer_idx": layer_idx, "digest": digest}))


def load_digest(directory: Path) -> str:
    digest: str = json.loads(checked_file(directory / DIGEST_FILE).read_text())["digest"]
    return digest


def known_digests(steps: Path, content: str) -> dict[int, str]:
    """By layer, the digests of a model's weights when they were decomposed, as far as the artifacts in `steps` tell."""
    kept = (json.loads(file.read_text()) for file in steps.glob(f"*/{DIGEST_FILE}"))
    return {digest["layer_idx"]: digest["digest"] for digest in kept if digest["content"] == content}


def load_layer(directory: Path) -> LayerDecomposition:
    """What `save_layer` wrote."""
    tensors = load_file(checked_file(directory / LAYER_FILE))
    kinds: dict[Kind, Decomposition] = {}
    for row in read_rows(directory, "spectra"):
        kind = row["kind"]
        kinds[kind] = Decomposition(
            partition=partition_of_row(row),
            up=tensors[f"{kind}.up"],
            own_down=tensors.get(f"{kind}.own_down"),
            mean=tensors.get(f"{kind}.mean"),
            rotated=row["rotated"],
            singular_values=torch.tensor(row["singular_values"], dtype=torch.float64),
            log10_condition=row["log10_condition"],
            **{
                name: torch.tensor(row[name], dtype=torch.float64).view(tensors[f"{kind}.up"].shape[:2])
                for name in ENERGIES
            },
        )
    return KeysValues(**kinds)


def load_spectra(layers: Sequence[Path]) -> list[LayerSpectrum]:
    """What the schedules read, from the tables `spectra` alone."""
    return [
        LayerSpectrum(
            *(
                KindSpectrum.of_flat(partition_of_row(row), row["log10_condition"], *(row[name] for name in ENERGIES))
                for row in read_rows(directory, "spectra")
            )
        )
        for directory in layers
    ]


def partition_of_row(row: dict[str, Any]) -> Partition:
    return Partition(row["block"], row["num_kv_heads"], row["head_dim"])


def save_bases(output: Path, bases: "Bases") -> None:
    tensors = {f"{layer_idx}.{kind}": basis for layer_idx, layer in enumerate(bases) for kind, basis in layer.items()}
    save_file(tensors, output / BASES_FILE)


def load_bases(trained: Path, layer_idx: int) -> KeysValues[torch.Tensor]:
    """The bases of one layer's latents."""
    bases = load_file(checked_file(trained / BASES_FILE))
    return KeysValues(*(bases[f"{layer_idx}.{kind}"] for kind in KINDS))


def save_adapters(output: Path, adapters: "AdapterTensors") -> None:
    save_file(adapters, output / ADAPTERS_FILE)


def load_adapters(trained: Path) -> "AdapterTensors":
    return load_file(checked_file(trained / ADAPTERS_FILE))


def save_probes(output: Path, probes: Probes) -> None:
    (output / PROBES_FILE).write_text(json.dumps(asdict(probes)))


def load_probes(directory: Path) -> Probes:
    return Probes.from_dict(json.loads(checked_file(directory / PROBES_FILE).read_text()))


def save_ranks(output: Path, ranks: RankSchedule) -> None:
    """As JSON to be read back, and as a table."""
    (output / SCHEDULE_FILE).write_text(json.dumps(asdict(ranks)))
    rows = [
        {
            "layer": idx,
            "kind": kind,
            "floats": layer.floats(kind),
            "width": ranks.kv_width,
            "block_ranks": list(layer[kind]),
            "note": ranks.note,
            "predicted_rise": ranks.predicted_rise,
        }
        for idx, layer in enumerate(ranks.layers)
        for kind in KINDS
    ]
    write_table(output, "ranks", rows)


def load_ranks(directory: Path) -> RankSchedule:
    return RankSchedule.from_dict(json.loads(checked_file(directory / SCHEDULE_FILE).read_text()))
