//! Accesses of any width to any port, with all port devices in place. Checked beside panics and
//! sanitizer findings: what is past an access stays as it was, the console keeps no more than it
//! says, and the serial port comes back from its saved state.

#![no_main]

use std::sync::Arc;

use fuzz_support::Input;
use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use vmm_core::bus::{Bus, Outcome};
use vmm_core::devices::acpi_power::{self, AcpiPower};
use vmm_core::devices::console::{Console, TAIL_SIZE};
use vmm_core::devices::i8042::{self, I8042};
use vmm_core::devices::serial::{self, Serial};

/// Where the devices are, and some ports around them.
const BASES: [u64; 4] = [0x3f8 - 2, 0x60 - 2, 0x600 - 2, 0];

fn run(input: &mut Input<'_>) -> Option<()> {
    let irqfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
    let irqfd = Arc::new(irqfd);
    let console = Arc::new(Console::new(None).expect("no descriptor"));
    let serial = Arc::new(Serial::new(Arc::clone(&console), Arc::clone(&irqfd)));
    let mut bus = Bus::new();
    let inserted = [
        bus.insert(0x3f8, serial::PORT_COUNT, Arc::clone(&serial) as _),
        bus.insert(0x60, i8042::PORT_COUNT, Arc::new(I8042)),
        bus.insert(
            0x600,
            acpi_power::PORT_COUNT,
            Arc::new(AcpiPower::new(5, 1)),
        ),
    ];
    assert!(inserted.iter().all(Result::is_ok));
    while let Some(operation) = input.u8() {
        let base = BASES[usize::from(operation & 3)];
        let offset = input.u8()?;
        let port = match base {
            0 => input.u64()?,
            base => base + u64::from(offset % 12),
        };
        // Every width that a vCPU has, and none.
        let len = usize::from(operation >> 2) % 9;
        if operation & 0x80 == 0 {
            let mut data = [0xaa; 16];
            bus.read(port, &mut data[..len]);
            assert_eq!(data[len..], [0xaa; 16][len..]);
        } else {
            let data = input.bytes(len);
            let outcome = bus.write(port, data);
            let may_end = [0x5ff, 0x600, 0x601, 0x602].contains(&port) || port <= 0x64;
            assert!(
                outcome == Outcome::Continue || may_end,
                "{port:#x} {data:x?}"
            );
        }
    }
    assert!(console.tail().len() <= TAIL_SIZE);
    let _line = console.panic_line();
    let state = serial.save();
    let restored = Serial::restore(&state, console, irqfd).expect("a state of ours");
    assert_eq!(restored.save(), state);
    Some(())
}

fuzz_target!(|data: &[u8]| {
    run(&mut Input::new(data));
});
