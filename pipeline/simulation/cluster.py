"""The cluster file of `lorc plan --cluster`: nodes, bandwidths, and the unit costs that hold there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.costs.units import Positive, UnitCosts, read_units
from pipeline.zoo.file import load_checked
from pipeline.zoo.sections import GIB, Dtype, Name, Strict, zoo_folder

PCIE_BYTES_PER_S = 25e9  # of 16 lanes of PCIe 4, 31.5 GB/s less what is lost; not measured here
MOST_NODES = 10_000


class NodeKind(Strict):
    """Nodes that are alike.

    `gpu_flops_per_s` takes the place of the unit costs' rates, by dtype; `gpu_copy_bytes_per_s` is how fast weights
    that do not fit the GPUs come to them.
    """

    name: Name
    count: Annotated[int, Field(ge=1, le=MOST_NODES)] = 1
    num_cpus: Annotated[float, Field(gt=0)]
    memory_gib: Annotated[float, Field(gt=0)]
    num_gpus: Annotated[int, Field(ge=0, le=MOST_NODES)] = 0
    gpu_memory_gib: Annotated[Annotated[float, Field(gt=0)] | None, Field(validate_default=True)] = None
    gpu_flops_per_s: dict[Dtype, Positive] = Field(default_factory=dict)
    gpu_copy_bytes_per_s: Positive = PCIE_BYTES_PER_S

    @field_validator("gpu_memory_gib")
    @classmethod
    def gpus_have_memory(cls, gpu_memory_gib: float | None, info: ValidationInfo) -> float | None:
        if info.data.get("num_gpus") and gpu_memory_gib is None:
            raise ValueError("num_gpus needs gpu_memory_gib")
        return gpu_memory_gib

    @property
    def memory_bytes(self) -> int:
        return round(self.memory_gib * GIB)

    @property
    def gpu_memory_bytes(self) -> int:
        """Of one GPU; 0 where there is none."""
        return round((self.gpu_memory_gib or 0) * GIB)


class DeclaredCluster(Strict):
    """A whole cluster file.

    `storage_bytes_per_s` is shared by all nodes, `network_bytes_per_s` by the tasks of one, and no task reads faster
    than `disk_bytes_per_s` or, without it, than was measured. `units` is a file that `lorc bench units` wrote, relative
    to the cluster file, or what such a file says.
    """

    nodes: Annotated[tuple[NodeKind, ...], Field(min_length=1)]
    units: UnitCosts
    storage_bytes_per_s: Positive | None = None
    network_bytes_per_s: Positive | None = None
    disk_bytes_per_s: Positive | None = None

    @field_validator("units", mode="before")
    @classmethod
    def read_file(cls, units: Any, info: ValidationInfo) -> Any:
        return read_units(zoo_folder(info) / units) if isinstance(units, str | Path) else units

    @model_validator(mode="after")
    def names_are_used_once(self) -> "DeclaredCluster":
        names = [node.name for node in self.nodes]
        for name in sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"nodes: the name {name!r} is used twice")
        return self

    def units_of(self, kind: NodeKind) -> UnitCosts:
        """The unit costs on such a node."""
        rates = self.units.gpu_flops_per_s | kind.gpu_flops_per_s
        return self.units.model_copy(update={"gpu_flops_per_s": rates})

    @property
    def bandwidths(self) -> "Bandwidths":
        own = self.disk_bytes_per_s or self.units.read_bytes_per_s
        return Bandwidths(own, self.network_bytes_per_s, self.storage_bytes_per_s)


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second of model files: of one task, of one node, of all; None where there is no other limit."""

    task: float
    node: float | None = None
    storage: float | None = None

    def share(self, readers_on_node: int, readers: int) -> float:
        """Of one task that begins to read, itself counted."""
        limits = [self.task]
        limits += [self.node / readers_on_node] if self.node else []
        limits += [self.storage / readers] if self.storage else []
        return min(limits)


def load_cluster(path: Path) -> DeclaredCluster:
    """Read and check a cluster file.

    Raises:
        ConfigError: It cannot be read, or fields are wrong; one line for each thing that is.
    """
    return load_checked(path, DeclaredCluster, "cluster file")
