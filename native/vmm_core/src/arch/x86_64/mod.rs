//! Intel and AMD, 64 bit.

pub(crate) mod probe_guest;
