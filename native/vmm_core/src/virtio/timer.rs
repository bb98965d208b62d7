//! One deadline as a descriptor: readable when it is over.
//!
//! What devices watch for waits of their own: time limits, rate limiters. Setting it again to the
//! same deadline costs no system call, so that it can be done after each turn. I/O thread.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// A timerfd that fires once per deadline.
#[derive(Debug)]
pub(crate) struct DeadlineTimer {
    fd: OwnedFd,
    armed: Cell<Option<Instant>>,
}

impl DeadlineTimer {
    /// A timer without a deadline.
    ///
    /// # Errors
    /// As `timerfd_create(2)`.
    pub(crate) fn new() -> Result<Self, Errno> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self {
            fd: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            armed: Cell::new(None),
        })
    }

    /// Fire at `deadline`, at once if it is over, or never.
    ///
    /// # Errors
    /// As `timerfd_settime(2)`.
    pub(crate) fn set(&self, deadline: Option<Instant>) -> Result<(), Errno> {
        if deadline == self.armed.get() {
            return Ok(());
        }
        let never = Timespec::default();
        let value = deadline.map_or(never, |deadline| {
            // Zero would mean never.
            let shortest = Duration::from_nanos(1);
            let wait = deadline.saturating_duration_since(Instant::now());
            timespec(wait.max(shortest))
        });
        let spec = Itimerspec {
            it_interval: Timespec::default(),
            it_value: value,
        };
        timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &spec)?;
        self.armed.set(deadline);
        Ok(())
    }

    /// It fired: not readable any more, no deadline.
    pub(crate) fn clear(&self) {
        self.armed.set(None);
        // EAGAIN: it was set anew since. The count of expirations is of no use.
        let _expirations = rustix::io::read(&self.fd, &mut [0; 8]);
    }
}

impl AsFd for DeadlineTimer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn fires_within(timer: &DeadlineTimer, limit: Duration) -> bool {
        let mut fds = [PollFd::new(timer, PollFlags::IN)];
        poll(&mut fds, Some(&timespec(limit))).unwrap() == 1
    }

    #[test]
    fn it_fires_once_per_deadline() {
        let timer = DeadlineTimer::new().unwrap();
        assert!(!fires_within(&timer, Duration::ZERO));
        let past = Instant::now();
        timer.set(Some(past)).unwrap();
        assert!(fires_within(&timer, Duration::from_secs(10)));
        timer.clear();
        assert!(!fires_within(&timer, Duration::from_millis(2)));
        timer.set(Some(past)).unwrap();
        assert!(fires_within(&timer, Duration::from_secs(10)));
    }

    #[test]
    fn a_deadline_taken_back_does_not_fire() {
        let timer = DeadlineTimer::new().unwrap();
        timer.set(Some(Instant::now())).unwrap();
        assert!(fires_within(&timer, Duration::from_secs(10)));
        timer.set(None).unwrap();
        assert!(!fires_within(&timer, Duration::from_millis(2)));
        timer
            .set(Some(Instant::now() + Duration::from_secs(3600)))
            .unwrap();
        assert!(!fires_within(&timer, Duration::from_millis(2)));
    }
}
