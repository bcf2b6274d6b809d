"""Gates and paired comparisons against numbers worked out by hand."""

import math

import numpy as np
import pytest

from lorc_core.errors import ArtifactError
from pipeline.evaluation.gates import fell, paired_rise, reasons_to_refuse
from pipeline.zoo.sections import Gates

GATES = Gates(max_perplexity_rise=0.05, min_recovery=0.9)


def metrics(rise, recovery):
    return {"perplexity_rise.wiki": rise, "recovery.wiki": recovery}


def test_gates_accept_at_the_limit_and_refuse_past_it():
    assert reasons_to_refuse(GATES, metrics(0.05, 0.9), ["wiki"]) == []
    assert reasons_to_refuse(GATES, metrics(0.2, 0.8), ["wiki"]) == [
        "wiki: perplexity rose by 20.00%, allowed is 5.00%",
        "wiki: recovery is 0.8000, required is 0.9000",
    ]


def test_an_unset_gate_does_not_refuse():
    assert reasons_to_refuse(Gates(min_recovery=0.5), metrics(9.0, 0.6), ["wiki"]) == []


def test_nan_is_refused():
    assert len(reasons_to_refuse(GATES, metrics(math.nan, math.nan), ["wiki"])) == 2


def test_a_missing_metric_is_an_error_not_a_perfect_score():
    with pytest.raises(ArtifactError, match=r"metric recovery\.wiki is missing; recorded are perplexity_rise\.wiki"):
        reasons_to_refuse(GATES, {"perplexity_rise.wiki": 0.0}, ["wiki"])


def test_paired_rise_uses_the_error_of_the_difference():
    reference = np.array([1.0, 5.0, 9.0, 13.0])
    rise = paired_rise(reference, reference + np.array([0.1, 0.3, 0.1, 0.3]))
    assert rise.nats == pytest.approx(0.2)
    assert rise.standard_error == pytest.approx(0.2 / math.sqrt(3) / 2)  # sd of the differences over sqrt(4)
    assert rise.recovery == pytest.approx(math.exp(-0.2))
    assert rise.perplexity_rise == pytest.approx(math.exp(0.2) - 1)


def test_other_windows_are_refused():
    with pytest.raises(ArtifactError, match="not the same pinned tokens"):
        paired_rise(np.zeros(3), np.zeros(4))


def test_a_fall_is_past_the_tolerance_and_past_the_noise():
    reference = np.linspace(1, 2, 16)
    noise = np.tile([0.5, -0.5], 8)
    assert not fell(paired_rise(reference, reference), tolerance=0.0)
    assert not fell(paired_rise(reference, reference + 5e-4), tolerance=1e-3)
    assert not fell(paired_rise(reference, reference + noise + 0.1), tolerance=1e-3)
    assert fell(paired_rise(reference, reference + 0.002), tolerance=1e-3)
    assert fell(paired_rise(reference, reference + noise + 0.5), tolerance=1e-3)
    assert not fell(paired_rise(reference, reference - 0.5), tolerance=1e-3)
