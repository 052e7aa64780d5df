"""Fixtures of the normalisations' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.implementations import running_on


@pytest.fixture
def implementation(request: pytest.FixtureRequest, kernel_folder) -> Iterator[str]:
    """The implementation a test runs on, for modules that parametrize it (indirectly)."""
    with running_on(request.param, kernel_folder):
        yield request.param
