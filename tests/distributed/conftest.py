"""Ranks that live until the session ends: starting them takes longer than most tests."""

from collections.abc import Callable, Iterator

import pytest
from rank_pool import Ranks

RanksOf = Callable[[str, int, float], Ranks]


@pytest.fixture(scope="session")
def ranks_of() -> Iterator[RanksOf]:
    """The ranks of that name from earlier tests, or new ones if a test has ended some."""
    started: dict[str, Ranks] = {}

    def ranks_of(name: str, number: int, collective_seconds: float) -> Ranks:
        if name not in started or started[name].closed:
            started[name] = Ranks(number, collective_seconds)
        return started[name]

    yield ranks_of
    for ranks in started.values():
        ranks.close()


@pytest.fixture
def four_ranks(ranks_of: RanksOf) -> Ranks:
    return ranks_of("four", 4, 60.0)


@pytest.fixture
def zero_ranks(ranks_of: RanksOf) -> Ranks:
    """Two ranks that import `zero_cases`, which changes DeepSpeed."""
    return ranks_of("zero", 2, 180.0)


@pytest.fixture
def two_ranks(ranks_of: RanksOf) -> Ranks:
    """Two ranks that train as a user's processes do."""
    return ranks_of("two", 2, 90.0)
