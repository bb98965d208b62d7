//! A device's rate limiter together with the timer that ends its waits.
//!
//! A device asks before each request; a refusal has armed the timer for exactly when the request
//! will fit, and the device goes on when its [`crate::virtio::device::Watcher`] says so. Used by
//! devices on the I/O thread; one timer a device.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use rustix::io::Errno;
use thiserror::Error;

use crate::rate_limiter::{RateLimiter, RateLimiterConfig, RateLimiterError};
use crate::virtio::timer::DeadlineTimer;

/// Why a throttle cannot be made.
#[derive(Debug, Error)]
pub enum ThrottleError {
    /// the limits make no sense
    #[error("rate limiter")]
    Limits(#[from] RateLimiterError),
    /// no timer
    #[error("create the rate limiter's timer")]
    Timer(#[source] std::io::Error),
}

/// A limiter and its timer.
#[derive(Debug)]
pub struct Throttle {
    limiter: RateLimiter,
    timer: DeadlineTimer,
}

impl Throttle {
    /// Full buckets, and a timer that is not running.
    ///
    /// # Errors
    /// The limits make no sense, or there is no timer to be had.
    pub fn new(config: &RateLimiterConfig) -> Result<Self, ThrottleError> {
        Ok(Self {
            limiter: RateLimiter::new(config, Instant::now())?,
            timer: DeadlineTimer::new().map_err(|errno| ThrottleError::Timer(errno.into()))?,
        })
    }

    /// Take tokens for `operations` requests of `bytes` bytes. False: not now, and the timer runs
    /// until they are there.
    ///
    /// # Errors
    /// As `timerfd_settime(2)`.
    pub fn try_take(&mut self, now: Instant, operations: u64, bytes: u64) -> Result<bool, Errno> {
        match self.limiter.try_take(now, operations, bytes) {
            Ok(()) => Ok(true),
            Err(wait) => {
                self.timer.set(Some(now + wait))?;
                Ok(false)
            }
        }
    }

    /// Forget a wait that ended: to be called when the timer is ready.
    pub fn acknowledge(&self) {
        self.timer.clear();
    }

    /// Stop the timer.
    pub fn disarm(&self) {
        // No deadline is always valid for a timer of ours.
        let _set = self.timer.set(None);
    }
}

impl AsFd for Throttle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;
    use crate::rate_limiter::TokenBucketConfig;

    fn is_ready(throttle: &Throttle, timeout_s: i64) -> bool {
        let timeout = Timespec {
            tv_sec: timeout_s,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(throttle, PollFlags::IN)];
        poll(&mut fds, Some(&timeout)).unwrap() == 1
    }

    fn throttle(refill_time_ms: u32) -> Throttle {
        let config = RateLimiterConfig {
            bandwidth: None,
            operations: Some(TokenBucketConfig {
                size: 1,
                one_time_burst: 0,
                refill_time_ms,
            }),
        };
        Throttle::new(&config).unwrap()
    }

    #[test]
    fn the_timer_ends_when_the_tokens_are_there() {
        let mut throttle = throttle(20);
        let now = Instant::now();
        assert!(throttle.try_take(now, 1, 0).unwrap());
        assert!(!throttle.try_take(now, 1, 0).unwrap());
        assert!(is_ready(&throttle, 10));
        throttle.acknowledge();
        assert!(!is_ready(&throttle, 0));
        assert!(throttle.try_take(Instant::now(), 1, 0).unwrap());
    }

    #[test]
    fn a_disarmed_timer_stays_silent() {
        let mut throttle = throttle(1);
        let now = Instant::now();
        assert!(throttle.try_take(now, 1, 0).unwrap());
        assert!(!throttle.try_take(now, 1, 0).unwrap());
        throttle.disarm();
        assert!(!is_ready(&throttle, 0));
    }
}
