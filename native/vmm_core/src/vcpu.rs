//! One virtual processor and its thread, `vcpu-N`.
//!
//! ```text
//!   parked ──run──▶ running ──park──▶ parked
//!      └──────────────stop──────────────┴─▶ ended      running ──the guest ends the machine──▶ ended
//! ```
//!
//! The state driver (`machine.rs`) says what is wanted and kicks; the thread follows. A kick is a
//! signal that the thread blocks and only `KVM_RUN` lets in, so it is never lost: one that comes
//! early ends the next run at once. While parked, the thread has let go of the vCPU, whose
//! registers the driver can then save. How a run ended for good is posted to the driver, once.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::arch;
use crate::bus::{Bus, Outcome};
use crate::kvm;
use crate::lock::lock;
use crate::thread;

/// How long after a kick another is tried. None should be needed: a guard, not a poll.
const KICK_AGAIN: Duration = Duration::from_millis(50);

/// What the driver wants of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Wait, with the vCPU let go of.
    Park,
    /// Run the guest.
    Run,
    /// End the thread.
    Stop,
}

/// Why a vCPU's thread ended of its own accord.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum VcpuEnd {
    /// The guest switched the machine off.
    Shutdown,
    /// The guest reset the machine.
    Reset,
    /// A triple fault, with registers.
    TripleFault(String),
    /// KVM could not go on, or the thread panicked.
    Failed(String),
}

/// Gets the end of a vCPU that was not asked to stop. Called once, on its thread.
pub(crate) type OnEnd = Box<dyn FnOnce(VcpuEnd) + Send>;

#[derive(Debug)]
struct Progress {
    wanted: Wanted,
    is_parked: bool,
    has_ended: bool,
}

#[derive(Debug)]
struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
    /// Held by the thread while it runs the guest, by the driver while it saves registers.
    fd: Mutex<VcpuFd>,
}

/// A vCPU with a thread. Dropping it stops the thread.
#[derive(Debug)]
pub(crate) struct Vcpu {
    index: u8,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    thread_id: i32,
}

impl Vcpu {
    /// Start the thread, parked.
    pub(crate) fn start(
        index: u8,
        fd: VcpuFd,
        ports: Arc<Bus>,
        memory_devices: Arc<Bus>,
        on_end: OnEnd,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            progress: Mutex::new(Progress {
                wanted: Wanted::Park,
                is_parked: false,
                has_ended: false,
            }),
            changed: Condvar::new(),
            fd: Mutex::new(fd),
        });
        let runner = Runner {
            shared: Arc::clone(&shared),
            ports,
            memory_devices,
            on_end: Some(on_end),
        };
        let (thread, thread_id) =
            thread::spawn(format!("vcpu-{index}"), thread::Kind::Vcpu, runner)?;
        let vcpu = Self {
            index,
            shared,
            thread: Some(thread),
            thread_id,
        };
        Ok(vcpu)
    }

    /// Its number, which is its APIC id.
    pub(crate) fn index(&self) -> u8 {
        self.index
    }

    /// The kernel's id of its thread.
    pub(crate) fn thread_id(&self) -> i32 {
        self.thread_id
    }

    /// Say what is wanted, and kick. Does not wait.
    pub(crate) fn want(&self, wanted: Wanted) {
        let mut progress = lock(&self.shared.progress);
        // A stop is final.
        if progress.wanted != Wanted::Stop {
            progress.wanted = wanted;
        }
        drop(progress);
        self.shared.changed.notify_all();
        self.kick();
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            kvm::kick(thread);
        }
    }

    /// Wait until it is parked or has ended. False: neither by `deadline`.
    pub(crate) fn wait_at_rest(&self, deadline: Instant) -> bool {
        self.wait_until(deadline, |progress| {
            progress.is_parked || progress.has_ended
        })
    }

    /// Wait until its thread has ended. False: not by `deadline`.
    pub(crate) fn wait_ended(&self, deadline: Instant) -> bool {
        self.wait_until(deadline, |progress| progress.has_ended)
    }

    fn wait_until(&self, deadline: Instant, is_there: impl Fn(&Progress) -> bool) -> bool {
        let mut progress = lock(&self.shared.progress);
        loop {
            if is_there(&progress) {
                return true;
            }
            let Some(rest) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            let wait = self
                .shared
                .changed
                .wait_timeout(progress, rest.min(KICK_AGAIN));
            let timeout;
            (progress, timeout) = wait.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() {
                self.kick();
            }
        }
    }

    /// Its registers' door, while it is parked.
    pub(crate) fn registers(&self) -> MutexGuard<'_, VcpuFd> {
        lock(&self.shared.fd)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.want(Wanted::Stop);
        let is_gone = self.wait_ended(Instant::now() + Duration::from_secs(5));
        if let Some(thread) = self.thread.take()
            && is_gone
        {
            // It has nothing left to do but end. One stuck in the kernel is left behind.
            let _ended = thread.join();
        }
    }
}

/// The thread's side.
struct Runner {
    shared: Arc<Shared>,
    ports: Arc<Bus>,
    memory_devices: Arc<Bus>,
    on_end: Option<OnEnd>,
}

