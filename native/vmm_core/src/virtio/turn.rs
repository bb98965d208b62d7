//! One turn at a queue, for devices that answer each request at once.
//!
//! ```text
//!   no kicks, please ─► request, answer ─► … ─► drained? kicks again ─► one interrupt
//!                                          └──► budget used, or later: leave the rest
//! ```
//!
//! The budget keeps one queue from holding the I/O thread: what is left brings the device back by
//! its own doorbell, after everybody else had a turn.

use virtio_core::chain::Chain;

use crate::virtio::device::{DeviceError, Queue};

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// It is done: give it back with `len` bytes written; it took `cost` of the budget.
    Done {
        /// Bytes written.
        len: u32,
        /// Share of the turn's budget.
        cost: usize,
    },
    /// It has to wait: put it back and end the turn. Whoever says this comes back by itself.
    Later,
}

impl Queue {
    /// Take requests through `chain` and have `serve` answer them, until there are none, `budget`
    /// is used up, or one has to wait.
    ///
    /// # Errors
    /// The driver broke the rules of the ring.
    pub(crate) fn turn(
        &mut self,
        chain: &mut Chain,
        mut budget: usize,
        mut serve: impl FnMut(&mut Chain) -> Served,
    ) -> Result<(), DeviceError> {
        self.ring.disable_kicks();
        loop {
            if budget == 0 {
                self.kick_self();
                break;
            }
            if !self
                .ring
                .pop(chain)
                .map_err(DeviceError::ring(self.index))?
            {
                if self.ring.enable_kicks() {
                    self.ring.disable_kicks();
                    // Malformed chains cost a turn, too: a driver may add them without end.
                    budget -= 1;
                    continue;
                }
                break;
            }
            match serve(chain) {
                Served::Done { len, cost } => {
                    self.ring.complete(chain.head, len);
                    budget = budget.saturating_sub(cost.max(1));
                }
                Served::Later => {
                    self.ring.unpop(1);
                    break;
                }
            }
        }
        self.signal();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};

    use super::*;
    use crate::virtio::mock::MockTransport;

    const DONE: Served = Served::Done { len: 7, cost: 1 };

    struct Fixture {
        driver: MockDriver,
        transport: MockTransport,
        queue: Queue,
        chain: Chain,
    }

    fn fixture(requests: usize) -> Fixture {
        let ram = mock_ram(0x1_0000);
        let mut driver = MockDriver::new(&ram, 0, 16);
        for _ in 0..requests {
            driver.add(&[MockBuffer::writable(0x8000, 16)]);
        }
        let transport = MockTransport::new(&ram, 1);
        let mut activation = transport.activation(0, &[Some(&driver)]);
        Fixture {
            queue: activation.take_queue(0).unwrap(),
            chain: Chain::new(&ram),
            driver,
            transport,
        }
    }

    #[test]
    fn a_drained_queue_is_signalled_once_and_wants_kicks() {
        let mut test = fixture(3);
        test.queue.turn(&mut test.chain, 10, |_| DONE).unwrap();
        let used = test.driver.take_used();
        assert_eq!(
            used.iter().map(|used| used.len).collect::<Vec<_>>(),
            [7, 7, 7]
        );
        assert_eq!(test.transport.interrupt.raised(), 1);
        assert!(!test.driver.is_kick_unwanted());
        assert!(!test.transport.is_kicked(0));
    }

    #[test]
    fn a_used_up_budget_leaves_the_rest_for_another_turn() {
        let mut test = fixture(3);
        let cost = |_: &mut Chain| Served::Done { len: 0, cost: 5 };
        test.queue.turn(&mut test.chain, 10, cost).unwrap();
        assert_eq!(test.driver.take_used().len(), 2);
        assert!(test.driver.is_kick_unwanted());
        assert!(test.transport.is_kicked(0));
        test.queue.turn(&mut test.chain, 10, cost).unwrap();
        assert_eq!(test.driver.take_used().len(), 1);
        assert!(!test.driver.is_kick_unwanted());
    }

    #[test]
    fn a_request_that_waits_is_there_the_next_time() {
        let mut test = fixture(2);
        let mut answers = [DONE, Served::Later].into_iter();
        let serve = |_: &mut Chain| answers.next().unwrap();
        test.queue.turn(&mut test.chain, 10, serve).unwrap();
        assert_eq!(test.driver.take_used().len(), 1);
        assert!(!test.transport.is_kicked(0));
        test.queue.turn(&mut test.chain, 10, |_| DONE).unwrap();
        assert_eq!(test.driver.take_used()[0].head, 1);
    }

    #[test]
    fn a_driver_without_rules_ends_it() {
        let mut test = fixture(0);
        test.driver.set_available_index(1000);
        let error = test.queue.turn(&mut test.chain, 10, |_| DONE);
        assert!(matches!(error, Err(DeviceError::Ring { index: 0, .. })));
    }
}
