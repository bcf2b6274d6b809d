"""Cluster files, where models lie on the nodes that they declare, and what a zoo takes there."""

import pytest
import yaml

from lorc_core.errors import ConfigError
from pipeline.costs.units import DEFAULT_UNITS
from pipeline.simulation.cluster import load_cluster
from pipeline.simulation.forecast import busy_shares, forecast
from pipeline.simulation.placement import held_by_device
from pipeline.zoo.file import load_zoo
from pipeline.zoo.models import config_for_planning
from pipeline.zoo.sections import GIB
from tests.large_zoo import SHAPES, write_large_zoo

GPU_NODE = {
    "name": "gpu",
    "count": 2,
    "num_cpus": 96,
    "memory_gib": 1024,
    "num_gpus": 8,
    "gpu_memory_gib": 80,
    "gpu_flops_per_s": {"bfloat16": 4e14},
}
CLUSTER = {"nodes": [GPU_NODE], "units": str(DEFAULT_UNITS), "storage_bytes_per_s": 2e10}


def write_cluster(directory, **changes):
    (directory / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER | changes))
    return directory / "cluster.yaml"


def node(**changes):
    return [GPU_NODE | changes]


def zoo_of(directory, *names):
    return load_zoo(write_large_zoo(directory, copies=1, shapes={name: SHAPES[name] for name in names}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node": []}, "node: unknown field; did you mean nodes? allowed here are nodes, units"),
        ({"nodes": node(gpu_memory=80)}, "nodes.0.gpu_memory: unknown field; did you mean gpu_memory_gib?"),
        ({"nodes": node(gpu_memory_gib=None)}, "nodes.0.gpu_memory_gib: num_gpus needs gpu_memory_gib"),
        ({"nodes": node(num_cpus=0)}, "nodes.0.num_cpus: input should be greater than 0, got 0"),
        ({"nodes": []}, "nodes: tuple should have at least 1 item"),
        ({"nodes": [GPU_NODE, GPU_NODE]}, "nodes: the name 'gpu' is used twice"),
        ({"units": "none.yaml"}, "units: unit costs file"),
        ({"storage_bytes_per_s": "fast"}, "storage_bytes_per_s: input should be a valid number"),
    ],
)
def test_a_wrong_cluster_file_is_refused_by_its_field(changes, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        load_cluster(write_cluster(tmp_path, **changes))
    assert f"{tmp_path / 'cluster.yaml'}: {message}" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_cluster_file_that_is_not_there_or_no_mapping_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cluster file .* does not exist"):
        load_cluster(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must be a mapping with the fields nodes, units"):
        load_cluster(tmp_path / "list.yaml")


def test_a_405b_model_takes_a_node_and_its_memory(tmp_path):
    """Weights of 756 GiB: 640 GiB of GPUs are not enough, the rest stays in the node's memory and is copied."""
    (model,) = forecast(zoo_of(tmp_path, "405b"), load_cluster(write_cluster(tmp_path))).models
    held = model.placement.gpu_bytes
    assert len(held) == 8
    assert max(held) <= 80 * GIB
    weights = 405_853_388_800 * 2
    config = config_for_planning(model.entry).to_json_string()
    shares = held_by_device(config, "bfloat16", 8, 80 * GIB, 1024 * GIB, 8, 2048)
    assert sum(share.weight_bytes for share in shares.values()) == pytest.approx(weights, rel=1e-3)
    assert [shares[gpu].total_bytes for gpu in range(8)] == list(held)
    assert model.placement.offloaded_bytes == shares["cpu"].weight_bytes
    assert model.placement.offloaded_bytes > 100 * GIB


def test_a_model_that_fits_no_node_is_refused_by_name_and_the_others_go_on(tmp_path):
    cluster = load_cluster(write_cluster(tmp_path, nodes=node(memory_gib=100, gpu_memory_gib=40)))
    foreseen = forecast(zoo_of(tmp_path, "8b", "405b"), cluster)
    assert [model.entry.name for model in foreseen.models] == ["8b-0"]
    assert foreseen.refused == {
        "405b-0": "its weights take 756.0 GiB, which 8 GPUs of 40 GiB and 100 GiB of memory of a node gpu do not hold"
    }
    few = load_cluster(write_cluster(tmp_path, nodes=node(num_gpus=4)))
    refused = forecast(zoo_of(tmp_path, "8b", "405b"), few).refused["405b-0"]
    assert refused == "asks for 8 CPUs, 8 GPUs and 64 GiB; nodes have gpu: 96 CPUs, 4 GPUs of 80 GiB, 1024 GiB"


def test_a_gpu_of_which_no_rate_is_known_is_an_error(tmp_path):
    cluster = load_cluster(write_cluster(tmp_path, nodes=node(gpu_flops_per_s={"float16": 1e14})))
    with pytest.raises(ConfigError, match="nodes gpu: no gpu_flops_per_s for bfloat16, which 8b-0 is run in"):
        forecast(zoo_of(tmp_path, "8b"), cluster)


def test_a_forecast_is_within_its_own_bounds(tmp_path):
    """No run is shorter than its longest chain, nor than its work on all machines; reads are what the steps read."""
    foreseen = forecast(zoo_of(tmp_path, "1b", "8b", "70b"), load_cluster(write_cluster(tmp_path)))
    schedule = foreseen.schedule
    assert schedule.wall_s >= foreseen.critical_s
    cpus, gpus = busy_shares(foreseen)
    assert 0 < cpus <= 1
    assert 0 < gpus <= 1
    assert sum(model.read_bytes for model in foreseen.models) == schedule.read_bytes
    for model in foreseen.models:
        assert 0 < model.started < model.ended <= schedule.wall_s
    by_name = {model.entry.name: model for model in foreseen.models}
    assert by_name["70b-0"].gpu_s > 4 * by_name["8b-0"].gpu_s


def test_faster_storage_and_more_nodes_make_no_run_longer(tmp_path):
    zoo = zoo_of(tmp_path, "1b", "3b", "8b")
    slow = forecast(zoo, load_cluster(write_cluster(tmp_path, storage_bytes_per_s=1e8))).schedule.wall_s
    fast = forecast(zoo, load_cluster(write_cluster(tmp_path))).schedule.wall_s
    small = forecast(zoo, load_cluster(write_cluster(tmp_path, nodes=node(count=1, num_cpus=8)))).schedule.wall_s
    assert fast < slow
    assert fast < small


def test_without_gpus_models_are_evaluated_on_cpus(tmp_path):
    zoo = zoo_of(tmp_path, "1b")
    entry = zoo.models[0].model_copy(update={"resources": zoo.models[0].resources.model_copy(update={"num_gpus": 0})})
    on_cpu = zoo.model_copy(update={"models": (entry,)})
    cluster = load_cluster(write_cluster(tmp_path))
    (model,) = forecast(on_cpu, cluster).models
    assert (model.placement.gpu_bytes, model.gpu_s) == ((), 0)
    assert forecast(on_cpu, cluster).schedule.wall_s > forecast(zoo, cluster).schedule.wall_s
