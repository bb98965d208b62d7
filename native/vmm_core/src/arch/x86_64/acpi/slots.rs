//! The AML of hot-plug: hidden devices, and the event that makes the kernel look for new ones.
//!
//! ```text
//!   SLTR: register, a bit for each device     GED_: interrupt ─▶ _EVT: Notify (SLTS, bus check)
//!   SLTS: container ─▶ VRnn: _STA reads its bit
//! ```
//!
//! A kernel looks through a container again when it is notified, and starts what has a status it
//! had not before. The register's other side is `devices/acpi_slots.rs`.

use acpi_tables::aml::{
    Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Interrupt,
    Method, Name, Notify, OpRegion, OpRegionSpace, Path, ResourceTemplate, Return, Scope, ZERO,
};

use super::encode;
use crate::arch::layout;

/// Devices that the register has a bit for.
pub(super) const BITS: usize = 32;
/// Present, enabled, shown, working (ACPI 6.5, 6.3.7).
const STATUS_THERE: u8 = 0xf;
const CONTAINER: &str = "\\_SB_.SLTS";

/// Everything but the devices themselves, `hidden`, which are AML already.
pub(super) fn build(hidden: Vec<u8>) -> Vec<u8> {
    let bits = (0..BITS).map(|number| FieldEntry::Named(bit(number), 1));
    [
        encode(&OpRegion::new(
            Path::new("SLTR"),
            OpRegionSpace::SystemIO,
            &layout::SLOTS_PORT,
            &(BITS / 8),
        )),
        encode(&Field::new(
            Path::new("SLTR"),
            FieldAccessType::DWord,
            FieldLockRule::NoLock,
            FieldUpdateRule::Preserve,
            bits.collect(),
        )),
        encode(&Device::new(
            Path::new("SLTS"),
            vec![
                &Name::new(Path::new("_HID"), &"ACPI0004"),
                &Name::new(Path::new("_UID"), &"slots"),
            ],
        )),
        event_device(),
        Scope::raw(Path::new(CONTAINER), hidden),
    ]
    .concat()
}

/// The generic event device (ACPI 6.5, 5.6.9).
fn event_device() -> Vec<u8> {
    let line = Interrupt::new(true, true, false, false, layout::SLOTS_GSI);
    encode(&Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&line])),
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                // 0: bus check (5.6.6).
                vec![&Notify::new(&Path::new(CONTAINER), &ZERO)],
            ),
        ],
    ))
}

/// The `_STA` of device `number`.
pub(super) fn status(number: usize) -> Vec<u8> {
    let bit = Path::new(&String::from_utf8_lossy(&bit(number)));
    encode(&Method::new(
        Path::new("_STA"),
        0,
        false,
        vec![
            &If::new(&bit, vec![&Return::new(&STATUS_THERE)]),
            &Return::new(&ZERO),
        ],
    ))
}

/// The name of a device's bit: `S000` and so on.
fn bit(number: usize) -> [u8; 4] {
    let mut name = *b"S000";
    for (letter, digit) in name.iter_mut().skip(1).zip(format!("{number:03}").bytes()) {
        *letter = digit;
    }
    name
}
