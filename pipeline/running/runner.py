"""Run steps on Ray, each when its inputs are done.

A step that fails is an outcome like any other: steps that need it are skipped, all others go on. What a step does, and
what of it may fail, is in `work`.
"""

import logging
import math
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import grpc
import ray
from ray._private.state import state
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

from lorc_core.errors import ConfigError, first_line
from pipeline.running.replicas import Replicas, can_spread, gpus_of
from pipeline.steps.outcome import Listener, Milestone, Outcome, Started
from pipeline.steps.step import Need, Step
from pipeline.storage.store import Store
from pipeline.zoo.sections import Cluster

ANSWER_S = 10  # that a Ray cluster may take to answer
LOOK_S = 30  # after which a run that hears nothing looks whether its steps can still run


@dataclass(frozen=True)
class Batch:
    """Steps that run in one task."""

    steps: tuple[Step, ...]

    @property
    def need(self) -> Need | None:
        return self.steps[0].need


@contextmanager
def connected(address: str | None, listener: Listener) -> Iterator[None]:
    """Connect to the Ray cluster at `address` or $RAY_ADDRESS, or start one for this process alone.

    A process that is connected already, a notebook say, stays so, and its workers keep what they have imported. Ray's
    telemetry is off, and a cluster started here asks for a token that no one else has.

    Raises:
        ConfigError: There is no cluster at the address, or the process is connected to another.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        current = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", current):
            raise ConfigError(f"this process is connected to the Ray cluster at {current}, not to {address}")
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        # Ray asks for a token by itself and would write one to ~/.ray that later clusters trip over. Setting
        # RAY_AUTH_MODE here is too late: Ray has read it by now.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    listener.phase("starting Ray" if address == "local" else f"connecting to Ray at {address}")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster at {address}: {first_line(error)}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler would end the process past everyone
    try:
        yield
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Raise ConfigError where nothing listens, or what does is not Ray; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}") from error
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return  # a channel without its certificates is never ready
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError:
            raise ConfigError(
                f"no Ray cluster at {address}: something listens there and did not answer as Ray does for {ANSWER_S} s"
            ) from None


@ray.remote(num_returns="streaming")
def remote_group(steps: Sequence[Step], store: Store, num_threads: int) -> Iterator[Started | Milestone | Outcome]:
    """`run_group` in a worker."""
    import torch

    from pipeline.running.work import run_group

    torch.set_num_threads(num_threads)  # a reused worker keeps its first thread count otherwise
    yield from run_group(steps, store)


def run_steps(
    steps: Sequence[Step], done: Mapping[str, Outcome], store: Store, cluster: Cluster, listener: Listener
) -> list[Outcome]:
    """Run steps whose inputs are among them or done.

    Args:
        steps: To run, each once; their order is kept where nothing else decides.
        done: Outcomes by key of the steps that need not run.
        store: Where finished artifacts are and go.
        cluster: Of the zoo file. No Ray is started for steps that all run in this process.
        listener: Told in this process.

    Returns:
        One outcome per step, in their order.

    Raises:
        ConfigError: There is no Ray cluster at the address.
    """
    batches = batches_of(steps)
    work = Work(store, listener, cluster.lost_worker_retries, dict(done), batches)
    if address := cluster.address or os.environ.get("RAY_ADDRESS"):
        check_reachable(address)  # where nothing is left for Ray to do, too
    with nullcontext() if all(batch.need is None for batch in batches) else connected(cluster.address, listener):
        work.finish()
    return [work.outcomes[step.key] for step in steps]


def batches_of(steps: Sequence[Step]) -> list[Batch]:
    """Steps of the same group together, every other step alone, in their first steps' order."""
    groups: dict[str, list[Step]] = {}
    for step in steps:
        groups.setdefault(step.group, []).append(step)
    return [Batch(tuple(group)) for group in groups.values()]


