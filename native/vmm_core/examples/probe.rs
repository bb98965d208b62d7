//! Print what the KVM probe finds: `cargo run -p vmm_core --example probe`.

use std::io::Write;
use std::time::Instant;

fn main() -> std::io::Result<()> {
    let start = Instant::now();
    let probe = vmm_core::probe::probe_kvm();
    writeln!(std::io::stdout(), "{probe:?} in {:?}", start.elapsed())
}
