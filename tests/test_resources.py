"""In order, in threads."""

import threading
import time

import pytest

from stainnorm_transform.resources import in_order


def test_results_come_in_order_and_no_more_than_a_few_ahead():
    started, taken, most = [], 0, 0
    lock = threading.Lock()

    def work(item):
        with lock:
            started.append(item)
        time.sleep(0.001 * (item % 3))
        return item

    for result in in_order(work, range(100), threads=3):
        assert result == taken
        taken += 1
        most = max(most, len(started) - taken)
    assert taken == 100
    assert most <= 7


def test_an_error_in_a_thread_ends_it():
    def work(item):
        if item == 5:
            raise ValueError("five")
        return item

    found = []
    with pytest.raises(ValueError, match="five"):
        found.extend(in_order(work, iter(range(10**9)), threads=2))
    assert threading.active_count() < 20
