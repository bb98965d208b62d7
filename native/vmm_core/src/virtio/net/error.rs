//! Why there can be no such card. Every error is of its making: once it runs, what goes wrong is
//! counted, or takes the link down.

use std::io;

use thiserror::Error;

use super::{MAX_QUEUE_PAIRS, MIN_MTU};
use crate::virtio::throttle::ThrottleError;

/// Why a card can not be made.
#[derive(Debug, Error)]
pub enum NetError {
    /// no pairs, or too many
    #[error("{count} queue pairs: 1 to {MAX_QUEUE_PAIRS} can be had")]
    QueuePairs {
        /// Pairs asked for.
        count: u16,
    },
    /// the address of nobody, or of many
    #[error("{mac:02x?} is no address of one card")]
    Mac {
        /// The address.
        mac: [u8; 6],
    },
    /// too small an MTU
    #[error("an MTU of {mtu}: {MIN_MTU} is the least")]
    Mtu {
        /// The MTU.
        mtu: u16,
    },
    /// the tap can not be used
    #[error(transparent)]
    Tap(#[from] TapError),
    /// the limits make no sense
    #[error("{direction} limits")]
    Limiter {
        /// `receive` or `transmit`.
        direction: &'static str,
        /// The cause.
        #[source]
        source: ThrottleError,
    },
}

/// Why a tap can not be used. Each text says what to do next, where that is known.
#[derive(Debug, Error)]
pub enum TapError {
    /// a name that no interface has
    #[error("{name:?} is no interface name: 1 to 15 bytes without '/' and spaces")]
    Name {
        /// The name.
        name: String,
    },
    /// there is no such interface
    #[error(
        "tap {name} is missing in this network namespace: create it before the machine, or open it \
         in its own namespace and hand over the descriptors"
    )]
    Missing {
        /// Its name.
        name: String,
    },
    /// the kernel has no taps
    #[error("open /dev/net/tun: load the kernel's tun module, or let this process have the device")]
    Unavailable(#[source] io::Error),
    /// somebody else uses it
    #[error("tap {name} is busy: another process has its queue, or all of them")]
    Busy {
        /// Its name.
        name: String,
    },
    /// not ours to use
    #[error(
        "tap {name} is not ours: create it with this process's user or group as owner, or run with \
         CAP_NET_ADMIN"
    )]
    NoPermission {
        /// Its name.
        name: String,
    },
    /// an interface of another kind
    #[error(
        "interface {name} can not be used with {queue_pairs} queue pairs: it has to be a tap, and \
         made with multi_queue for more than one pair, without for one"
    )]
    Kind {
        /// Its name.
        name: String,
        /// Pairs asked for.
        queue_pairs: u16,
    },
    /// descriptors and pairs do not match
    #[error("{given} tap descriptors for {queue_pairs} queue pairs")]
    Count {
        /// Descriptors.
        given: usize,
        /// Pairs asked for.
        queue_pairs: u16,
    },
    /// a descriptor that is no tap's, or was opened otherwise
    #[error(
        "descriptor {fd} is no queue of a tap opened with IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, and \
         IFF_MULTI_QUEUE for more than one pair"
    )]
    Descriptor {
        /// Its number.
        fd: i32,
    },
    /// a call that should not fail
    #[error("{operation}")]
    System {
        /// What was attempted.
        operation: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}
