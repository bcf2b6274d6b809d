"""Run steps on Ray, each when its inputs are done.

A step that fails is an outcome like any other: steps that need it are skipped, all others go on. What a step does, and
what of it may fail, is in `work`.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

from lorc_core.errors import first_line
from pipeline.costs.order import remaining_seconds
from pipeline.costs.seconds import seconds_of
from pipeline.running.connection import check_reachable, connected
from pipeline.running.nodes import Nodes
from pipeline.running.replicas import Replicas, can_spread, gpus_of
from pipeline.running.waiting import Batch, Room, WaitingBatches, batches_of, needs_of_pending, next_on_ray
from pipeline.steps.outcome import Listener, Milestone, Outcome, Started
from pipeline.steps.step import Step
from pipeline.storage.store import Store
from pipeline.zoo.sections import Cluster

LOOK_S = 30  # after which a run that hears nothing looks whether its steps can still run


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
    if address := cluster.address or os.environ.get("RAY_ADDRESS"):
        check_reachable(address)  # where nothing is left for Ray to do, too
    with nullcontext() if all(step.need is None for step in steps) else connected(cluster.address, listener):
        work = Work(steps, done, store, cluster, listener)
        work.finish()
    return [work.outcomes[step.key] for step in steps]


class Work:
    """Steps on their way: which wait, which run on Ray, and what came of those that ended.

    Args:
        steps: To run.
        done: Outcomes of the steps that need not.
        store: Where artifacts go.
        cluster: Of the zoo file.
        listener: Is told.
    """

    def __init__(
        self, steps: Sequence[Step], done: Mapping[str, Outcome], store: Store, cluster: Cluster, listener: Listener
    ) -> None:
        self.store, self.cluster, self.listener = store, cluster, listener
        self.outcomes = dict(done)
        self.waiting = WaitingBatches(batches_of(steps), done, remaining_seconds(steps, seconds_of))
        self.running: dict[Any, Batch] = {}  # by their task's stream of outcomes
        self.begun: set[str] = set()  # keys of steps that a worker has begun
        self.left = Counter(step.model for step in steps)  # of each model, steps that have not ended
        self.in_flight: set[str] = set()  # models of which steps were given to Ray, and not all have ended
        self.blocked: Outcome | None = None  # of a step in this process, which what may pass was in the way of
        self.nodes = Nodes()
        self.replicas = Replicas()

    def finish(self) -> None:
        """Run each batch when its inputs have outcomes, and record outcomes as they come, until none is left."""
        for place in list(self.waiting.ready):
            self.skip_broken(place)
        self.refuse_impossible()
        while self.waiting or self.running:
            chosen = self.waiting.take(self.next_on_ray())
            for batch in self.spread(chosen):
                self.submit(batch)
            here = [place for place in self.waiting.ready if self.waiting.batches[place].need is None][:1]
            for batch in self.waiting.take(here):
                self.run_here(batch.steps)
            assert chosen or here or self.running or not self.waiting, (
                "a step needs one that is neither done nor to be run"
            )
            if self.running:
                self.receive(0 if here else LOOK_S)

    def refuse_impossible(self) -> None:
        """Record the steps that the cluster can never run as failed, before anything runs: a night is long."""
        needs = {batch.need for batch in self.waiting.batches.values() if batch.need is not None}
        lacks = {need: lack for need in needs if (lack := self.nodes.lack(need)) is not None}
        for place in [place for place, batch in self.waiting.batches.items() if batch.need in lacks]:
            if place in self.waiting.batches:  # what an earlier one broke is skipped
                (batch,) = self.waiting.take([place])
                assert batch.need is not None
                self.fail(batch.steps, lacks[batch.need])

    def next_on_ray(self) -> list[int]:
        """Places of the batches to give to Ray now; where all that is ready runs here there may be no Ray to ask."""
        if all(self.waiting.batches[place].need is None for place in self.waiting.ready):
            return []
        room = Room(self.nodes.capacity("CPU"), self.nodes.capacity("GPU"), self.cluster.models_in_flight)
        return next_on_ray(self.waiting, self.running.values(), self.begun, self.in_flight, room)

    def spread(self, batches: list[Batch]) -> list[Batch]:
        """The same batches, or shares of evaluations where GPUs are free; what joins the shares waits for them."""
        pending = needs_of_pending((*batches, *self.running.values()), self.begun)
        gather = any(need.num_gpus > 1 for need in pending)
        if gather or not any(can_spread(batch.steps) for batch in batches):
            return batches
        whole = ray.cluster_resources()
        # Ray tells of tasks that have their GPUs, and not of those that were submitted a moment ago.
        unclaimed = whole.get("GPU", 0) - sum(gpus_of(batch.steps) for batch in self.running.values())
        free_gpus = min(ray.available_resources().get("GPU", 0), unclaimed)
        found = batches_of(self.replicas.spread([batch.steps for batch in batches], free_gpus, whole))
        for joining in [batch for batch in found if batch.need is None]:
            self.waiting.add(joining, self.outcomes)
        return [batch for batch in found if batch.need is not None]

    def submit(self, batch: Batch) -> None:
        """Give a batch to Ray, or record that no node can run it any more."""
        assert batch.need is not None
        if lack := self.nodes.lack(batch.need):
            self.fail(batch.steps, lack)
            return
        task = remote_group.options(
            num_cpus=batch.need.num_cpus,
            num_gpus=batch.need.num_gpus,
            memory=batch.need.memory_bytes,
            max_retries=self.cluster.lost_worker_retries,
        )
        self.running[task.remote(batch.steps, self.store, max(1, math.floor(batch.need.num_cpus)))] = batch
        self.in_flight.add(batch.model)

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

    def skip_broken(self, place: int) -> None:
        """Of a batch that is ready, record the steps whose inputs failed as skipped, naming the cause."""
        runnable, skipped = [], []
        for step in self.waiting.batches[place].steps:
            inputs = [self.outcomes[needed.key] for needed in step.input_steps()]
            broken = next((outcome for outcome in inputs if outcome.error is not None), None)
            if broken is None:
                runnable.append(step)
            else:
                skipped.append(Outcome.skipped(step, broken))
        if skipped:
            self.waiting.keep(place, runnable)
            for outcome in skipped:
                self.record(outcome)

    def receive(self, timeout_s: float) -> None:
        """Record what running tasks tell, waiting for the first of it; drop tasks that have ended."""
        told_now, _ = ray.wait(list(self.running), num_returns=1, timeout=timeout_s)
        if not told_now and timeout_s:
            self.fail_impossible()
        if told_now:
            told_now, _ = ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        stream: Any
        for stream in told_now:
            try:
                self.record(ray.get(next(stream)))
            except StopIteration:
                # A retried task's stream starts where the lost one's was read to: its outcomes may be past the end.
                for step in self.dropped(stream):
                    log = self.store.log(step.key)
                    where = f" (trace in {log})" if log.is_file() else ""
                    untold = Outcome.failed(step, f"its worker was lost and the retry told nothing of it{where}")
                    self.record(Outcome.done(step, self.store) if self.store.is_done(step) else untold)
            except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
                times, reason = self.cluster.lost_worker_retries + 1, first_line(error)
                self.fail(self.dropped(stream), f"its worker was lost {times} times: {reason}")

    def dropped(self, stream: Any) -> list[Step]:
        """The steps of a task that runs no longer which have no outcome."""
        return [step for step in self.running.pop(stream).steps if step.key not in self.outcomes]

    def fail_impossible(self) -> None:
        """Record the steps as failed that no node can run any more: Ray would run them again, and wait for ever."""
        for stream, batch in list(self.running.items()):
            assert batch.need is not None
            if lack := self.nodes.lack(batch.need):
                ray.cancel(stream, force=True)
                self.fail(self.dropped(stream), f"the node that ran it was lost, and {lack}")

    def fail(self, steps: Sequence[Step], error: str, obstacle: str | None = None) -> None:
        for step in steps:
            self.record(Outcome.failed(step, error, obstacle=obstacle))

    def record(self, told: Started | Milestone | Outcome) -> None:
        """Note an outcome, with what it makes ready or breaks; tell what came."""
        if isinstance(told, Started):
            self.begun.add(told.key)
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
                self.left[outcome.model] -= 1
                if not self.left[outcome.model]:
                    self.in_flight.discard(outcome.model)
        if isinstance(told, Outcome):
            for place in self.waiting.end(told.key):
                self.skip_broken(place)
