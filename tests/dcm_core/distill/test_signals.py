"""A signal waits until what has to be whole is whole."""

import signal
import threading

import pytest

from dcm_core.distill.signals import held_back


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_comes_after_the_block(number):
    came = []
    before = signal.signal(number, lambda number, _: came.append(number))
    try:
        with held_back():
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert came == []
        assert came == [number]
        signal.raise_signal(number)
        assert came == [number, number]
    finally:
        signal.signal(number, before)


def test_a_function_may_be_interrupted_only_before_and_after():
    done = []

    @held_back()
    def whole():
        signal.raise_signal(signal.SIGINT)
        done.append(True)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            whole()
    assert done == [True, True]


def test_other_threads_are_left_alone():
    handlers = []

    def work():
        with held_back():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
