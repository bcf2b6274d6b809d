"""The Ray cluster that a run uses: the one at an address, or one of its own."""

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import ray

from lorc_core.errors import ConfigError, first_line
from pipeline.steps.outcome import Listener

ANSWER_S = 10  # that a Ray cluster may take to answer


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