/// What to do after a run.
enum Step {
    Again,
    Look,
    End(VcpuEnd),
}

impl thread::Body for Runner {
    fn run(&mut self) {
        let made_kickable = kvm::make_kickable(&lock(&self.shared.fd));
        if let Err(error) = made_kickable {
            self.end(VcpuEnd::Failed(error.to_string()));
            return;
        }
        loop {
            match self.wait_for_work() {
                Wanted::Stop => {
                    self.on_end = None;
                    return;
                }
                Wanted::Park => {}
                Wanted::Run => {
                    if let Some(end) = self.run_guest() {
                        self.end(end);
                        return;
                    }
                }
            }
        }
    }

    fn panicked(&mut self, message: &str) {
        self.end(VcpuEnd::Failed(format!("its thread panicked: {message}")));
    }

    fn finished(&mut self) {
        let mut progress = lock(&self.shared.progress);
        progress.is_parked = false;
        progress.has_ended = true;
        drop(progress);
        self.shared.changed.notify_all();
    }
}

impl Runner {
    fn end(&mut self, end: VcpuEnd) {
        if let Some(on_end) = self.on_end.take() {
            on_end(end);
        }
    }

    /// Park until something else is wanted.
    fn wait_for_work(&self) -> Wanted {
        let mut progress = lock(&self.shared.progress);
        while progress.wanted == Wanted::Park {
            if !std::mem::replace(&mut progress.is_parked, true) {
                self.shared.changed.notify_all();
            }
            let woken = self.shared.changed.wait(progress);
            progress = woken.unwrap_or_else(PoisonError::into_inner);
        }
        progress.is_parked = false;
        progress.wanted
    }

    /// Run until something else is wanted, or for good.
    fn run_guest(&self) -> Option<VcpuEnd> {
        let mut fd = lock(&self.shared.fd);
        loop {
            match self.step(&mut fd) {
                Step::Again => {}
                Step::Look => {
                    if lock(&self.shared.progress).wanted != Wanted::Run {
                        return self.leave(&mut fd);
                    }
                }
                Step::End(end) => return Some(end),
            }
        }
    }

    /// Bring the vCPU to where its registers are all there is: an access that its guest began is
    /// completed, and its clock told that time stands still.
    fn leave(&self, fd: &mut VcpuFd) -> Option<VcpuEnd> {
        fd.set_kvm_immediate_exit(1);
        let end = loop {
            match self.step(fd) {
                // The second half of an access that crosses pages.
                Step::Again => {}
                Step::Look => break None,
                Step::End(end) => break Some(end),
            }
        };
        fd.set_kvm_immediate_exit(0);
        // EINVAL: the guest does not use kvmclock.
        let _told = fd.kvmclock_ctrl();
        end
    }

    fn step(&self, fd: &mut VcpuFd) -> Step {
        let end = match fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.memory_devices.read(address, data);
                return Step::Again;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                return follow(self.memory_devices.write(address, data));
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.ports.read(u64::from(port), data);
                return Step::Again;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                return follow(self.ports.write(u64::from(port), data));
            }
            Ok(VcpuExit::Intr) => {
                kvm::consume_kick();
                return Step::Look;
            }
            Err(error) if error.errno() == libc::EINTR => {
                kvm::consume_kick();
                return Step::Look;
            }
            Err(error) if error.errno() == libc::EAGAIN => return Step::Look,
            Ok(VcpuExit::Shutdown) => End::TripleFault,
            Ok(VcpuExit::SystemEvent(kind, _)) => match kind {
                kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => return Step::End(VcpuEnd::Shutdown),
                kvm_bindings::KVM_SYSTEM_EVENT_RESET => return Step::End(VcpuEnd::Reset),
                kind => End::Failed(format!("KVM_EXIT_SYSTEM_EVENT {kind}")),
            },
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                End::Failed(format!("KVM_EXIT_FAIL_ENTRY {reason:#x} on cpu {cpu}"))
            }
            Ok(VcpuExit::InternalError) => End::Failed("KVM_EXIT_INTERNAL_ERROR".to_owned()),
            // With the interrupt controller in the kernel a halt does not leave it.
            Ok(VcpuExit::Hlt) => End::Failed("KVM_EXIT_HLT".to_owned()),
            Ok(other) => End::Failed(format!("unexpected exit {other:?}")),
            Err(error) => End::Failed(format!("KVM_RUN: {error}{}", run_note(error.errno()))),
        };
        let registers = arch::describe_failure(fd);
        Step::End(match end {
            End::TripleFault => VcpuEnd::TripleFault(registers),
            End::Failed(what) => VcpuEnd::Failed(format!("{what}: {registers}")),
        })
    }
}

enum End {
    TripleFault,
    Failed(String),
}

fn follow(outcome: Outcome) -> Step {
    match outcome {
        Outcome::Continue => Step::Again,
        Outcome::Shutdown => Step::End(VcpuEnd::Shutdown),
        Outcome::Reset => Step::End(VcpuEnd::Reset),
    }
}

fn run_note(errno: i32) -> &'static str {
    if errno == libc::EFAULT {
        " (guest memory that the host cannot provide: a truncated file, or no huge page left)"
    } else {
        ""
    }
}
