"""The checks that `make test-core` runs the core under: what contradicts an annotation raises, sizes too."""

from dataclasses import dataclass

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from torch import Tensor

from lorc_core.decomposition.decompose import decompose_weight
from lorc_core.model.blocks import Partition
from tests.annotations import checked


def test_lorc_core_is_checked(pytestconfig):
    if not pytestconfig.getoption("jaxtyping_packages"):
        pytest.skip("annotations are checked by make test-core, which takes twice as long for the same tests")
    with pytest.raises(BeartypeCallHintViolation, match="dimensions"):
        decompose_weight(torch.zeros(3), Partition("joint", 1, 3), None)


@checked
def product(left: Float[Tensor, "a b"], right: Float[Tensor, "b c"], is_turned: bool = False) -> Float[Tensor, "a c"]:
    found = left @ right
    return found.T if is_turned else found


@checked
def steps(count: int) -> int:
    return count if count < 3 else str(count)


@checked
@dataclass(frozen=True)
class Pair:
    left: Float[Tensor, "a b"]
    right: Float[Tensor, "b c"]

    @checked
    def turned(self) -> "Pair":
        return Pair(self.right.T, self.left.T)


def test_names_stand_for_one_size_from_the_arguments_to_the_result():
    a, b = torch.zeros(2, 3), torch.zeros(3, 4)
    for sizes in ((a, b), (b, b.T)):  # names are forgotten after the call
        assert product(*sizes).shape == (sizes[0].shape[0], sizes[1].shape[1])
    for call in (
        lambda: product(a, a),
        lambda: product(a, right=b, is_turned=True),
        lambda: product(a.int(), b),
        lambda: product(a, b, is_turned=1),
    ):
        with pytest.raises(BeartypeCallHintViolation):
            call()


def test_plain_types_and_fields_are_checked_too():
    assert steps(2) == 2
    assert Pair(torch.zeros(2, 3), torch.zeros(3, 4)).turned().left.shape == (4, 3)
    for call in (
        lambda: steps("2"),
        lambda: steps(3),
        lambda: Pair(torch.zeros(2, 3), torch.zeros(2, 3)),
        lambda: Pair(torch.zeros(2, 3), None),
    ):
        with pytest.raises(BeartypeCallHintViolation):
            call()
