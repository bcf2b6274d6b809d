"""What a step took: of this step and not of the one before it; attempts of workers that were lost count."""

import time
from dataclasses import dataclass

import pytest

from pipeline.storage.cost import Meter
from pipeline.storage.store import Store

MIB = 1024**2


@dataclass(frozen=True)
class Made:
    key: str = "made-1"


def test_the_peak_is_the_steps_own():
    meter = Meter()
    held = bytearray(200 * MIB)
    del held
    large = meter.cost(1).peak_bytes
    small = Meter().cost(1).peak_bytes
    assert large - small > 150 * MIB


def test_waiting_takes_wall_time_and_work_takes_the_processors():
    meter = Meter()
    time.sleep(0.2)
    idle = meter.cost(1)
    assert idle.wall_s >= 0.2
    assert idle.cpu_s < 0.1
    meter = Meter()
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    assert meter.cost(1).cpu_s >= 0.2


def test_what_is_read_is_counted(tmp_path):
    (tmp_path / "a").write_bytes(bytes(5 * MIB))
    meter = Meter()
    (tmp_path / "a").read_bytes()
    assert 5 * MIB <= meter.cost(1).read_bytes < 6 * MIB


def test_attempts_count_until_the_step_is_done_and_leave_nothing(tmp_path):
    for _ in range(2):  # a worker that is lost does not come past this
        Store(tmp_path).begin(Made())
    store = Store(tmp_path)
    with pytest.raises(RuntimeError), store.writing(Made()):
        raise RuntimeError
    assert store.attempts(Made()) == 3
    with store.writing(Made()):
        pass
    assert store.cost(Made()).attempts == 4
    assert list((tmp_path / "attempts").iterdir()) == []
    assert store.attempts(Made()) == 0
