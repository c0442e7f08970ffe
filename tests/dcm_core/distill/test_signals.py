"""A signal waits until what has to be whole is whole."""

import signal
import threading

import pytest

from dcm_core.distill.signals import held_back


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request):
    """A signal that interrupts, also where whoever started the tests has it ignored."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_comes_once_and_after_the_block(number):
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(number)
        signal.raise_signal(number)
        done.append(True)
    assert done == [True]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_a_function_may_be_interrupted_only_before_and_after(number):
    done = []

    @held_back()
    def whole():
        signal.raise_signal(number)
        done.append(True)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            whole()
    assert done == [True, True]


def test_what_was_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with held_back():
        signal.raise_signal(number)
    signal.raise_signal(number)


def test_other_threads_are_left_alone():
    handlers = []

    def work():
        with held_back():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
