//! Requests of a hostile driver to the balloon, while the host sets targets.

#![no_main]

use fuzz_support::{HostileDriver, Input};
use libfuzzer_sys::fuzz_target;
use vmm_core::virtio::balloon::{Balloon, BalloonConfig};

fn run(input: &mut Input<'_>) -> Option<()> {
    let flags = input.u8()?;
    let (mut balloon, control) = Balloon::new(BalloonConfig {
        target_pages: 0,
        deflates_on_oom: flags & 1 != 0,
        reports_free_pages: flags & 2 == 0,
    });
    let mut driver = HostileDriver::new(&mut balloon);
    loop {
        match input.u8()? {
            operation @ ..=15 => driver.step(operation, input, &mut balloon)?,
            _ => control.set_target(input.u32()?),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    run(&mut Input::new(data));
});
