"""Ranks that live as long as the session's tests: starting them takes longer than most tests."""

from collections.abc import Iterator

import pytest
from rank_pool import Ranks


@pytest.fixture(scope="session")
def pools() -> Iterator[list[Ranks]]:
    started: list[Ranks] = []
    yield started
    for ranks in started:
        ranks.close()


@pytest.fixture
def four_ranks(pools: list[Ranks]) -> Ranks:
    """Those of the tests before, or new ones where a test has lost some."""
    if not pools or pools[-1].closed:
        pools.append(Ranks(4))
    return pools[-1]
