"""Fixtures of all tests: demo and sample models, and a zoo that ran on a Ray node of the tests' own.

The process that shares the tests out reads this file too: nothing slow is imported before a test runs.
"""

import logging
import os
import secrets

# Read by torch when it is first imported, here and in every process that a test starts: two processes run the tests,
# and two threads that wait for a busy core took 20 times longer than one.
os.environ["OMP_NUM_THREADS"] = "1"
# Read by Ray when it is first imported; the test cluster and its drivers must agree.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping
import pytest
from huggingface_hub.utils import disable_progress_bars

from tests.annotations import checked
from tests.paths import DEMO, SAMPLES, SHARED
from tests.sharing import BySharedWork, sort_by_work

jaxtyping.jaxtyped = checked  # the decorator that `--jaxtyping-packages` gives to all functions of lorc_core
disable_progress_bars()  # transformers' too, which asks for it when it is imported


def pytest_collection_modifyitems(items):
    sort_by_work(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return BySharedWork(config, log)


@pytest.fixture(scope="session", params=["stdlib-llama", "stdlib-opt"])
def demo_dir(request):
    return DEMO / request.param


@pytest.fixture(scope="session", params=SAMPLES)
def sample_dir(request):
    directory = SHARED / "models" / request.param
    if not directory.is_dir():
        pytest.skip(f"sample model {directory} is absent")
    return directory


@pytest.fixture
def save_tiny(tmp_path):
    """Write a tiny model with the demo tokenizer and return its directory."""
    from tests.models import save_tiny_model

    def save(name, seed=0):
        return save_tiny_model(name, tmp_path / f"{name}-{seed}", seed)

    return save


@pytest.fixture(scope="session")
def ray_cluster():
    """One real Ray node for all tests, in processes of its own, and this process connected to it.

    All runs share the connection, and so its workers, which import torch and transformers once and not for every run;
    other processes connect by $RAY_ADDRESS.
    """
    import ray
    from ray.cluster_utils import Cluster

    node = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = node.address
    ray.init(address=node.address, log_to_driver=False, logging_level=logging.ERROR)
    yield node
    ray.shutdown()
    del os.environ["RAY_ADDRESS"]
    node.shutdown()


@pytest.fixture(scope="session")
def finished(ray_cluster, tmp_path_factory):
    """A zoo that ran to the end: its file, its work directory (with a space in its path) and the run."""
    from pipeline.zoo.file import load_zoo
    from pipeline.zoo_run import run_zoo
    from tests.zoos import write_zoo

    directory = tmp_path_factory.mktemp("finished zoo")
    zoo_file = write_zoo(directory)
    return zoo_file, directory / "work", run_zoo(load_zoo(zoo_file), directory / "work")
