"""The clock of a training."""

import pytest

from cifar_accel.records import meters
from cifar_accel.records.meters import Clock
from cifar_accel.records.state import State


@pytest.fixture
def time(monkeypatch):
    """Seconds by the system's clock, which a test sets: `time[0]`."""
    now = [1000.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    return now


def test_minutes_are_counted_from_the_last_checkpoint(time):
    clock = Clock(State())
    time[0] += 599
    assert not clock.minutes_up(10)
    time[0] += 2
    assert clock.minutes_up(10)
    assert not clock.minutes_up(None)
    clock.checkpoint_written()
    assert not clock.minutes_up(10)


def test_pauses_are_on_the_wall_clock_alone(time):
    state = State()
    with Clock(state) as clock:
        time[0] += 5
        with clock.paused():
            time[0] += 7
        with clock.waiting_for_input():
            time[0] += 2
    assert (state.time_s, state.wall_s) == (7, 14)
    assert (state.window.seconds, state.window.waiting) == (7, 2)