@dataclass
class Work:
    """Batches on their way: which wait for inputs, which run on Ray, and what came of those that ended."""

    store: Store
    listener: Listener
    lost_worker_retries: int
    outcomes: dict[str, Outcome]
    waiting: list[Batch]
    running: dict[Any, list[Step]] = field(default_factory=dict)  # by their task's stream of outcomes
    replicas: Replicas = field(default_factory=Replicas)
    blocked: Outcome | None = None  # of a step in this process, which what may pass was in the way of

    def finish(self) -> None:
        """Submit each batch when its inputs have outcomes, and record outcomes as they come, until none is left."""
        self.refuse_impossible()
        while self.waiting or self.running:
            ready = [batch for batch in self.waiting if self.is_ready(batch)]
            self.waiting = [batch for batch in self.waiting if not self.is_ready(batch)]
            for batch in self.spread(ready):
                self.start(batch)
            assert ready or self.running, "a step needs one that is neither done nor to be run"
            if self.running and not ready:
                self.receive()

    def spread(self, ready: list[Batch]) -> list[Batch]:
        """The same batches, or shares of them where GPUs are free; what joins the shares waits for them."""
        if not any(can_spread(batch.steps) for batch in ready):
            return ready
        whole = ray.cluster_resources()
        # Ray tells of tasks that have their GPUs, and not of those that were submitted a moment ago.
        unclaimed = whole.get("GPU", 0) - sum(gpus_of(steps) for steps in self.running.values())
        free_gpus = min(ray.available_resources().get("GPU", 0), unclaimed)
        batches = batches_of(self.replicas.spread([batch.steps for batch in ready], free_gpus, whole))
        self.waiting += [batch for batch in batches if not self.is_ready(batch)]
        return [batch for batch in batches if self.is_ready(batch)]

    def refuse_impossible(self) -> None:
        """Record the steps that the cluster can never run as failed, before anything runs: a night is long."""
        needs = {batch.need for batch in self.waiting if batch.need is not None}
        lacks = {need: what_lacks(need) for need in needs}
        refused = [batch for batch in self.waiting if batch.need is not None and lacks[batch.need] is not None]
        self.waiting = [batch for batch in self.waiting if batch not in refused]
        for batch in refused:
            assert batch.need is not None
            self.fail(batch.steps, lacks[batch.need] or "")

    def is_ready(self, batch: Batch) -> bool:
        return all(needed.key in self.outcomes for step in batch.steps for needed in step.input_steps())

    def start(self, batch: Batch) -> None:
        """Submit a batch's steps, or run them here, or record why they cannot run."""
        runnable = self.skip_broken(batch)
        if not runnable:
            return
        if batch.need is None:
            self.run_here(runnable)
        elif lack := what_lacks(batch.need):
            self.fail(runnable, lack)
        else:
            self.running[self.submit(runnable, batch.need)] = runnable

    def run_here(self, steps: Sequence[Step]) -> None:
        """Run steps in this process; once one was blocked, each other would wait as long for the same."""
        if self.blocked is not None:
            self.fail(steps, self.blocked.error or "", self.blocked.obstacle)
            return
        from pipeline.running.work import run_group

        for told in run_group(steps, self.store):
            self.record(told)
            if isinstance(told, Outcome) and told.obstacle is not None:
                self.blocked = told

    def skip_broken(self, batch: Batch) -> list[Step]:
        """Record the steps whose inputs failed as skipped, naming the cause; return the others."""
        runnable = []
        for step in batch.steps:
            inputs = [self.outcomes[needed.key] for needed in step.input_steps()]
            broken = next((outcome for outcome in inputs if outcome.error is not None), None)
            if broken is not None:
                self.record(Outcome.skipped(step, broken))
            else:
                runnable.append(step)
        return runnable

    def submit(self, steps: Sequence[Step], need: Need) -> Any:
        """Start the task; what comes back yields references to outcomes."""
        task = remote_group.options(
            num_cpus=need.num_cpus,
            num_gpus=need.num_gpus,
            memory=need.memory_bytes,
            max_retries=self.lost_worker_retries,
        )
        return task.remote(steps, self.store, max(1, math.floor(need.num_cpus)))

    def receive(self) -> None:
        """Wait for the next outcome of any running task and record it; drop tasks that have ended."""
        ready, _ = ray.wait(list(self.running), num_returns=1, timeout=LOOK_S)
        if not ready:
            self.fail_impossible()
        stream: Any
        for stream in ready:
            try:
                told: Any = ray.get(next(stream))
                self.record(told)
            except StopIteration:
                # A retried task's stream starts where the lost one's was read to: its outcomes may be past the end.
                for step in self.running.pop(stream):
                    if step.key not in self.outcomes:
                        log = self.store.log(step.key)
                        where = f" (trace in {log})" if log.is_file() else ""
                        untold = Outcome.failed(step, f"its worker was lost and the retry told nothing of it{where}")
                        self.record(Outcome.done(step, self.store) if self.store.is_done(step) else untold)
            except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
                lost = [step for step in self.running.pop(stream) if step.key not in self.outcomes]
                reason = first_line(error)
                self.fail(lost, f"its worker was lost {self.lost_worker_retries + 1} times: {reason}")

    def fail_impossible(self) -> None:
        """Record the steps as failed that no node can run any more: Ray would run them again, and wait for ever."""
        for stream, steps in list(self.running.items()):
            assert steps[0].need is not None
            if lack := what_lacks(steps[0].need):
                ray.cancel(stream, force=True)
                lost = [step for step in self.running.pop(stream) if step.key not in self.outcomes]
                self.fail(lost, f"the node that ran it was lost, and {lack}")

    def fail(self, steps: Sequence[Step], error: str, obstacle: str | None = None) -> None:
        for step in steps:
            self.record(Outcome.failed(step, error, obstacle=obstacle))

    def record(self, told: Started | Milestone | Outcome) -> None:
        """Note an outcome; tell what came."""
        if isinstance(told, Outcome):
            self.outcomes[told.key] = told
        match self.replicas.told(told):
            case Started() as started:
                self.listener.start(started)
            case Milestone() as reached:
                self.listener.advance(reached)
            case Outcome() as outcome:
                self.outcomes[outcome.key] = outcome
                self.listener.record(outcome)


def what_lacks(need: Need) -> str | None:
    """Why the cluster can never run this, or None. Ray itself would wait for ever."""
    offered = [*(node["Resources"] for node in ray.nodes() if node["Alive"]), *nodes_to_come()]
    asked = {"CPU": need.num_cpus, "GPU": need.num_gpus, "memory": need.memory_bytes}
    if any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in offered):
        return None
    nodes = "; ".join(dict.fromkeys(", ".join(f"{name} {node.get(name, 0):g}" for name in asked) for node in offered))
    asks = ", ".join(f"{name} {amount:g}" for name, amount in asked.items() if amount)
    return f"no node of the cluster can give {asks}; its nodes have: {nodes}"


def nodes_to_come() -> list[dict[str, float]]:
    """The resources of each kind of node that an autoscaler would add; empty where there is none.

    Ray keeps what its autoscaler reported, and has no public way to ask for it.
    """
    config = state.get_cluster_config()
    groups = config.node_group_configs if config is not None else ()
    return [
        {name: math.inf if amount < 0 else amount for name, amount in group.resources.items()}
        for group in groups
        if group.max_count != 0
    ]
