//! Where a guest is reached: the address forms and their limits. Parsed on the caller's thread,
//! so that a wrong address is refused before anything is posted.

use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Bytes of a Unix socket path: `sun_path` of unix(7) less its terminating zero.
const MAX_UNIX_PATH: usize = 107;
/// `VMADDR_CID_ANY` of vsock(7): a wildcard for listeners, nobody to connect to.
const CID_ANY: u32 = u32::MAX;

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// The scheme is none of ours.
    #[error("address {0:?} has none of the forms vsock://CID, hvsock:///path, unix:///path")]
    UnknownForm(String),
    /// The part after `vsock://` is no context id that can be connected to.
    #[error("{0:?} is not a guest context id")]
    BadContextId(String),
    /// A Unix path that is relative, too long for a socket, or holds a zero byte.
    #[error("{0:?} is not an absolute socket path of at most {MAX_UNIX_PATH} bytes")]
    BadPath(String),
}

/// How to reach a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `vsock://CID`: the kernel's vsock.
    Vsock {
        /// The guest's context id.
        cid: u32,
    },
    /// `hvsock:///path`: a Unix socket of the machine monitor, with a `CONNECT port` handshake.
    Hybrid {
        /// The socket of the machine monitor.
        path: PathBuf,
    },
    /// `unix:///path`: a plain Unix socket; the port plays no part.
    Unix {
        /// The socket.
        path: PathBuf,
    },
}

impl Address {
    fn unix_path(text: &str) -> Result<PathBuf, AddressError> {
        let is_usable =
            text.len() <= MAX_UNIX_PATH && !text.contains('\0') && Path::new(text).is_absolute();
        if is_usable {
            Ok(PathBuf::from(text))
        } else {
            Err(AddressError::BadPath(text.to_owned()))
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(cid) = text.strip_prefix("vsock://") {
            let bad = || AddressError::BadContextId(cid.to_owned());
            // u32::from_str also takes a leading plus sign.
            if !cid.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(bad());
            }
            match cid.parse() {
                Ok(CID_ANY) | Err(_) => Err(bad()),
                Ok(cid) => Ok(Self::Vsock { cid }),
            }
        } else if let Some(path) = text.strip_prefix("hvsock://") {
            Ok(Self::Hybrid {
                path: Self::unix_path(path)?,
            })
        } else if let Some(path) = text.strip_prefix("unix://") {
            Ok(Self::Unix {
                path: Self::unix_path(path)?,
            })
        } else {
            Err(AddressError::UnknownForm(text.to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_parses() {
        assert_eq!("vsock://3".parse(), Ok(Address::Vsock { cid: 3 }));
        assert_eq!(
            "hvsock:///run/a".parse(),
            Ok(Address::Hybrid {
                path: "/run/a".into()
            })
        );
        assert_eq!(
            "unix:///run/a".parse(),
            Ok(Address::Unix {
                path: "/run/a".into()
            })
        );
    }

    #[test]
    fn other_forms_are_refused() {
        for text in ["", "3", "tcp://1", "VSOCK://3", "unix:/a"] {
            let refused = text.parse::<Address>();
            assert!(
                matches!(refused, Err(AddressError::UnknownForm(_))),
                "{text}"
            );
        }
    }

    #[test]
    fn context_ids_are_plain_numbers_below_the_wildcard() {
        for text in [
            "vsock://",
            "vsock://-1",
            "vsock://+3",
            "vsock://4294967295",
            "vsock://3:1024",
        ] {
            let refused = text.parse::<Address>();
            assert!(
                matches!(refused, Err(AddressError::BadContextId(_))),
                "{text}"
            );
        }
    }

    #[test]
    fn paths_are_absolute_and_fit_a_socket_address() {
        let longest = format!("unix:///{}", "a".repeat(106));
        assert!(longest.parse::<Address>().is_ok());
        let too_long = format!("{longest}a");
        for text in ["unix://a", "hvsock://", "unix:///a\0b", too_long.as_str()] {
            let refused = text.parse::<Address>();
            assert!(matches!(refused, Err(AddressError::BadPath(_))), "{text}");
        }
    }
}
