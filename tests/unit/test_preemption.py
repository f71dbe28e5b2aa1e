"""When a signal ends the process, when it is remembered, when it breaks off what is under way. Real
signals to this process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from megasd.preemption import EXIT_PREEMPTED, PREEMPTION_SIGNALS, Preempted, PreemptionSignal


@pytest.fixture
def stop() -> Iterator[PreemptionSignal]:
    before = {number: signal.getsignal(number) for number in PREEMPTION_SIGNALS}
    one = PreemptionSignal()
    one.install()
    yield one
    for number, handler in before.items():
        signal.signal(number, handler)


def tell(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number, code", [(signal.SIGUSR1, EXIT_PREEMPTED), (signal.SIGTERM, 143)])
def test_before_there_is_a_run_it_ends_the_process(stop: PreemptionSignal, number: int, code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        tell(number)
    assert ended.value.code == code and stop.asked is None


def test_the_first_signal_counts_and_more_change_nothing(stop: PreemptionSignal) -> None:
    stop.armed = True
    tell(signal.SIGUSR1)
    tell(signal.SIGTERM)
    assert stop.asked == signal.SIGUSR1
    with pytest.raises(Preempted), stop.breakable():
        raise AssertionError("what was told before is heeded at once")


def test_it_breaks_off_what_can_be_done_again_and_nothing_else(stop: PreemptionSignal) -> None:
    stop.armed = True
    done = []
    with pytest.raises(Preempted), stop.breakable():
        with stop.held():
            tell(signal.SIGTERM)
            # other ranks take part: finished first
            done.append("held")
        done.append("not reached")
    assert done == ["held"]
    # outside: remembered only
    tell(signal.SIGTERM)
