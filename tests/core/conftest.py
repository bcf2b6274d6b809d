"""Tiny random models, one after another."""

import pytest

from tests.models import REPRESENTATIVES, tiny_model


@pytest.fixture(params=REPRESENTATIVES)
def any_tiny_model(request):
    return tiny_model(request.param)
