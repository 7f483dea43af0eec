"""Work on a passing thread: its result, its error, and that the thread is gone afterwards."""

import threading

import pytest

from ephemera.serving.threads import in_passing_thread


def test_the_result_comes_from_a_thread_that_is_gone():
    thread = in_passing_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()  # and with it its pool of workers


def test_an_error_arrives_as_it_was_raised():
    def fail():
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        in_passing_thread(fail)
