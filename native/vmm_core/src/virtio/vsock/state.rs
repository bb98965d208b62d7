//! What a snapshot keeps of the device: whose it is, and whether the driver used it.
//!
//! Connections are not kept: their host ends are sockets of a process that will be gone. A guest
//! whose device was active is told so when it goes on.

use serde::{Deserialize, Serialize};

use crate::virtio::device::{DeviceError, DeviceKind};

/// Of the fields below; another is another format.
const VERSION: u8 = 1;

/// The device's part of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VsockState {
    version: u8,
    /// The guest's context id.
    pub(super) guest_cid: u64,
    /// The driver had set the device up, so it may have had connections.
    pub(super) was_active: bool,
}

impl VsockState {
    /// Of the present version.
    pub(super) fn new(guest_cid: u64, was_active: bool) -> Self {
        Self {
            version: VERSION,
            guest_cid,
            was_active,
        }
    }

    /// As bytes.
    ///
    /// # Errors
    /// Never for these fields.
    pub(super) fn encode(self) -> Result<Vec<u8>, DeviceError> {
        postcard::to_stdvec(&self).map_err(|error| refused(error.to_string()))
    }

    /// From bytes of a snapshot, which anybody may have written.
    ///
    /// # Errors
    /// They are no such state, or of another version.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, DeviceError> {
        let (state, rest) =
            postcard::take_from_bytes::<Self>(bytes).map_err(|error| refused(error.to_string()))?;
        if state.version != VERSION {
            return Err(refused(format!(
                "version {} is not {VERSION}",
                state.version
            )));
        }
        if !rest.is_empty() {
            return Err(refused(format!("{} bytes too many", rest.len())));
        }
        Ok(state)
    }
}

/// The state does not fit this device, for this reason.
pub(super) fn refused(reason: String) -> DeviceError {
    DeviceError::State {
        kind: DeviceKind::Vsock.name(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_encoded_is_read_back(guest_cid: u64, was_active: bool) {
            let state = VsockState::new(guest_cid, was_active);
            prop_assert_eq!(VsockState::decode(&state.encode().unwrap()).unwrap(), state);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..32)) {
            if let Ok(state) = VsockState::decode(&bytes) {
                prop_assert_eq!(state.version, VERSION);
            }
        }
    }

    #[test]
    fn another_version_and_trailing_bytes_are_refused() {
        let mut bytes = VsockState::new(3, true).encode().unwrap();
        bytes.push(0);
        assert!(VsockState::decode(&bytes).is_err());
        bytes.pop();
        bytes[0] = VERSION + 1;
        assert!(VsockState::decode(&bytes).is_err());
        assert!(VsockState::decode(&bytes[..1]).is_err());
    }
}
