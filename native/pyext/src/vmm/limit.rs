//! Limits of devices: how much may pass in a time.

use pyo3::prelude::*;
use vmm_core::rate_limiter::{RateLimiterConfig, TokenBucketConfig};

/// ``size`` bytes or requests in ``refill_time_ms``, and ``one_time_burst`` more once. Frozen.
#[pyclass(frozen, from_py_object, get_all, module = "kata_hybrid._native.vmm")]
#[derive(Clone, Copy)]
pub(crate) struct Limit {
    size: u64,
    refill_time_ms: u32,
    one_time_burst: u64,
}

#[pymethods]
impl Limit {
    #[new]
    #[pyo3(signature = (*, size, refill_time_ms, one_time_burst = 0))]
    fn new(size: u64, refill_time_ms: u32, one_time_burst: u64) -> Self {
        Self {
            size,
            refill_time_ms,
            one_time_burst,
        }
    }

    fn __repr__(&self) -> String {
        format!(
            "<Limit size={} refill_time_ms={} one_time_burst={}>",
            self.size, self.refill_time_ms, self.one_time_burst
        )
    }
}

impl From<Limit> for TokenBucketConfig {
    fn from(limit: Limit) -> Self {
        Self {
            size: limit.size,
            one_time_burst: limit.one_time_burst,
            refill_time_ms: limit.refill_time_ms,
        }
    }
}

/// Both limits of a device.
pub(super) fn limits(bandwidth: Option<Limit>, operations: Option<Limit>) -> RateLimiterConfig {
    RateLimiterConfig {
        bandwidth: bandwidth.map(TokenBucketConfig::from),
        operations: operations.map(TokenBucketConfig::from),
    }
}

/// Both limits of a device, if there is one.
pub(super) fn limits_of(
    bandwidth: Option<Limit>,
    operations: Option<Limit>,
) -> Option<RateLimiterConfig> {
    (bandwidth.is_some() || operations.is_some()).then(|| limits(bandwidth, operations))
}
