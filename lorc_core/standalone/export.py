"""Write a variant as a checkpoint of its own, which transformers loads without the base model.

Down-projections are folded into the key and value projections where these are linear maps of their own and what is
cached is what they give; elsewhere the projections stay and the factors stand beside them. Tensors are read and
written one file at a time.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from lorc_core.attention.adapters import adapted_modules
from lorc_core.decomposition.factors import Factors
from lorc_core.errors import ConfigError
from lorc_core.loading import check_base, variant_and_base
from lorc_core.model.architecture import Architecture
from lorc_core.model.checkpoint import INDEX_FILE, SINGLE_FILE, TOKENIZER_FILES, Checkpoint
from lorc_core.model.kinds import KINDS, PROJECTION_OF, Kind
from lorc_core.standalone.classes import base_model_class, config_class, model_class
from lorc_core.standalone.folding import Folded, fold
from lorc_core.standalone.model import factors_name
from lorc_core.standalone.settings import PREFIX, SCHEMA_VERSION, SETTINGS, StoredFactors, auto_map, published_base
from lorc_core.variant import Variant

SHIM_FILE = "modeling_lorc.py"
# What is imported within `try` transformers does not look for itself: it would advise `pip install lorc_core`.
SHIM = '''"""The classes of this checkpoint, for trust_remote_code=True; their code is in lorc."""

try:
    from lorc_core.standalone import base_model_class, config_class, model_class
except ImportError as error:
    raise ImportError(
        "this checkpoint runs on lorc, which is on no package index: "
        "pip install a checkout of it, or a wheel built from one"
    ) from error

{AutoConfig} = config_class("{base_type}")
{AutoModel} = base_model_class("{base_type}")
{AutoModelForCausalLM} = model_class("{base_type}")
'''
# What stands beside the weights; never another checkpoint or pickles.
COPIED = (*TOKENIZER_FILES, "generation_config.json", "chat_template*", "LICENSE*", "USE_POLICY*")


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    `kept` says for each kind why projections of full size stayed, if any did.
    """

    directory: Path
    weight_bytes: int
    base_weight_bytes: int
    kept: dict[Kind, str]


def export_variant(variant_dir: Path | str, directory: Path | str, *, base: Path | str | None = None) -> Exported:
    """Write a standalone checkpoint of a variant: config, weights, tokenizer and a shim for `trust_remote_code`.

    Args:
        variant_dir: A variant's directory.
        directory: Made if absent; must be empty.
        base: Directory of the base model now, if not where it was when the variant was made.

    Raises:
        ConfigError: The directory is not empty, or the base model is not found.
        ArtifactError: The variant is unfinished or altered, or the base is another model.
    """
    plan = open_variant(variant_dir, Path(directory), base)
    with new_checkpoint(plan, Path(directory)) as scratch:
        weight_bytes = write_weights(plan.checkpoint, partial(exported_tensors, plan), scratch)
        write_config(plan, scratch)
    return Exported(Path(directory), weight_bytes, plan.checkpoint.file_bytes, plan.kept)


def open_variant(variant_dir: Path | str, directory: Path, base: Path | str | None) -> "Plan":
    """The variant and its base model, looked at before anything is written; see `export_variant`."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory}: exists and is not empty; name a new directory")
    variant, base_dir = variant_and_base(variant_dir, base)
    check_base(base_dir, variant)
    return Plan.of(variant, base_dir)


@contextmanager
def new_checkpoint(plan: "Plan", directory: Path) -> Iterator[Path]:
    """A place to write to, whose files move to `directory` with the tokenizer's when the block is done."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        yield Path(scratch)
        for pattern in COPIED:
            for file in plan.checkpoint.directory.glob(pattern):
                shutil.copy(file, scratch)
        directory.mkdir(exist_ok=True)
        for file in sorted(Path(scratch).iterdir(), key=lambda path: path.name == "config.json"):  # config last
            file.rename(directory / file.name)


@dataclass(frozen=True)
class Plan:
    """Which projections of a variant are folded, and which tensors of the base change.

    `places` and `adapters` are by the full names of the base's tensors: the layers and kinds that a weight or a folded
    bias belongs to, and the LoRA adapter that a weight takes in.
    """

    variant: Variant
    checkpoint: Checkpoint
    folded: frozenset[tuple[int, Kind]]
    kept: dict[Kind, str]
    places: dict[str, list[tuple[int, Kind]]]
    adapters: dict[str, str]

    @classmethod
    def of(cls, variant: Variant, base_dir: Path) -> "Plan":
        """Look at the model's facts and at the names of its tensors."""
        checkpoint, architecture = Checkpoint(base_dir), variant.architecture
        folded, kept = set(), {}
        places: dict[str, list[tuple[int, Kind]]] = {}
        for layer_idx, layer in enumerate(variant.factors):
            for kind, factors in layer.items():
                if factors is None:
                    continue
                names = [architecture.projection_name(layer_idx, PROJECTION_OF[kind], "weight")]
                if reason := reason_to_keep(architecture, kind, factors):
                    kept[kind] = reason
                else:
                    folded.add((layer_idx, kind))
                    if architecture.bias:
                        names.append(architecture.projection_name(layer_idx, PROJECTION_OF[kind], "bias"))
                for name in names:
                    places.setdefault(checkpoint.full_name(name), []).append((layer_idx, kind))
        paths = adapted_modules(architecture) if variant.adapters else {}
        adapters = {checkpoint.full_name(f"{path}.weight"): name for name, path in paths.items()}
        return cls(variant, checkpoint, frozenset(folded), kept, places, adapters)

    def bias_of(self, layer_idx: int, kind: Kind) -> str | None:
        """Full name of a projection's bias."""
        architecture = self.variant.architecture
        if not architecture.bias:
            return None
        return self.checkpoint.full_name(architecture.projection_name(layer_idx, PROJECTION_OF[kind], "bias"))

    def stored(self, layer_idx: int, kind: Kind) -> StoredFactors | None:
        """How one layer's factors stand in the checkpoint."""
        factors = self.variant.factors[layer_idx][kind]
        if factors is None:
            return None
        folded = (layer_idx, kind) in self.folded
        return StoredFactors(
            block=factors.partition.block,
            ranks=factors.ranks,
            rotated=factors.rotated,
            folded=folded,
            own_down=not folded and factors.own_down is not None,
            constant=factors.mean is not None,
        )


