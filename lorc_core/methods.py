"""The methods lorc knows: points on the axes of one formula, by name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from lorc_core.errors import ConfigError
from lorc_core.model.architecture import Architecture
from lorc_core.model.blocks import Partition, check_block, partition_of
from lorc_core.model.kinds import KINDS, Kind
from lorc_core.ranks.progressive import Progressive
from lorc_core.ranks.schedule import Schedule
from lorc_core.ranks.schedules import (
    Energy,
    ErrorBudget,
    Fisher,
    Sensitivity,
    Uniform,
    WaterLevel,
    schedule_from_dict,
)
from lorc_core.reprs import configuration_repr

Statistics = Literal["weights", "weights_with_gain", "calibration"]
Reader = Literal["none", "stacked", "interaction", "gradient"]
Space = Literal["pre_rope", "post_rope"]
Gqa = Literal["stack", "sum"]
Mean = Literal["known", "measured"]
BALANCED_READERS: tuple[Reader, ...] = ("interaction", "gradient")  # weigh errors; factors have a `down` of their own
CHOICES = {"statistics": Statistics, "reader": Reader, "space": Space, "gqa": Gqa, "mean": Mean}


@dataclass(frozen=True, repr=False)
class Axes:
    """How the projections of keys, or of values, are chosen.

    Attributes:
        statistics: Where second moments come from: `weights` (C = W W^T), `weights_with_gain` (the input norm folded
            in) or `calibration` (measured on text).
        reader: Whose error is minimised: that of the states (`none`), or that of what queries or W_o read of them
            (`interaction`). `stacked` is a compromise: an orthogonal projector that keeps what is large in the states
            or in their readers. `gradient`: the rise of the loss, by its own gradient with respect to the states.
        block: `joint`, `group(h)`, `head` or `frequency`; see `Partition`.
        space: Keys before or after the rotation; the same where there is none, and for values.
        gqa: Query heads that share a kv head are stacked, as is right, or summed, for comparison.
        mean: Where the mean of the states comes from, which every projection keeps: from biases (`known`), or from
            text (`measured`).
    """

    statistics: Statistics
    reader: Reader = "none"
    block: str = "joint"
    space: Space = "pre_rope"
    gqa: Gqa = "stack"
    mean: Mean = "known"

    def __post_init__(self) -> None:
        check_block(self.block)
        for name, choice in CHOICES.items():
            if getattr(self, name) not in get_args(choice):
                allowed = ", ".join(get_args(choice))
                raise ConfigError(f"{name} {getattr(self, name)!r} is not known; known are {allowed}")
        if self.block == "frequency" and self.space != "post_rope":
            raise ConfigError("block frequency needs space post_rope: its latents are cached rotated")
        if self.mean == "measured" and (self.statistics != "calibration" or self.space == "post_rope"):
            raise ConfigError("mean measured needs statistics calibration and space pre_rope")
        if self.reader == "gradient" and self.statistics != "calibration":
            raise ConfigError("reader gradient needs statistics calibration")

    def __repr__(self) -> str:
        return configuration_repr(self)

    def rotated(self, architecture: Architecture, layer_idx: int) -> bool:
        """Whether the cached states of a layer are rotated ones."""
        return self.space == "post_rope" and architecture.layer_rotary(layer_idx) is not None

    @property
    def is_balanced(self) -> bool:
        """Whether the reader weighs errors, so that `down` is no transpose of an orthogonal `up`."""
        return self.reader in BALANCED_READERS

    @property
    def measures_rotated(self) -> bool:
        """Whether keys are measured on text after the rotation, so at the positions of its windows alone."""
        return (self.statistics, self.space) == ("calibration", "post_rope") and self.block != "frequency"

    def measured_rotated(self, architecture: Architecture, layer_idx: int) -> bool:
        """Whether the moments of keys are those after the rotation; complex blocks commute with it and need none."""
        return self.rotated(architecture, layer_idx) and self.block != "frequency"

    @property
    def joins_rotated_heads(self) -> bool:
        """Whether blocks span heads whose states are measured rotated; calibration is dearer then."""
        return self.measures_rotated and self.block != "head"

    def has_mean(self, architecture: Architecture, layer_idx: int, kind: Kind) -> bool:
        """Whether the mean of the states is kept beside the factors.

        Where it is known, it is a bias: of the projection, or the shift of the norm before it. A norm or a rotation
        after the projection leaves no constant.
        """
        if self.mean == "measured":
            return True
        if kind == "keys" and (architecture.qk_norm or self.rotated(architecture, layer_idx)):
            return False
        return architecture.bias or (architecture.input_norm == "layer" and self.statistics != "weights")

    def partition(self, architecture: Architecture) -> Partition:
        """The blocks of each layer's keys or values.

        Raises:
            ConfigError: The model cannot have them; see `partition_of`.
        """
        rotary = architecture.rotaries[0] if architecture.rotary else None
        return partition_of(self.block, architecture.num_kv_heads, architecture.head_dim, rotary)


@dataclass(frozen=True, repr=False)
class Training:
    """How a method's projections are trained on from there: by distillation, with ranks drawn at random.

    Attributes:
        num_steps: At most.
        batch_size: Sequences a step.
        learning_rate: Of Adam, falling to zero along a cosine.
        min_kept_fraction: Ranks of a step are those of `energy` at a share drawn between this and `max_kept_fraction`.
        max_kept_fraction: See above.
        eval_every: Steps between looks at the held-out text.
        patience: Looks without a new best after which training stops.
        lora_rank: Of LoRA adapters on W_q, W_k, W_v and W_o, trained along through `peft`; 0 for none. They are kept
            in the variant and change what is cached, so they go with these factors alone (arXiv 2406.07056).
        seed: Of the draws.
    """

    num_steps: int = 400
    batch_size: int = 8
    learning_rate: float = 3e-3
    min_kept_fraction: float = 0.3
    max_kept_fraction: float = 0.8
    eval_every: int = 50
    patience: int = 3
    lora_rank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate}")
        for name in ("num_steps", "batch_size", "eval_every", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lora_rank < 0:
            raise ConfigError(f"lora_rank must be at least 0, got {self.lora_rank}")
        if not 0 < self.min_kept_fraction <= self.max_kept_fraction <= 1:
            raise ConfigError("min_kept_fraction and max_kept_fraction must be rising shares in (0, 1]")

    def __repr__(self) -> str:
        return configuration_repr(self)


@dataclass(frozen=True, repr=False)
class Method:
    """How one model's keys and values are projected.

    Attributes:
        name: In zoo files and tables.
        keys: Axes of the keys.
        values: Axes of the values; without rotation, so always `pre_rope`, and never by `frequency`.
        schedule: Its source's or, for methods of lorc's own, the best measured (docs/quality.md). `uniform` for
            `kq_svd` and `phasor_freq`: shares of energy, as both sources take them, move with a constant in all keys
            (docs/papers.md).
        source: Where it was published, and how far this is that.
        layers: Other methods for single layers, by layer.
        training: How its factors are trained; None where they are not.
    """

    name: str
    keys: Axes
    values: Axes
    schedule: Schedule
    source: str = field(repr=False)
    layers: Mapping[int, "Method"] = field(default_factory=dict, hash=False)
    training: Training | None = None

    def __post_init__(self) -> None:
        if self.training and "frequency" in [method.keys.block for method in self.methods]:
            raise ConfigError("trained projections need real blocks; those of block frequency are complex")
        if any(method.training for method in self.layers.values()):
            raise ConfigError("training is of all layers together, not of single ones")
        if self.values.space != "pre_rope" or self.values.block == "frequency":
            raise ConfigError("values are not rotated: their space is pre_rope, and their block not frequency")

    def __repr__(self) -> str:
        return configuration_repr(self)

    @property
    def methods(self) -> tuple["Method", ...]:
        """This method and those of single layers."""
        return (self, *self.layers.values())

    def at(self, layer_idx: int) -> "Method":
        """The method of one layer: its own, where it has one in `layers`."""
        return self.layers.get(layer_idx, self)

    def axes(self, layer_idx: int, kind: Kind) -> Axes:
        """How the keys, or the values, of one layer are projected."""
        method = self.at(layer_idx)
        return method.keys if kind == "keys" else method.values

    def check_schedule(self, schedule: Schedule) -> None:
        """Raise ConfigError where a schedule would measure another model than the variant's."""
        if schedule.probe is not None and self.training is not None and self.training.lora_rank:
            raise ConfigError(
                f"schedule {schedule.name} measures without the adapters of lora_rank; use one that measures nothing"
            )

    @property
    def joins_rotated_heads(self) -> bool:
        """See `Axes.joins_rotated_heads`; of any layer."""
        return any(method.keys.joins_rotated_heads for method in self.methods)

    @property
    def measures_rotated(self) -> bool:
        """See `Axes.measures_rotated`; of any layer."""
        return any(method.keys.measures_rotated for method in self.methods)

    @property
    def needs_calibration(self) -> bool:
        """Whether the method measures on text, or trains on it."""
        all_axes = [axes for method in self.methods for axes in (method.keys, method.values)]
        return self.training is not None or any(axes.statistics == "calibration" for axes in all_axes)

    @property
    def is_in_nats(self) -> bool:
        """Whether half of the energy that is cut is the rise of the loss: all readers are its gradient."""
        return all(axes.reader == "gradient" for method in self.methods for axes in (method.keys, method.values))

    @property
    def needs_gradients(self) -> bool:
        """Whether a reader of some layer is the gradient of the loss."""
        return any(axes.reader == "gradient" for method in self.methods for axes in (method.keys, method.values))

    def check(self, architecture: Architecture) -> None:
        """Refuse a model that cannot be compressed so.

        Args:
            architecture: Of the model.

        Raises:
            ConfigError: A layer does not exist or has no rotation, or blocks do not divide its heads.
        """
        for layer_idx in self.layers:
            if not 0 <= layer_idx < architecture.num_layers:
                raise ConfigError(
                    f"method {self.name}: layer {layer_idx} does not exist; layers are 0..{architecture.num_layers - 1}"
                )
        for method in self.methods:
            for kind in KINDS:
                try:
                    method.axes(-1, kind).partition(architecture)
                except ConfigError as error:
                    raise ConfigError(f"method {method.name}, {kind}: {error}") from error
        for layer_idx in range(architecture.num_layers):
            if self.axes(layer_idx, "keys").block == "frequency" and architecture.layer_rotary(layer_idx) is None:
                raise ConfigError(
                    f"method {self.name}, keys: block frequency: layer {layer_idx} has no rotary embedding; "
                    "give such layers another method"
                )

    def check_enough_tokens(self, architecture: Architecture, num_tokens: int) -> None:
        """Refuse a calibration text of which a measured moment could not have full rank.

        Args:
            architecture: Of the model.
            num_tokens: Of the text.

        Raises:
            ConfigError: A block has more channels than there are tokens.
        """
        for layer_idx in range(architecture.num_layers):
            for kind in KINDS:
                axes = self.axes(layer_idx, kind)
                width = axes.partition(architecture).width
                if axes.statistics == "calibration" and num_tokens < width:
                    raise ConfigError(
                        f"method {self.name}: {num_tokens} calibration tokens cannot fill a block of {width} {kind}; "
                        f"at least {width} are needed, ten times that is sensible"
                    )

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the inverse is `method_from_dict`."""
        layers = {str(layer_idx): method.to_dict() for layer_idx, method in self.layers.items()}
        return asdict(replace(self, layers={})) | {"layers": layers}


def method_from_dict(saved: Mapping[str, Any]) -> Method:
    """The inverse of `Method.to_dict`, also after JSON."""
    layers = {int(idx): method_from_dict(method) for idx, method in saved["layers"].items()}
    training = Training(**saved["training"]) if saved["training"] else None
    keys, values = (Axes(**saved[kind]) for kind in KINDS)
    schedule = schedule_from_dict(saved["schedule"])
    return Method(saved["name"], keys, values, schedule, saved["source"], layers, training)


def both(axes: Axes, **keys: Any) -> tuple[Axes, Axes]:
    """Axes of keys and of values: the same, but for those of the keys that are named."""
    return replace(axes, **keys), axes


PER_HEAD = Axes("calibration", block="head")

METHODS = {
    method.name: method
    for method in (
        Method(
            "lorc",
            *both(Axes("weights")),
            schedule=Progressive(),
            source="LoRC, arXiv 2410.03111: truncated SVD of W_k and W_v",
        ),
        Method(
            "lorc_q",
            *both(Axes("weights_with_gain", "interaction")),
            schedule=Energy(),
            source="lorc's own: no data, but the input norm's gain and the readers W_q and W_o (as KQ-SVD)",
        ),
        Method(
            "kq_joint",
            *both(Axes("calibration", "interaction")),
            schedule=Energy(spectrum="weights"),
            source="lorc's own: KQ-SVD's objective over all kv heads of a layer at once, before the rotation",
        ),
        Method(
            "fisher",
            *both(Axes("calibration", "gradient")),
            schedule=WaterLevel(),
            source="lorc's own: KQ-SVD's formula, arXiv 2512.05916, with the loss's metric: its Fisher information "
            "with respect to keys before the rotation and to values",
        ),
        Method(
            "k_svd",
            *both(PER_HEAD, space="post_rope"),
            schedule=Uniform(),
            source="SVD of each head's cached keys and values alone, the baseline of KQ-SVD, arXiv 2512.05916",
        ),
        Method(
            "eigen",
            keys=replace(PER_HEAD, reader="stacked", space="post_rope"),
            values=PER_HEAD,
            schedule=ErrorBudget(),
            source="Eigen Attention, arXiv 2408.05646: keys by the SVD of [K; Q], values by their own",
        ),
        Method(
            "kq_svd",
            *both(replace(PER_HEAD, reader="interaction"), space="post_rope"),
            schedule=Uniform(),
            source="KQ-SVD, arXiv 2512.05916: the best projection of K Q^T and of V W_o, per kv head",
        ),
        Method(
            "palu",
            *both(Axes("calibration", block="group(4)")),
            schedule=Fisher(),
            source="Palu, arXiv 2407.21118: whitened SVD of the weights of groups of 4 heads",
        ),
        Method(
            "zack",
            *both(replace(PER_HEAD, reader="stacked"), space="post_rope"),
            schedule=Sensitivity(),
            source="Zack, arXiv 2408.04107, from its abstract (the full text was not at hand): rotation by the SVD of "
            "[K; Q] and of [V; W_o] per head",
        ),
        Method(
            "kv_heads",
            *both(Axes("calibration", block="group(2)")),
            schedule=Uniform(),
            source="Effectively Compress KV Heads, arXiv 2406.07056 (SVD-a): at half of the cache two heads become one",
        ),
        Method(
            "phasor_freq",
            keys=Axes("calibration", "interaction", "frequency", "post_rope"),
            values=Axes("calibration", "interaction"),
            schedule=Uniform(),
            source="PhasorKV's freq layout: one complex block per rotary frequency; values joint",
        ),
        Method(
            "matryoshka",
            *both(Axes("calibration", "interaction")),
            schedule=Energy(spectrum="weights"),
            source="MatryoshkaKV, arXiv 2410.14731: orthogonal projections trained by distillation, here from kq_joint",
            training=Training(),
        ),
    )
}


def known_method(name: str) -> Method:
    """The preset of that name.

    Raises:
        ConfigError: There is none; the message has the known names.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is not known; known are {', '.join(sorted(METHODS))}")
    return METHODS[name]
