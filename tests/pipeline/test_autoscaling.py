"""Nodes that an autoscaler would add count as the cluster's own."""

import subprocess
import sys

import pytest
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

ASK = """
import ray, sys
from pipeline.running.nodes import Nodes
from pipeline.steps.step import Need
ray.init(address=sys.argv[1], log_to_driver=False)
for need in (Need(2), Need(3), Need(1, 1), Need(1, 0, 2**34)):
    print(Nodes().lack(need))
"""


@pytest.mark.slow
def test_a_node_that_may_come_counts():
    """Ray's own fake autoscaler is not in its wheel, so the test reports what an autoscaler would."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        group = autoscaler_pb2.NodeGroupConfig(name="workers", resources={"CPU": 2, "memory": 2**33}, max_count=4)
        none = autoscaler_pb2.NodeGroupConfig(name="no more", resources={"CPU": 64, "GPU": 8}, max_count=0)
        config = autoscaler_pb2.ClusterConfig(node_group_configs=[group, none])
        GcsClient(address=cluster.address).report_cluster_config(config.SerializeToString())
        command = [sys.executable, "-c", ASK, cluster.address]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    finally:
        cluster.shutdown()
    assert told[0] == "None"
    assert told[1].startswith("no node of the cluster can give CPU 3; its nodes have: CPU 0, GPU 0, memory")
    assert "CPU 2, GPU 0, memory 8.58993e+09" in told[1]
    assert told[2].startswith("no node of the cluster can give CPU 1, GPU 1;")
    assert told[3].startswith("no node of the cluster can give CPU 1, memory 1.71799e+10;")
