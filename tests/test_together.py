"""Work for many at once, and what fails for one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from triage.errors import Retryable
from triage.together import Together


def test_who_comes_meanwhile_shares_the_next_round_and_only_who_fails_hears_of_it() -> None:
    begun, go_on = threading.Event(), threading.Event()
    rounds: list[list[int]] = []

    def work(items: Sequence[int]) -> None:
        begun.set()
        assert go_on.wait(10)
        rounds.append(list(items))
        if 3 in items:
            raise ValueError("three")

    together = Together(work)
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(together.do, 1)
        assert begun.wait(10)
        others = {number: pool.submit(together.do, number) for number in (2, 3, 4, 5)}
        while len(together._waiting) < 4:
            pass
        go_on.set()
        assert first.result(10) is None
        assert [others[number].result(10) for number in (2, 4, 5)] == [None] * 3
        with pytest.raises(ValueError, match="three"):
            others[3].result(10)
    assert rounds[0] == [1]
    assert sorted(rounds[1]) == [2, 3, 4, 5]
    assert sorted(rounds[2:]) == [[2], [3], [4], [5]]


def test_what_is_to_be_tried_later_is_not_tried_one_by_one() -> None:
    rounds = []

    def work(items: Sequence[int]) -> None:
        rounds.append(len(items))
        raise Retryable("locked")

    with pytest.raises(Retryable):
        Together(work).do(1)
    assert rounds == [1]
