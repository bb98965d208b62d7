"""Watches the guest's clocks for so many seconds: none may ever step back.

clock_watch.py SECONDS     prints "steps back: N" and the largest step forward
"""

import sys
import time


def main(seconds: float) -> None:
    clocks = (time.CLOCK_MONOTONIC, time.CLOCK_REALTIME, time.CLOCK_BOOTTIME)
    before = [time.clock_gettime_ns(clock) for clock in clocks]
    end = time.monotonic() + seconds
    back = 0
    largest = 0
    while time.monotonic() < end:
        # Each processor has a clock of its own to be wrong with.
        time.sleep(0.001)
        now = [time.clock_gettime_ns(clock) for clock in clocks]
        steps = [later - earlier for earlier, later in zip(before, now, strict=True)]
        back += sum(step < 0 for step in steps)
        largest = max(largest, *steps)
        before = now
    print(f"steps back: {back}, largest step: {largest // 1_000_000} ms")


if __name__ == "__main__":
    main(float(sys.argv[1]))
