//! Moves requests between the ring and the engine.
//!
//! ```text
//!   turn:  fetch ─► run ─► settle ─► … ─► one signal
//!            ▲  (bounded by a budget) │
//!            └────────────────────────┘
//!   drain: run ─► settle ─► wait ─► … until nothing is under way
//! ```
//!
//! A turn takes requests from the ring while there are some, places for them and tokens of the
//! rate limiter; lets the engine run; and gives back what is finished. What a turn's budget leaves
//! is done in another turn, after the other devices had theirs. A request that has to wait for
//! the limiter is put back into the ring, so a pause finds none that is neither here nor there.
//! Used by `device.rs` under the transport's lock.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_core::ram::GuestRam;

use super::disk::Disk;
use super::engine::{Engine, Finished, MAX_IN_FLIGHT};
use super::metrics::BlockMetrics;
use super::request::{Next, Operation, Request, Status, Terms};
use crate::virtio::device::{DeviceError, Queue};
use crate::virtio::throttle::Throttle;

/// What one turn may do before other devices get theirs: steps begun, ...
const TURN_STEPS: u32 = 256;
/// ... bytes they move, ...
const TURN_BYTES: u64 = 16 << 20;
/// ... and time, looked at between steps.
const TURN_TIME: Duration = Duration::from_millis(2);

/// A disk's moving parts.
#[derive(Debug)]
pub(super) struct Pump {
    pub(super) disk: Disk,
    pub(super) engine: Engine,
    pub(super) throttle: Option<Throttle>,
    pub(super) metrics: BlockMetrics,
    /// Boxes not in use.
    #[expect(
        clippy::vec_box,
        reason = "a request moves between owners as a pointer"
    )]
    spare: Vec<Box<Request>>,
    /// Empty between uses; kept for its room.
    finished: Vec<Finished>,
}

/// What requests come from and go back to.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) ram: Arc<GuestRam>,
    pub(super) queue: Queue,
    pub(super) terms: Terms,
}

/// What a turn may still do.
struct Budget {
    steps: u32,
    bytes: u64,
    deadline: Instant,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self {
            steps: TURN_STEPS,
            bytes: TURN_BYTES,
            deadline: now + TURN_TIME,
        }
    }

    fn spend(&mut self, request: &Request) {
        let step = request.step();
        self.steps = self.steps.saturating_sub(1);
        if matches!(
            step.operation,
            Operation::Read | Operation::Write | Operation::WriteZeros
        ) {
            self.bytes = self.bytes.saturating_sub(step.len);
        }
    }

    fn has_steps(&self) -> bool {
        self.steps > 0 && self.bytes > 0
    }

    fn is_spent(&self) -> bool {
        !self.has_steps() || Instant::now() >= self.deadline
    }
}

/// Why no more requests were taken from the ring.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fetched {
    /// There are none.
    All,
    /// The rate limiter's timer will tell when to go on.
    Throttled,
    /// As many are under way as may be.
    Full,
    /// The budget is spent.
    Enough,
}

impl Pump {
    pub(super) fn new(disk: Disk, engine: Engine, throttle: Option<Throttle>) -> Self {
        Self {
            disk,
            engine,
            throttle,
            metrics: BlockMetrics::default(),
            spare: Vec::new(),
            finished: Vec::new(),
        }
    }

    // --- turns ---------------------------------------------------------------------------------

    /// Work until nothing is left to do now, or the budget is spent.
    pub(super) fn turn(&mut self, source: &mut Source) -> Result<(), DeviceError> {
        self.metrics.turns += 1;
        let result = self.work(source);
        source.queue.signal();
        result
    }

    fn work(&mut self, source: &mut Source) -> Result<(), DeviceError> {
        let now = Instant::now();
        let mut budget = Budget::new(now);
        source.queue.ring.disable_kicks();
        loop {
            let fetched = self.fetch(source, now, &mut budget)?;
            self.run(budget.deadline)?;
            let has_progress = self.settle(Some((source, &mut budget)));
            if budget.is_spent() {
                source.queue.kick_self();
                return Ok(());
            }
            if self.engine.has_queued() {
                if has_progress {
                    continue;
                }
                // The kernel takes no more for the moment.
                source.queue.kick_self();
                return Ok(());
            }
            match fetched {
                Fetched::All if source.queue.ring.enable_kicks() => {
                    source.queue.ring.disable_kicks();
                    // Chains that are none cost nothing else, and could come for ever.
                    budget.steps = budget.steps.saturating_sub(1);
                }
                Fetched::Full if has_progress => {}
                // A kick, a completion or the timer will come.
                _ => return Ok(()),
            }
        }
    }

