//! Addresses in text, as requests carry them.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use protocols::agent_types::IPAddress;

use crate::error::{AgentError, Result};

/// # Errors
/// The text is no address.
pub(super) fn ip_address(text: &str) -> Result<IpAddr> {
    text.parse()
        .map_err(|_| AgentError::invalid("IP address", text))
}

/// An address and the length of its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Prefix {
    pub(super) address: IpAddr,
    pub(super) length: u8,
}

impl Prefix {
    fn new(address: IpAddr, length: &str) -> Option<Self> {
        let length = length.parse().ok()?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        (length <= longest).then_some(Self { address, length })
    }
}

impl FromStr for Prefix {
    type Err = AgentError;

    /// `10.0.0.0/8`; a bare address is its own prefix.
    fn from_str(text: &str) -> Result<Self> {
        let (address, length) = text.split_once('/').unwrap_or((text, ""));
        let address = ip_address(address)?;
        let length = match length {
            "" if address.is_ipv4() => "32",
            "" => "128",
            length => length,
        };
        Self::new(address, length).ok_or_else(|| AgentError::invalid("IP prefix", text))
    }
}

impl TryFrom<&IPAddress> for Prefix {
    type Error = AgentError;

    fn try_from(source: &IPAddress) -> Result<Self> {
        Self::new(ip_address(&source.address)?, &source.mask)
            .ok_or_else(|| AgentError::invalid("prefix length", source.mask.as_str()))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MacAddress(pub(super) [u8; 6]);

impl FromStr for MacAddress {
    type Err = AgentError;

    fn from_str(text: &str) -> Result<Self> {
        let invalid = || AgentError::invalid("hardware address", text);
        let bytes = text
            .split(':')
            .map(|byte| {
                u8::from_str_radix(byte, 16)
                    .ok()
                    .filter(|_| byte.len() == 2)
            })
            .collect::<Option<Vec<u8>>>()
            .ok_or_else(invalid)?;
        bytes.try_into().map(Self).map_err(|_| invalid())
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, byte) in self.0.iter().enumerate() {
            let separator = if place == 0 { "" } else { ":" };
            write!(formatter, "{separator}{byte:02x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_checked_against_their_family() {
        assert_eq!("10.0.0.0/8".parse::<Prefix>().unwrap().length, 8);
        assert_eq!("10.0.0.1".parse::<Prefix>().unwrap().length, 32);
        assert_eq!("fd00::/64".parse::<Prefix>().unwrap().length, 64);
        for text in ["10.0.0.0/33", "x/8", "10.0.0.0/-1", ""] {
            assert!(text.parse::<Prefix>().is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn hardware_addresses_round_trip(bytes: [u8; 6]) {
            let text = MacAddress(bytes).to_string();
            assert_eq!(text.parse::<MacAddress>().unwrap(), MacAddress(bytes));
        }

        #[test]
        fn any_text_is_parsed(text in ".*") {
            let _ = text.parse::<Prefix>();
            let _ = text.parse::<MacAddress>();
        }
    }
}
