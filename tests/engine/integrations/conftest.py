"""Fixtures for tests of Trainers."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def small_collections() -> Iterator[None]:
    """Keep imported modules out of the collections that accelerate forces for each Trainer."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
