"""Run steps on Ray, each when its inputs are done: the one file that knows Ray.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

from lorc_core.errors import ConfigError
from pipeline.steps.outcome import Milestone, Outcome
from pipeline.steps.step import Need, Step
from pipeline.storage.store import Store

LOST_WORKER_RETRIES = 2

Record = Callable[[Outcome | Milestone], None]  # what a run tells is noted, and passed on to the screen


@dataclass(frozen=True)
class Batch:
    """Steps that run in one task."""

    steps: tuple[Step, ...]

    @property
    def need(self) -> Need | None:
        return self.steps[0].need


@contextmanager
def cluster(address: str | None, on_phase: Callable[[str], None] = lambda phase: None) -> Iterator[None]:
    """Connect to the Ray cluster at `address` or $RAY_ADDRESS, or start one for this process alone.

    A process that is connected already, a notebook say, stays so, and its workers keep what they have imported. Ray's
    telemetry is off, and a cluster started here asks for a token that no one else has.

    Raises:
        ConfigError: There is no cluster at the address, or the process is connected to another.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        check_reachable(address)
    if ray.is_initialized():
        connected = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", connected):
            raise ConfigError(f"this process is connected to the Ray cluster at {connected}, not to {address}")
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        # Ray asks for a token by itself and would write one to ~/.ray that later clusters trip over. Setting
        # RAY_AUTH_MODE here is too late: Ray has read it by now.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    check_reachable(address)
    on_phase("starting Ray" if address == "local" else f"connecting to Ray at {address}")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler would end the process past everyone
    try:
        yield
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Raise ConfigError where nothing listens; Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}") from error


@ray.remote(max_retries=LOST_WORKER_RETRIES, num_returns="streaming")
def remote_group(steps: Sequence[Step], store: Store, num_threads: int) -> Iterator[Outcome | Milestone]:
    """`run_group` in a worker."""
    import torch

    from pipeline.steps.work import run_group

    torch.set_num_threads(num_threads)  # a reused worker keeps its first thread count otherwise
    yield from run_group(steps, store)


def run_steps(
    steps: Sequence[Step],
    done: Mapping[str, Outcome],
    store: Store,
    address: str | None,
    on_outcome: Callable[[Outcome], None],
    on_progress: Callable[[Milestone], None] = lambda milestone: None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> list[Outcome]:
    """Run steps whose inputs are among them or done.

    Args:
        steps: To run, each once; their order is kept where nothing else decides.
        done: Outcomes by key of the steps that need not run.
        store: Where finished artifacts are and go.
        address: Of the Ray cluster; see `cluster`. None is started for steps that run in this process.
        on_outcome: Called in this process for every outcome as it comes.
        on_progress: Likewise, whenever a long step tells how far it has come.
        on_phase: Likewise, before what takes a while and is no step.

    Returns:
        One outcome per step, in their order.
    """
    outcomes = dict(done)
    batches = batches_of(steps)

    def record(told: Outcome | Milestone) -> None:
        if isinstance(told, Milestone):
            on_progress(told)
            return
        outcomes[told.key] = told
        on_outcome(told)

    with nullcontext() if all(batch.need is None for batch in batches) else cluster(address, on_phase):
        drive(batches, outcomes, record, store)
    return [outcomes[step.key] for step in steps]


def batches_of(steps: Sequence[Step]) -> list[Batch]:
    """Steps of the same group together, every other step alone, in their first steps' order."""
    groups: dict[str, list[Step]] = {}
    for step in steps:
        groups.setdefault(step.group, []).append(step)
    return [Batch(tuple(group)) for group in groups.values()]


def drive(batches: Sequence[Batch], outcomes: dict[str, Outcome], record: Record, store: Store) -> None:
    """Submit each batch when its inputs have outcomes, and record outcomes as they come, until none is left."""
    waiting = list(batches)
    running: dict[Any, list[Step]] = {}
    while waiting or running:
        ready = [batch for batch in waiting if is_ready(batch, outcomes)]
        waiting = [batch for batch in waiting if not is_ready(batch, outcomes)]
        for batch in ready:
            start(batch, running, outcomes, record, store)
        assert ready or running, "a step needs one that is neither done nor to be run"
        if running and not ready:
            receive(running, outcomes, record, store)


def start(
    batch: Batch,
    running: dict[Any, list[Step]],
    outcomes: dict[str, Outcome],
    record: Record,
    store: Store,
) -> None:
    """Submit a batch's steps, or run them here, or record why they cannot run."""
    runnable = skip_broken(batch, outcomes, record)
    if not runnable:
        return
    if batch.need is None:
        from pipeline.steps.work import run_group

        for told in run_group(runnable, store):
            record(told)
    elif lack := what_lacks(batch.need):
        fail(runnable, lack, record)
    else:
        running[submit(runnable, batch.need, store)] = runnable


def is_ready(batch: Batch, outcomes: dict[str, Outcome]) -> bool:
    return all(needed.key in outcomes for step in batch.steps for needed in step.input_steps())


def skip_broken(batch: Batch, outcomes: dict[str, Outcome], record: Record) -> list[Step]:
    """Record the steps whose inputs failed as skipped, naming the cause; return the others."""
    runnable = []
    for step in batch.steps:
        inputs = [outcomes[needed.key] for needed in step.input_steps()]
        broken = next((outcome for outcome in inputs if outcome.error is not None), None)
        if broken is not None:
            record(Outcome.skipped(step, broken))
        else:
            runnable.append(step)
    return runnable


def fail(steps: Sequence[Step], error: str, record: Record) -> None:
    for step in steps:
        record(Outcome.failed(step, error))


def what_lacks(need: Need) -> str | None:
    """Why the cluster can never run this, or None. Ray itself would wait for ever."""
    offered = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    asked = {"CPU": need.num_cpus, "GPU": need.num_gpus, "memory": need.memory_bytes}
    if any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in offered):
        return None
    nodes = "; ".join(", ".join(f"{name} {node.get(name, 0):g}" for name in asked) for node in offered)
    asks = ", ".join(f"{name} {amount:g}" for name, amount in asked.items() if amount)
    return f"no node of the cluster can give {asks}; its nodes have: {nodes}"


def submit(steps: Sequence[Step], need: Need, store: Store) -> Any:
    """Start the task; what comes back yields references to outcomes."""
    options = {"num_cpus": need.num_cpus, "num_gpus": need.num_gpus, "memory": need.memory_bytes}
    return remote_group.options(**options).remote(steps, store, max(1, math.floor(need.num_cpus)))


def receive(running: dict[Any, list[Step]], outcomes: dict[str, Outcome], record: Record, store: Store) -> None:
    """Wait for the next outcome of any running task and record it; drop tasks that have ended."""
    ready, _ = ray.wait(list(running), num_returns=1)
    stream: Any
    for stream in ready:
        try:
            told: Any = ray.get(next(stream))  # an outcome or a milestone
            record(told)
        except StopIteration:
            # A retried task's stream starts where the lost one's was read to, so its outcomes may be past the end.
            for step in running.pop(stream):
                if step.key not in outcomes:
                    untold = Outcome.failed(step, "its worker was lost and the retry told nothing of it")
                    record(Outcome.done(step, store) if store.is_done(step) else untold)
        except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
            lost = [step for step in running.pop(stream) if step.key not in outcomes]
            reason = f"its worker was lost {LOST_WORKER_RETRIES + 1} times: {str(error).splitlines()[0]}"
            fail(lost, reason, record)
