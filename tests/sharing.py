"""How the two processes of a run share the tests: a file is one's, and all files that need Ray are one's together.

Models and variants are made once a file, and one process starts one cluster. xdist's own groups would say so, but with
pytest 9.2 they do nothing, silently (https://github.com/pytest-dev/pytest-xdist/issues/1386).
"""

from collections import Counter

import pytest
from xdist.scheduler import LoadScopeScheduling

ON_RAY = {
    "tests/jobs/test_cli.py",
    "tests/jobs/test_status.py",
    "tests/pipeline/test_calibrated_run.py",
    "tests/pipeline/test_costs.py",
    "tests/pipeline/test_damage.py",
    "tests/pipeline/test_faults.py",
    "tests/pipeline/test_replicas_on_ray.py",
    "tests/pipeline/test_zoo_run.py",
}


class BySharedWork(LoadScopeScheduling):
    def _split_scope(self, nodeid):
        return share_of(nodeid)


def share_of(nodeid):
    file = nodeid.partition("::")[0]
    return "on Ray" if file in ON_RAY else file


def sort_by_work(items):
    """Ray first, which takes longest, then the longest files: what is left at the end is short.

    Raises:
        pytest.UsageError: A file needs the cluster and is not among those that share it.
    """
    for item in items:
        if "ray_cluster" in item.fixturenames and share_of(item.nodeid) != "on Ray":
            raise pytest.UsageError(f"{item.nodeid} needs the Ray cluster: name its file in tests/sharing.py")
    counts = Counter(share_of(item.nodeid) for item in items)
    items.sort(key=lambda item: (share_of(item.nodeid) != "on Ray", -counts[share_of(item.nodeid)]))
