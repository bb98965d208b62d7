//! Requests of a hostile driver to the entropy device.

#![no_main]

use fuzz_support::{HostileDriver, Input};
use libfuzzer_sys::fuzz_target;
use vmm_core::rate_limiter::RateLimiterConfig;
use vmm_core::virtio::rng::Rng;

fn run(input: &mut Input<'_>) -> Option<()> {
    let mut rng = Rng::new(&RateLimiterConfig::default()).expect("no limits");
    let mut driver = HostileDriver::new(&mut rng);
    loop {
        driver.step(input.u8()?, input, &mut rng)?;
    }
}

fuzz_target!(|data: &[u8]| {
    run(&mut Input::new(data));
});
