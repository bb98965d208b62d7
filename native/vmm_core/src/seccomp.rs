//! What a thread of the machine may ask of the kernel.

use std::io;

use crate::thread::Kind;

/// Confine the calling thread for good.
pub(crate) fn confine(_kind: Kind) -> io::Result<()> {
    Ok(())
}
