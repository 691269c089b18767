"""What a signal does inside and outside of a flush. Real signals, sent by this process to itself."""

import os
import signal

import pytest

from bakery import stopping
from bakery.stopping import Stopped, finishing, stop_on_signals


@pytest.fixture(autouse=True)
def _handlers(monkeypatch):
    """As in a new process, and none of it left afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setattr(stopping, "_signals", stopping._Signals())
    stop_on_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_of_a_flush_it_stops_at_once(number, code):
    assert not stopping.stopping()
    with pytest.raises(Stopped, match=signal.Signals(number).name) as stop:
        send(number)
    assert stop.value.exit_code == code
    assert stopping.stopping()


def test_a_flush_is_done_to_its_end():
    done = []

    def flush():
        with finishing():
            send(signal.SIGTERM)
            done.append("written")
            assert stopping.stopping()

    with pytest.raises(Stopped):
        flush()
    assert done == ["written"]


def test_a_flush_inside_a_flush_ends_neither():
    done = []

    def flush():
        with finishing():
            with finishing():
                send(signal.SIGINT)
            done.append("outer")

    with pytest.raises(Stopped):
        flush()
    assert done == ["outer"]


def test_a_second_signal_does_not_wait():
    done = []

    def flush():
        with finishing():
            send(signal.SIGINT)
            done.append("first")
            send(signal.SIGTERM)
            done.append("second")

    with pytest.raises(Stopped, match="SIGTERM"):
        flush()
    assert done == ["first"]


def test_an_error_in_a_flush_is_told_before_the_signal():
    def flush():
        with finishing():
            send(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        flush()


def test_without_a_signal_nothing_happens():
    with finishing():
        pass
    assert not stopping.stopping()
