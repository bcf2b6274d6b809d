"""Write a variant as a checkpoint of its own, which transformers loads without the base model.

Down-projections are folded into the key and value projections where these are linear maps of their own and what is
cached is what they give; elsewhere the projections stay and the factors stand beside them. `plan` decides which.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from lorc_core.decomposition.factors import Factors
from lorc_core.model.kinds import KINDS, PROJECTION_OF, Kind, LayerKind
from lorc_core.standalone.classes import base_model_class, config_class, model_class
from lorc_core.standalone.folding import Folded, fold
from lorc_core.standalone.model import factors_name
from lorc_core.standalone.plan import Plan, open_variant
from lorc_core.standalone.settings import PREFIX, SCHEMA_VERSION, SETTINGS, auto_map, published_base
from lorc_core.standalone.writing import new_checkpoint, write_config, write_weights

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


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        directory: Of the checkpoint.
        weight_bytes: Of its tensors.
        base_weight_bytes: Of the base's files.
        kept: For each kind, why projections of full size stayed, if any did.
    """

    directory: Path
    weight_bytes: int
    base_weight_bytes: int
    kept: dict[Kind, str]


def export_variant(variant_dir: Path | str, directory: Path | str, *, base: Path | str | None = None) -> Exported:
    """Write a standalone checkpoint of a variant: config, weights, tokenizer and a shim for `trust_remote_code`.

    transformers loads it after `import lorc_core`, or with `trust_remote_code=True`; lorc must be installed for both.

    Args:
        variant_dir: A variant's directory.
        directory: Made if absent; must be empty.
        base: Directory of the base model now, if not where it was when the variant was made.

    Returns:
        What was written.

    Raises:
        ConfigError: The directory is not empty, or the base model is not found.
        ArtifactError: The variant is unfinished or altered, or the base is another model.
    """
    plan = open_variant(variant_dir, Path(directory), base)
    with new_checkpoint(plan.checkpoint, Path(directory)) as scratch:
        weight_bytes = write_weights(plan.checkpoint, partial(exported_tensors, plan), scratch)
        write_settings(plan, scratch)
    return Exported(Path(directory), weight_bytes, plan.checkpoint.file_bytes, plan.kept)


def exported_tensors(plan: Plan, full_name: str) -> dict[str, Tensor]:
    """What one tensor of the base becomes: itself or a folded one, and the factors that read its states back.

    Args:
        plan: Of the export.
        full_name: Of the tensor.
    """
    tensor = plan.read(full_name)
    factors_beside: dict[str, Tensor] = {}
    for place in plan.places.get(full_name, ()):
        is_bias = full_name == plan.bias_name(place)
        constant = None
        if place in plan.folded:
            new = folded_projection(plan, place)
            constant = new.constant
            tensor = new.weight if not is_bias or new.bias is None else new.bias
        if not is_bias:  # the factors are written once, with the weight
            factors = plan.factors(place).to("cpu", tensor.dtype)
            factors_beside |= factor_tensors(plan, place, factors, constant)
    return factors_beside | {full_name: tensor.contiguous()}


def folded_projection(plan: Plan, place: LayerKind) -> Folded:
    """A projection after its down-projection."""
    weight, bias_name = plan.read(plan.weight_name(place)), plan.bias_name(place)
    return fold(weight, plan.checkpoint.read(bias_name) if bias_name else None, plan.factors(place))


def factor_tensors(
    plan: Plan, place: LayerKind, factors: Factors, constant: Float[Tensor, " n"] | None
) -> dict[str, Tensor]:
    """The tensors of `model.FactorTensors`, by their full names.

    Args:
        plan: Of the export.
        place: Whose factors they are.
        factors: In the precision of the checkpoint.
        constant: What rebuilt states lack where the projection is folded.
    """
    architecture, stored = plan.variant.architecture, plan.stored(place)
    assert stored is not None
    weight_name = architecture.projection_name(place.layer_idx, PROJECTION_OF[place.kind], "weight")
    prefix = plan.weight_name(place).removesuffix(weight_name)
    name = f"{prefix}{architecture.attention_module(place.layer_idx)}.{factors_name(place.kind)}"
    tensors = {"up": factors.up}
    if stored.own_down:
        tensors["own_down"] = factors.down
    if stored.constant:
        offset = constant if stored.folded else factors.offset()
        assert offset is not None
        tensors["constant"] = offset
    return {f"{name}.{part}": tensor.contiguous() for part, tensor in tensors.items()}


def write_settings(plan: Plan, directory: Path) -> None:
    """The base's config under the standalone model type, and the shim that names its classes.

    Args:
        plan: Of the export.
        directory: To write to.
    """
    variant, base_type = plan.variant, plan.variant.architecture.model_type
    classes = {
        "AutoConfig": config_class(base_type),
        "AutoModel": base_model_class(base_type),
        "AutoModelForCausalLM": model_class(base_type),
    }
    layers = [
        {kind: asdict(stored) if (stored := plan.stored(LayerKind(idx, kind))) else None for kind in KINDS}
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
    changes = {
        "model_type": f"{PREFIX}{base_type}",
        "architectures": [classes["AutoModelForCausalLM"].__name__],
        "auto_map": auto_map(SHIM_FILE, **classes),
        SETTINGS: settings,
    }
    write_config(plan.checkpoint, changes, directory)
    names = {auto: its_class.__name__ for auto, its_class in classes.items()}
    (directory / SHIM_FILE).write_text(SHIM.format(base_type=base_type, **names))
