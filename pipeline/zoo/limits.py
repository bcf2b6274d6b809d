"""What one model cannot have of a zoo file: windows past its positions, too little text, too little memory."""

from lorc_core.errors import ConfigError
from pipeline.zoo.models import ResolvedModel
from pipeline.zoo.schema import Zoo
from pipeline.zoo.sections import GIB, ModelEntry
from pipeline.zoo.variants import VariantEntry


def check_window(section: str, window_tokens: int, model: ResolvedModel) -> None:
    if window_tokens > model.architecture.max_tokens:
        raise ConfigError(
            f"{section}.window_tokens is {window_tokens}, the model takes at most {model.architecture.max_tokens}"
        )


def check_variant(zoo: Zoo, model: ResolvedModel, entry: VariantEntry) -> None:
    """Raise ConfigError where this model cannot be compressed so, or not with this calibration text or memory."""
    entry.method.check(model.architecture)
    if zoo.calibration is None or not entry.needs_calibration:
        return
    check_window("calibration", zoo.calibration.window_tokens, model)
    if not zoo.calibration.allow_rank_deficient:
        try:
            entry.method.check_enough_tokens(model.architecture, zoo.calibration.num_tokens)
        except ConfigError as error:
            cure = "or set calibration.allow_rank_deficient to drop what the text never used"
            raise ConfigError(f"{error}; {cure}") from error
    if entry.schedule.probe not in ("fisher", "curves"):
        return
    declared, needed = declared_memory_bytes(zoo, model.entry), probe_memory_bytes(model, entry.schedule.probe)
    if declared and needed > declared:
        raise ConfigError(
            f"schedule {entry.schedule.name} runs the whole model and needs {needed / GIB:.1f} GiB, the zoo file "
            f"declares {declared / GIB:.1f} GiB for it"
        )


def declared_memory_bytes(zoo: Zoo, entry: ModelEntry) -> int:
    """What the zoo file says the model may use: its GPUs', else its tasks' memory; 0 if it does not say."""
    gpus = entry.resources.num_gpus
    if gpus and zoo.cluster.gpu_memory_gib is not None:
        return round(gpus * zoo.cluster.gpu_memory_gib * GIB)
    return entry.resources.memory_bytes


def probe_memory_bytes(model: ResolvedModel, probe: str) -> int:
    """The weights and, for Fisher information, gradients of W_k and W_v with their sums in float32."""
    element_bytes, shape = model.entry.element_bytes, model.architecture
    watched = 2 * shape.num_layers * shape.kv_width * shape.hidden_size if probe == "fisher" else 0
    return model.num_parameters * element_bytes + watched * (element_bytes + 4)
