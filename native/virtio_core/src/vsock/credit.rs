//! Credit of one stream: how much each side may still send. All counters wrap at 2^32.
//!
//! virtio 1.2, section 5.10.6.3: a side may have `buf_alloc` unconsumed bytes under way to the
//! other; `fwd_cnt` tells how many were consumed in all. Our `fwd_cnt` counts bytes given to the
//! host socket, so a host that does not read stops the guest after [`BUFFER_SIZE`] bytes.
//! Pure arithmetic, called by the connection on the I/O thread.

/// Bytes a connection buffers for a host that does not read: our `buf_alloc`.
pub const BUFFER_SIZE: u32 = 256 * 1024;

/// Tell the guest of new room when its view of it falls below this.
const UPDATE_THRESHOLD: u32 = BUFFER_SIZE / 2;

/// Both directions' counters.
#[derive(Clone, Debug, Default)]
pub struct Credit {
    /// Bytes we sent to the guest.
    sent: u32,
    /// The guest's buffer space, as last told.
    peer_buf_alloc: u32,
    /// Bytes the guest consumed, as last told.
    peer_fwd_cnt: u32,
    /// Bytes we received from the guest.
    received: u32,
    /// Bytes of those that reached the host socket.
    forwarded: u32,
    /// The value of `forwarded` the guest knows.
    told_forwarded: u32,
    /// A credit request is unanswered.
    has_asked: bool,
}

impl Credit {
    /// Take over what the guest says about its side.
    pub fn learn(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_buf_alloc = buf_alloc;
        self.peer_fwd_cnt = fwd_cnt;
        if self.peer_free() > 0 {
            self.has_asked = false;
        }
    }

    /// Bytes the guest has room for. A guest that counts nonsense has none.
    pub fn peer_free(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight)
    }

    /// We sent `len` bytes, at most [`Credit::peer_free`].
    pub fn send(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }

    /// Account for `len` bytes from the guest; false if it had no credit for them.
    #[must_use]
    pub fn receive(&mut self, len: u32) -> bool {
        if len > BUFFER_SIZE - self.buffered() {
            return false;
        }
        self.received = self.received.wrapping_add(len);
        true
    }

    /// Received bytes that have not reached the host socket; at most [`BUFFER_SIZE`].
    pub fn buffered(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// `len` buffered bytes reached the host socket.
    pub fn forward(&mut self, len: u32) {
        debug_assert!(len <= self.buffered());
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// Our `fwd_cnt`.
    pub fn forwarded(&self) -> u32 {
        self.forwarded
    }

    /// The guest believes we have little room although we have more.
    pub fn is_update_due(&self) -> bool {
        let known_in_flight = self.received.wrapping_sub(self.told_forwarded);
        self.forwarded != self.told_forwarded
            && BUFFER_SIZE.saturating_sub(known_in_flight) < UPDATE_THRESHOLD
    }

    /// The guest was told our current `fwd_cnt`.
    pub fn told(&mut self) {
        self.told_forwarded = self.forwarded;
    }

    /// True the first time since the guest last had room.
    pub fn ask_once(&mut self) -> bool {
        !std::mem::replace(&mut self.has_asked, true)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against plain 64-bit counters that never wrap.
        #[test]
        fn counters_agree_with_ones_that_never_wrap(
            start in any::<u32>(),
            steps in proptest::collection::vec((any::<bool>(), 0u32..=70_000, 0u32..=70_000), 1..200),
        ) {
            let mut credit = Credit { sent: start, peer_fwd_cnt: start, received: start, forwarded: start, told_forwarded: start, peer_buf_alloc: 65_536, has_asked: false };
            let (mut sent, mut consumed, mut received, mut forwarded) = (0u64, 0u64, 0u64, 0u64);
            for (is_send, amount, part) in steps {
                if is_send {
                    prop_assert_eq!(u64::from(credit.peer_free()), 65_536 - (sent - consumed));
                    let len = amount.min(credit.peer_free());
                    credit.send(len);
                    sent += u64::from(len);
                    consumed += u64::from(part).min(sent - consumed);
                    #[expect(clippy::cast_possible_truncation, reason = "the protocol's modulo 2^32")]
                    credit.learn(65_536, start.wrapping_add(consumed as u32));
                } else {
                    let fits = received - forwarded + u64::from(amount) <= u64::from(BUFFER_SIZE);
                    prop_assert_eq!(credit.receive(amount), fits);
                    if fits { received += u64::from(amount); }
                    let len = u64::from(part).min(received - forwarded);
                    credit.forward(u32::try_from(len).unwrap());
                    forwarded += len;
                    prop_assert_eq!(u64::from(credit.buffered()), received - forwarded);
                }
            }
        }

        #[test]
        fn a_guest_that_lies_never_gets_more_than_it_offers(
            sent in any::<u32>(), buf_alloc in any::<u32>(), fwd_cnt in any::<u32>(),
        ) {
            let mut credit = Credit { sent, ..Default::default() };
            credit.learn(buf_alloc, fwd_cnt);
            prop_assert!(credit.peer_free() <= buf_alloc);
        }

        /// A guest that always waits for credit is never left waiting once the host has read all.
        #[test]
        fn a_waiting_guest_is_always_told_of_room(lens in proptest::collection::vec(1u32..=65_536, 1..100)) {
            let mut credit = Credit::default();
            let mut guest_room = BUFFER_SIZE;
            for len in lens {
                let len = len.min(guest_room);
                prop_assert!(credit.receive(len));
                guest_room -= len;
                credit.forward(len);
                if credit.is_update_due() {
                    credit.told();
                    guest_room = BUFFER_SIZE;
                }
                prop_assert!(guest_room >= UPDATE_THRESHOLD);
            }
        }
    }

    #[test]
    fn asking_happens_once_until_there_is_room() {
        let mut credit = Credit::default();
        assert!(credit.ask_once());
        assert!(!credit.ask_once());
        credit.learn(10, 0);
        assert!(credit.ask_once());
    }
}
