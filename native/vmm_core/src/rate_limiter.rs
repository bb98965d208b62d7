//! Token buckets: how many operations and bytes a device may move.
//!
//! ```text
//!   one-time burst ─┐
//!                   ├─► request of n tokens: taken from the burst first, then from the bucket
//!   bucket of size ─┘◄── size tokens every refill time, evenly
//! ```
//!
//! Pure arithmetic on a clock that is passed in: no timer, no thread. Credit is kept in tokens
//! times nanoseconds, so nothing is ever rounded away and the rate is exact however short the
//! refill time; a refusal says to the nanosecond when the request will fit. A request larger than
//! the bucket passes when the bucket is full, and leaves a debt that later requests wait for.
//! Used by devices on the I/O thread, through `virtio/throttle.rs`.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// One bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucketConfig {
    /// Tokens it holds: bytes or operations.
    pub size: u64,
    /// Tokens on top, once.
    pub one_time_burst: u64,
    /// How long an empty bucket takes to fill.
    pub refill_time_ms: u32,
}

/// Both buckets of a device; none: no limit of that kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiterConfig {
    /// Bytes.
    pub bandwidth: Option<TokenBucketConfig>,
    /// Requests.
    pub operations: Option<TokenBucketConfig>,
}

/// Why there can be no such limiter.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RateLimiterError {
    /// nothing would ever pass, or everything
    #[error(
        "{bucket} bucket of {size} tokens every {refill_time_ms} ms: both must be above 0; leave \
         the bucket out for no limit"
    )]
    Zero {
        /// Which bucket.
        bucket: &'static str,
        /// Its size.
        size: u64,
        /// Its refill time.
        refill_time_ms: u32,
    },
}

/// Most nanoseconds accounted for at once: 146 years. With any size the product fits an `i128`.
const MAX_ELAPSED_NS: u64 = 1 << 62;

#[derive(Clone, Copy, Debug)]
struct TokenBucket {
    size: u64,
    /// Below 2^52: milliseconds in 32 bits.
    refill_ns: u64,
    burst: u64,
    /// Tokens times `refill_ns`, which grows by `size` every nanosecond; below 0 is a debt.
    credit: i128,
    updated: Instant,
}

impl TokenBucket {
    fn new(
        bucket: &'static str,
        config: TokenBucketConfig,
        now: Instant,
    ) -> Result<Self, RateLimiterError> {
        let TokenBucketConfig {
            size,
            one_time_burst,
            refill_time_ms,
        } = config;
        if size == 0 || refill_time_ms == 0 {
            return Err(RateLimiterError::Zero {
                bucket,
                size,
                refill_time_ms,
            });
        }
        let refill_ns = u64::from(refill_time_ms) * 1_000_000;
        Ok(Self {
            size,
            refill_ns,
            burst: one_time_burst,
            credit: credit_of(size, refill_ns),
            updated: now,
        })
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.updated).as_nanos();
        let elapsed_ns = u64::try_from(elapsed).unwrap_or(u64::MAX);
        self.credit = refilled(self.credit, elapsed_ns, self.size, self.refill_ns);
        self.updated = self.updated.max(now);
    }

    /// How long until `tokens` can be taken, if nobody else takes any.
    fn wait(&self, tokens: u64) -> Duration {
        let needed = tokens.saturating_sub(self.burst);
        if needed == 0 {
            return Duration::ZERO;
        }
        Duration::from_nanos(wait_ns(self.credit, needed, self.size, self.refill_ns))
    }

    fn take(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        self.credit -= credit_of(tokens - from_burst, self.refill_ns);
    }
}

/// What `tokens` are worth.
fn credit_of(tokens: u64, refill_ns: u64) -> i128 {
    i128::from(tokens) * i128::from(refill_ns)
}

/// Credit after some time, at most a full bucket's.
fn refilled(credit: i128, elapsed_ns: u64, size: u64, refill_ns: u64) -> i128 {
    let gained = i128::from(elapsed_ns.min(MAX_ELAPSED_NS)) * i128::from(size);
    credit
        .saturating_add(gained)
        .min(credit_of(size, refill_ns))
}

/// Nanoseconds until the credit is worth `needed` tokens, or a full bucket if that is less.
fn wait_ns(credit: i128, needed: u64, size: u64, refill_ns: u64) -> u64 {
    let missing = credit_of(needed.min(size), refill_ns) - credit;
    let Ok(missing) = u128::try_from(missing) else {
        return 0;
    };
    u64::try_from(missing.div_ceil(u128::from(size))).unwrap_or(u64::MAX)
}

/// Both limits of a device.
#[derive(Clone, Copy, Debug)]
pub struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    operations: Option<TokenBucket>,
}

impl RateLimiter {
    /// A limiter with full buckets.
    ///
    /// # Errors
    /// A bucket holds nothing or never fills.
    pub fn new(config: &RateLimiterConfig, now: Instant) -> Result<Self, RateLimiterError> {
        let bucket = |name, config: Option<TokenBucketConfig>| {
            config
                .map(|config| TokenBucket::new(name, config, now))
                .transpose()
        };
        Ok(Self {
            bandwidth: bucket("bandwidth", config.bandwidth)?,
            operations: bucket("operations", config.operations)?,
        })
    }

    /// Take tokens for `operations` requests of `bytes` bytes in all, from both buckets or none.
    ///
    /// # Errors
    /// Not yet: how long until the same request is let through. Nothing was taken.
    pub fn try_take(&mut self, now: Instant, operations: u64, bytes: u64) -> Result<(), Duration> {
        let mut buckets = [
            (self.operations.as_mut(), operations),
            (self.bandwidth.as_mut(), bytes),
        ];
        let mut wait = Duration::ZERO;
        for (bucket, tokens) in &mut buckets {
            if let Some(bucket) = bucket {
                bucket.refill(now);
                wait = wait.max(bucket.wait(*tokens));
            }
        }
        if !wait.is_zero() {
            return Err(wait);
        }
        for (bucket, tokens) in buckets {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "rate_limiter_tests.rs"]
mod tests;

#[cfg(kani)]
mod proofs {
    use super::*;

    /// A bucket in any state that can be reached: full at most, in debt by one request at most.
    fn any_bucket() -> (i128, u64, u64) {
        let size: u64 = kani::any();
        let refill_time_ms: u32 = kani::any();
        kani::assume(size > 0 && refill_time_ms > 0);
        let refill_ns = u64::from(refill_time_ms) * 1_000_000;
        let credit: i128 = kani::any();
        kani::assume(credit <= credit_of(size, refill_ns));
        kani::assume(credit >= -credit_of(u64::MAX, refill_ns));
        (credit, size, refill_ns)
    }

    #[kani::proof]
    fn a_refill_never_shrinks_overflows_or_overfills() {
        let (credit, size, refill_ns) = any_bucket();
        let after = refilled(credit, kani::any(), size, refill_ns);
        assert!(after >= credit && after <= credit_of(size, refill_ns));
    }

    #[kani::proof]
    fn a_full_bucket_lets_anything_through() {
        let (_, size, refill_ns) = any_bucket();
        assert_eq!(
            wait_ns(credit_of(size, refill_ns), kani::any(), size, refill_ns),
            0
        );
    }
}
