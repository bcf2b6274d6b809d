"""What the nodes of a Ray cluster offer, those that an autoscaler would add included."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import state

from pipeline.steps.step import Need

FRESH_S = 1  # for which what was asked of Ray counts as so


@dataclass(frozen=True)
class NodeKind:
    """Nodes that are alike: what one offers, by Ray's names, and how many there are or may be."""

    resources: Mapping[str, float]
    count: float = 1


class Nodes:
    """The nodes of the cluster that this process is connected to, asked for again when a second has passed."""

    def __init__(self) -> None:
        self.asked_at = -math.inf
        self.known: list[NodeKind] = []

    @property
    def kinds(self) -> list[NodeKind]:
        if time.monotonic() - self.asked_at > FRESH_S:
            self.known = [NodeKind(node["Resources"]) for node in ray.nodes() if node["Alive"]] + nodes_to_come()
            self.asked_at = time.monotonic()
        return self.known

    def capacity(self, name: str) -> float:
        """Of all nodes together: "CPU" or "GPU"."""
        return sum(kind.resources.get(name, 0) * kind.count for kind in self.kinds if kind.resources.get(name, 0))

    def lack(self, need: Need) -> str | None:
        """Why no node can ever run this, or None. Ray itself would wait for ever."""
        asked = {"CPU": need.num_cpus, "GPU": need.num_gpus, "memory": need.memory_bytes}
        offered = [kind.resources for kind in self.kinds if kind.count]
        if any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in offered):
            return None
        nodes = "; ".join(
            dict.fromkeys(", ".join(f"{name} {node.get(name, 0):g}" for name in asked) for node in offered)
        )
        asks = ", ".join(f"{name} {amount:g}" for name, amount in asked.items() if amount)
        return f"no node of the cluster can give {asks}; its nodes have: {nodes}"


def nodes_to_come() -> list[NodeKind]:
    """The nodes that an autoscaler would add; empty where there is none.

    Ray keeps what its autoscaler reported, and has no public way to ask for it.
    """
    config = state.get_cluster_config()
    groups: Sequence = config.node_group_configs if config is not None else ()
    return [
        NodeKind(
            {name: math.inf if amount < 0 else amount for name, amount in group.resources.items()},
            math.inf if group.max_count < 0 else group.max_count,
        )
        for group in groups
    ]