    /// Hand requests from the ring to the engine.
    fn fetch(
        &mut self,
        source: &mut Source,
        now: Instant,
        budget: &mut Budget,
    ) -> Result<Fetched, DeviceError> {
        loop {
            if !budget.has_steps() {
                return Ok(Fetched::Enough);
            }
            if self.engine.in_flight() >= usize::from(MAX_IN_FLIGHT) {
                return Ok(Fetched::Full);
            }
            let spare = self.spare.pop();
            let mut request = spare.unwrap_or_else(|| Box::new(Request::new(&source.ram)));
            let ring = &mut source.queue.ring;
            let popped = ring.pop(&mut request.chain);
            if !popped.map_err(DeviceError::ring(0))? {
                self.spare.push(request);
                return Ok(Fetched::All);
            }
            let next = request.begin(&self.disk, &source.terms);
            if let Some(throttle) = &mut self.throttle {
                let taken = throttle.try_take(now, 1, request.cost_bytes(&self.disk));
                if !taken.map_err(DeviceError::system("arm the rate limiter's timer"))? {
                    ring.unpop(1);
                    self.recycle(request);
                    self.metrics.throttled += 1;
                    return Ok(Fetched::Throttled);
                }
            }
            budget.spend(&request);
            match next {
                Next::Step => self.engine.submit(request, &self.disk),
                Next::Finished(status) => self.complete(&mut source.queue, request, status),
            }
        }
    }

    fn run(&mut self, deadline: Instant) -> Result<(), DeviceError> {
        let run = self.engine.run(&self.disk, deadline, &mut self.finished);
        run.map_err(|source| DeviceError::System {
            operation: "submit disk requests to io_uring",
            source,
        })
    }

    /// Take every finished step one further, or the request back; without a source the requests are
    /// dropped. False: nothing was finished.
    fn settle(&mut self, mut target: Option<(&mut Source, &mut Budget)>) -> bool {
        let mut finished = mem::take(&mut self.finished);
        let has_progress = !finished.is_empty();
        for (mut request, result) in finished.drain(..) {
            let Some((source, budget)) = &mut target else {
                self.recycle(request);
                continue;
            };
            let operation = request.step().operation;
            if let Ok(count) = result {
                match operation {
                    Operation::Read => self.metrics.read_bytes += count as u64,
                    Operation::Write => self.metrics.written_bytes += count as u64,
                    _ => {}
                }
            }
            match request.advance(result, &mut self.disk) {
                Next::Step => {
                    self.metrics.continued_steps += 1;
                    budget.spend(&request);
                    self.engine.submit(request, &self.disk);
                }
                Next::Finished(status) => self.complete(&mut source.queue, request, status),
            }
        }
        self.finished = finished;
        has_progress
    }

    /// Give a request back to the driver.
    fn complete(&mut self, queue: &mut Queue, request: Box<Request>, status: Status) {
        let written = request.answer(status);
        queue.ring.complete(request.chain.head, written);
        self.metrics.count(request.kind(), status);
        self.recycle(request);
    }

    fn recycle(&mut self, request: Box<Request>) {
        if request.is_reusable() {
            self.spare.push(request);
        }
    }

    // --- draining ------------------------------------------------------------------------------

    /// Wait for what is under way; with `source` it is given back to the driver, without it is
    /// dropped.
    pub(super) fn drain(
        &mut self,
        mut source: Option<&mut Source>,
        timeout: Duration,
    ) -> Result<(), DeviceError> {
        let now = Instant::now();
        let deadline = now + timeout;
        while self.engine.in_flight() > 0 {
            self.run(deadline)?;
            let mut budget = Budget::new(now);
            let target = source.as_deref_mut().map(|source| (source, &mut budget));
            let has_progress = self.settle(target);
            let is_stuck = !has_progress || Instant::now() >= deadline;
            if is_stuck && self.engine.in_flight() > 0 {
                let waited = self.engine.wait(deadline);
                waited.map_err(|source| DeviceError::System {
                    operation: "wait for disk requests under way",
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// Free what is only kept to be reused.
    pub(super) fn shrink(&mut self) {
        self.spare = Vec::new();
    }

    #[cfg(test)]
    pub(super) fn spare(&self) -> impl ExactSizeIterator<Item = &Request> {
        self.spare.iter().map(Box::as_ref)
    }
}