def reason_to_keep(architecture: Architecture, kind: Kind, factors: Factors) -> str | None:
    """Why a projection of full size must stay; None where the down-projection can be folded into it."""
    if factors.rotated:
        return "what is cached is rotated after the projection"
    if architecture.family.fused:
        return "one tensor holds the projections of queries, keys and values"
    if not architecture.family.interface:
        return "the attention module attends by itself, on whole states"
    if kind == "keys" and architecture.qk_norm:
        return "a norm stands between the projection and the cache"
    return None


def write_weights(checkpoint: Checkpoint, tensors_of: Callable[[str], dict[str, Tensor]], directory: Path) -> int:
    """One file for each of the base's, and an index where there are more; returns the tensors' bytes."""
    weight_map: dict[str, str] = {}
    total = 0
    for path, header in checkpoint.headers.items():
        tensors: dict[str, Tensor] = {}
        for full_name in header:
            tensors |= tensors_of(full_name)
        save_file(tensors, directory / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if not (directory / SINGLE_FILE).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total


def exported_tensors(plan: Plan, full_name: str) -> dict[str, Tensor]:
    """What one tensor of the base becomes: itself or a folded one, and the factors that read its states back."""
    tensor = adapted(plan, full_name, plan.checkpoint.read(full_name))
    found: dict[str, Tensor] = {}
    for layer_idx, kind in plan.places.get(full_name, ()):
        factors = plan.variant.factors[layer_idx][kind]
        assert factors is not None
        is_bias = full_name == plan.bias_of(layer_idx, kind)
        constant = None
        if (layer_idx, kind) in plan.folded:
            new = folded(plan, layer_idx, kind, factors)
            constant = new.constant
            tensor = new.weight if not is_bias or new.bias is None else new.bias
        if not is_bias:
            found |= factor_tensors(plan, layer_idx, kind, factors.to("cpu", tensor.dtype), constant)
    return found | {full_name: tensor.contiguous()}


def folded(plan: Plan, layer_idx: int, kind: Kind, factors: Factors) -> Folded:
    """A projection after its down-projection."""
    checkpoint, bias_name = plan.checkpoint, plan.bias_of(layer_idx, kind)
    weight_name = checkpoint.full_name(
        plan.variant.architecture.projection_name(layer_idx, PROJECTION_OF[kind], "weight")
    )
    weight = adapted(plan, weight_name, checkpoint.read(weight_name))
    return fold(weight, checkpoint.read(bias_name) if bias_name else None, factors)


def factor_tensors(
    plan: Plan, layer_idx: int, kind: Kind, factors: Factors, constant: Float[Tensor, " n"] | None
) -> dict[str, Tensor]:
    """The tensors of `FactorTensors`, by their full names."""
    architecture, stored = plan.variant.architecture, plan.stored(layer_idx, kind)
    assert stored is not None
    weight_name = architecture.projection_name(layer_idx, PROJECTION_OF[kind], "weight")
    prefix = plan.checkpoint.full_name(weight_name).removesuffix(weight_name)
    name = f"{prefix}{architecture.attention_module(layer_idx)}.{factors_name(kind)}"
    tensors = {"up": factors.up}
    if stored.own_down:
        tensors["own_down"] = factors.down
    if stored.constant:
        offset = constant if stored.folded else factors.offset()
        assert offset is not None
        tensors["constant"] = offset
    return {f"{name}.{part}": tensor.contiguous() for part, tensor in tensors.items()}


def adapted(plan: Plan, full_name: str, tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A weight with the variant's LoRA adapter added, if it has one."""
    name = plan.adapters.get(full_name)
    if name is None:
        return tensor
    down, up = (plan.variant.adapters[f"{name}.{part}"].double() for part in ("down", "up"))
    return (tensor.double() + up @ down).to(tensor.dtype)


def write_config(plan: Plan, directory: Path) -> None:
    """The base's config under the standalone model type, and the shim that names its classes."""
    variant, config = plan.variant, json.loads((plan.checkpoint.directory / "config.json").read_text())
    base_type = variant.architecture.model_type
    classes = {
        "AutoConfig": config_class(base_type),
        "AutoModel": base_model_class(base_type),
        "AutoModelForCausalLM": model_class(base_type),
    }
    layers = [
        {kind: asdict(stored) if (stored := plan.stored(idx, kind)) else None for kind in KINDS}
        for idx in range(len(variant.factors))
    ]
    settings = {
        "schema_version": SCHEMA_VERSION,
        "architecture": variant.architecture.to_dict(),
        "base": published_base(variant.base),
        "method": variant.method.name,
        "kept_fraction": variant.kept_fraction,
        "layers": layers,
    }
    config |= {
        "model_type": f"{PREFIX}{base_type}",
        "architectures": [classes["AutoModelForCausalLM"].__name__],
        "auto_map": auto_map(SHIM_FILE, **classes),
        SETTINGS: settings,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    names = {auto: its_class.__name__ for auto, its_class in classes.items()}
    (directory / SHIM_FILE).write_text(SHIM.format(base_type=base_type, **names))
