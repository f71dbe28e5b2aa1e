"""Proves when a signal ends the process, when it is recorded, and when it interrupts work. Sends real
signals to this process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from megasd.preemption import EXIT_PREEMPTED, PREEMPTION_SIGNALS, Preempted, PreemptionSignal


@pytest.fixture
def preemption() -> Iterator[PreemptionSignal]:
    before = {number: signal.getsignal(number) for number in PREEMPTION_SIGNALS}
    one = PreemptionSignal()
    one.install()
    yield one
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number, code", [(signal.SIGUSR1, EXIT_PREEMPTED), (signal.SIGTERM, 143)])
def test_before_a_run_a_signal_ends_the_process(preemption: PreemptionSignal, number: int, code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        send(number)
    assert ended.value.code == code and preemption.received is None


def test_the_first_signal_counts_and_more_change_nothing(preemption: PreemptionSignal) -> None:
    preemption.armed = True
    send(signal.SIGUSR1)
    send(signal.SIGTERM)
    assert preemption.received == signal.SIGUSR1
    with pytest.raises(Preempted), preemption.interruptible():
        raise AssertionError("a signal received earlier counts at once")


def test_a_signal_interrupts_interruptible_work_and_nothing_else(preemption: PreemptionSignal) -> None:
    preemption.armed = True
    done = []
    with pytest.raises(Preempted), preemption.interruptible():
        with preemption.uninterruptible():
            send(signal.SIGTERM)
            # Other ranks take part, so this is finished first.
            done.append("uninterruptible")
        done.append("not reached")
    assert done == ["uninterruptible"]
    # Outside of an interruptible block a signal is only recorded.
    send(signal.SIGTERM)
