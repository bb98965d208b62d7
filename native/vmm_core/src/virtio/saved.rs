//! A device's part of a snapshot as bytes, and back.
//!
//! Each device says in its `state.rs` what it keeps; how that is encoded, and what is said of
//! bytes that are none, is the same for all. Called on the I/O thread.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::virtio::device::{DeviceError, DeviceKind};

/// Encode what a device keeps.
///
/// # Errors
/// It can not be encoded, which plain data always can.
pub(crate) fn encode<T: Serialize>(kind: DeviceKind, state: &T) -> Result<Vec<u8>, DeviceError> {
    postcard::to_stdvec(state).map_err(|error| refused(kind, error.to_string()))
}

/// Decode all of `bytes`.
///
/// # Errors
/// They are of another device or version.
pub(crate) fn decode<T: DeserializeOwned>(
    kind: DeviceKind,
    bytes: &[u8],
) -> Result<T, DeviceError> {
    match postcard::take_from_bytes(bytes) {
        Ok((state, [])) => Ok(state),
        Ok((_, rest)) => {
            let reason = format!("{} bytes more than this device keeps", rest.len());
            Err(refused(kind, reason))
        }
        Err(error) => Err(refused(kind, error.to_string())),
    }
}

/// The error for a state that can not be taken over.
pub(crate) fn refused(kind: DeviceKind, reason: impl Into<String>) -> DeviceError {
    DeviceError::State {
        kind: kind.name(),
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_comes_back_and_nothing_else_does() {
        let bytes = encode(DeviceKind::Rng, &(7u32, true)).unwrap();
        let state: (u32, bool) = decode(DeviceKind::Rng, &bytes).unwrap();
        assert_eq!(state, (7, true));
        for (wrong, reason) in [
            (
                &[7, 1, 0][..],
                "restore rng: 1 bytes more than this device keeps",
            ),
            (&[7, 9], "restore rng: Found a bool that wasn't 0 or 1"),
        ] {
            let error = decode::<(u32, bool)>(DeviceKind::Rng, wrong).unwrap_err();
            assert_eq!(error.to_string(), reason);
        }
        assert!(decode::<(u32, bool)>(DeviceKind::Rng, &[]).is_err());
    }
}
