//! The control queue (virtio 1.2, 5.1.6.5): the driver says how many pairs of queues it uses.
//!
//! A command is a class, a number and its data, then a byte for the answer. Other commands than
//! ours are refused, which tells the driver that we do not have them.

use virtio_core::chain::Chain;

/// `VIRTIO_NET_CTRL_MQ`, `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
const MQ_CLASS: u8 = 4;
const MQ_PAIRS_SET: u8 = 0;
/// `VIRTIO_NET_OK`, `VIRTIO_NET_ERR`.
const OK: u8 = 0;
const ERROR: u8 = 1;
/// Class and number.
const HEADER_SIZE: usize = 2;

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Use this many pairs from now on.
    SetPairs(u16),
    /// Something we do not have, or nonsense.
    Unknown,
}

impl Command {
    /// Read a command; `None` if there is no room for the answer, and so no command.
    pub(super) fn parse(chain: &Chain) -> Option<Self> {
        if chain.writable.is_empty() {
            return None;
        }
        let header: Option<[u8; HEADER_SIZE]> = chain.readable.read_array(0);
        let command = match header {
            Some([MQ_CLASS, MQ_PAIRS_SET]) => {
                let pairs: Option<[u8; 2]> = chain.readable.read_array(HEADER_SIZE);
                pairs.map(u16::from_le_bytes).map(Self::SetPairs)
            }
            _ => None,
        };
        Some(command.unwrap_or(Self::Unknown))
    }
}

/// Write the answer; gives the bytes written.
pub(super) fn answer(chain: &Chain, is_done: bool) -> u32 {
    let status = if is_done { OK } else { ERROR };
    u32::from(chain.writable.copy_from(0, &[status]) == 1)
}

#[cfg(test)]
mod tests {
    use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};

    use super::*;

    fn parse(bytes: &[u8], split: &[u32], room: u32) -> Option<Command> {
        let ram = mock_ram(0x1_0000);
        let mut driver = MockDriver::new(&ram, 0, 16);
        driver.write(0x8000, bytes);
        let mut buffers = Vec::new();
        let mut at = 0x8000;
        for len in split {
            buffers.push(MockBuffer::readable(at, *len));
            at += u64::from(*len);
        }
        if room > 0 {
            buffers.push(MockBuffer::writable(0x9000, room));
        }
        driver.add(&buffers);
        let mut chain = Chain::new(&ram);
        assert!(driver.ring(false).unwrap().pop(&mut chain).unwrap());
        Command::parse(&chain)
    }

    #[test]
    fn pairs_are_set_however_the_command_is_split() {
        for split in [&[4][..], &[2, 2], &[1, 1, 1, 1], &[3, 1]] {
            let command = parse(&[4, 0, 3, 1], split, 1);
            assert_eq!(command, Some(Command::SetPairs(0x103)));
        }
    }

    #[test]
    fn what_is_no_command_of_ours_is_unknown() {
        assert_eq!(parse(&[4, 1, 1, 0], &[4], 1), Some(Command::Unknown));
        assert_eq!(parse(&[0, 0, 1, 0], &[4], 1), Some(Command::Unknown));
        assert_eq!(parse(&[4, 0, 1], &[3], 1), Some(Command::Unknown));
        assert_eq!(parse(&[4], &[1], 1), Some(Command::Unknown));
        assert_eq!(parse(&[], &[], 1), Some(Command::Unknown));
    }

    #[test]
    fn without_room_for_an_answer_there_is_no_command() {
        assert_eq!(parse(&[4, 0, 1, 0], &[4], 0), None);
    }
}
