use proptest::prelude::*;

use super::*;

fn bucket(size: u64, one_time_burst: u64, refill_time_ms: u32) -> TokenBucketConfig {
    TokenBucketConfig {
        size,
        one_time_burst,
        refill_time_ms,
    }
}

fn limiter(
    bandwidth: impl Into<Option<TokenBucketConfig>>,
    operations: impl Into<Option<TokenBucketConfig>>,
) -> RateLimiter {
    let config = RateLimiterConfig {
        bandwidth: bandwidth.into(),
        operations: operations.into(),
    };
    RateLimiter::new(&config, start()).unwrap()
}

/// One instant for the whole process, so that times are offsets from it.
fn start() -> Instant {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    *START.get_or_init(Instant::now)
}

fn at_us(us: u64) -> Instant {
    start() + Duration::from_micros(us)
}

#[test]
fn no_bucket_is_no_limit() {
    let mut limiter = limiter(None, None);
    assert_eq!(limiter.try_take(start(), u64::MAX, u64::MAX), Ok(()));
}

#[test]
fn a_bucket_that_holds_nothing_or_never_fills_is_refused() {
    for config in [bucket(0, 5, 100), bucket(5, 0, 0)] {
        let config = RateLimiterConfig {
            bandwidth: None,
            operations: Some(config),
        };
        let error = RateLimiter::new(&config, start()).unwrap_err();
        assert!(error.to_string().starts_with("operations bucket of"));
    }
}

#[test]
fn an_empty_bucket_says_when_to_come_back() {
    // 1000 tokens in 100 ms: one every 100 us.
    let mut limiter = limiter(bucket(1000, 0, 100), None);
    assert_eq!(limiter.try_take(start(), 1, 1000), Ok(()));
    assert_eq!(
        limiter.try_take(start(), 1, 3),
        Err(Duration::from_micros(300))
    );
    assert_eq!(
        limiter.try_take(at_us(299), 1, 3),
        Err(Duration::from_micros(1))
    );
    assert_eq!(limiter.try_take(at_us(300), 1, 3), Ok(()));
}

#[test]
fn the_burst_goes_first_and_once() {
    let mut limiter = limiter(None, bucket(10, 5, 10));
    assert_eq!(limiter.try_take(start(), 15, 0), Ok(()));
    assert!(limiter.try_take(start(), 1, 0).is_err());
    // A second later the bucket is full and the burst is still gone.
    assert_eq!(limiter.try_take(at_us(1_000_000), 10, 0), Ok(()));
    assert!(limiter.try_take(at_us(1_000_000), 1, 0).is_err());
}

#[test]
fn one_bucket_that_lacks_leaves_the_other_untouched() {
    let mut limiter = limiter(bucket(100, 0, 100), bucket(2, 0, 100));
    assert_eq!(limiter.try_take(start(), 1, 100), Ok(()));
    assert_eq!(
        limiter.try_take(start(), 1, 50),
        Err(Duration::from_millis(50))
    );
    assert_eq!(
        limiter.try_take(start(), 1, 0),
        Ok(()),
        "the second operation is there"
    );
    // Both lack: the longer wait.
    assert_eq!(
        limiter.try_take(start(), 1, 80),
        Err(Duration::from_millis(80))
    );
}

#[test]
fn a_request_larger_than_the_bucket_passes_when_full_and_is_paid_off() {
    let mut limiter = limiter(bucket(100, 0, 100), None);
    assert_eq!(limiter.try_take(start(), 1, 1), Ok(()));
    assert_eq!(
        limiter.try_take(start(), 1, 300),
        Err(Duration::from_millis(1))
    );
    assert_eq!(limiter.try_take(at_us(1000), 1, 300), Ok(()));
    // 200 tokens of debt, then one more.
    assert_eq!(
        limiter.try_take(at_us(1000), 1, 1),
        Err(Duration::from_millis(201))
    );
    assert_eq!(limiter.try_take(at_us(202_000), 1, 1), Ok(()));
}

#[test]
fn a_short_refill_time_gives_the_full_rate() {
    // 4 KiB in 1 ms; taken 1 KiB at a time, each as soon as it is said to fit.
    let mut limiter = limiter(bucket(4096, 0, 1), None);
    let (mut now, mut taken) = (start(), 0u64);
    while now <= at_us(1_000_000) {
        match limiter.try_take(now, 1, 1024) {
            Ok(()) => taken += 1024,
            Err(wait) => now += wait,
        }
    }
    assert_eq!(taken, 4096 * 1000 + 4096);
}

#[test]
fn a_clock_that_goes_back_gives_nothing() {
    let mut limiter = limiter(bucket(10, 0, 10), None);
    assert_eq!(limiter.try_take(at_us(5000), 1, 10), Ok(()));
    assert_eq!(
        limiter.try_take(start(), 1, 1),
        Err(Duration::from_millis(1))
    );
    assert_eq!(limiter.try_take(at_us(6000), 1, 1), Ok(()));
}

#[test]
fn extremes_neither_panic_nor_wrap() {
    let mut limiter = limiter(bucket(u64::MAX, u64::MAX, u32::MAX), bucket(1, 0, u32::MAX));
    assert_eq!(limiter.try_take(start(), u64::MAX, u64::MAX), Ok(()));
    let wait = limiter.try_take(start(), u64::MAX, u64::MAX).unwrap_err();
    assert_eq!(wait, Duration::from_nanos(u64::MAX));
    let much_later = start() + Duration::from_secs(1 << 40);
    assert!(limiter.try_take(much_later, 1, u64::MAX).is_err());
}

proptest! {
    /// Whatever is asked and when, no more passes than the rate, the bucket and the burst allow;
    /// an over-sized request counts when it starts, not in full.
    #[test]
    fn the_rate_is_never_exceeded_by_more_than_bucket_and_burst(
        size in 1u64..5000,
        burst in 0u64..5000,
        refill_time_ms in 1u32..200,
        requests in prop::collection::vec((0u64..20_000, 1u64..10_000), 1..200),
    ) {
        let mut limiter = limiter(bucket(size, burst, refill_time_ms), None);
        let (mut now_us, mut taken) = (0u64, 0u64);
        for (step_us, bytes) in requests {
            now_us += step_us;
            if limiter.try_take(at_us(now_us), 1, bytes).is_ok() {
                let at_start = if bytes > size { taken + size.min(bytes) } else { taken + bytes };
                let refilled = u128::from(size) * u128::from(now_us) / (u128::from(refill_time_ms) * 1000);
                prop_assert!(u128::from(at_start) <= u128::from(size + burst) + refilled + 1);
                taken += bytes;
            }
        }
    }

    /// Whoever waits as long as told is let through, and not a nanosecond earlier.
    #[test]
    fn the_wait_is_exact_and_ends(
        size in 1u64..1 << 40,
        burst in 0u64..1 << 40,
        refill_time_ms in 1u32..10_000,
        requests in prop::collection::vec((1u64..4, 0u64..1 << 42), 1..50),
    ) {
        let mut limiter = limiter(bucket(size, burst, refill_time_ms), bucket(3, 1, 7));
        let mut now = start();
        for (operations, bytes) in requests {
            if let Err(wait) = limiter.try_take(now, operations, bytes) {
                let early = now + wait.saturating_sub(Duration::from_nanos(1));
                prop_assert!(limiter.try_take(early, operations, bytes).is_err());
                now += wait;
                prop_assert_eq!(limiter.try_take(now, operations, bytes), Ok(()));
            }
        }
    }
}
