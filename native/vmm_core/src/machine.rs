//! The running machine, and the one thread that changes its state: `vmm-io`.
//!
//! ```text
//!              ┌── pause ──▶ paused ── snapshot ─┐
//!   running ───┤   ▲           │ resume          │
//!      │       └───┴───────────┴─────────────────┘
//!      └── stop, or the guest or a thread of the machine ends ──▶ stopped
//! ```
//!
//! The thread waits in epoll for descriptors of devices and for its mailbox. Everybody else puts
//! requests and reports into the mailbox: the owner of the machine (`vm.rs`), and vCPUs that ended.
//! It is therefore also the only one that stops and joins vCPUs. When it is over everything of the
//! machine has been released, then the end is reported, once.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use rustix::event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd, poll};
use rustix::io::Errno;

use crate::devices::acpi_slots::AcpiSlots;
use crate::devices::console::Console;
use crate::devices::serial::Serial;
use crate::event::{VmEvents, VmExit};
use crate::kvm::MappedVm;
use crate::lock::lock;
use crate::snapshot;
use crate::thread;
use crate::vcpu::{Vcpu, VcpuEnd, Wanted};
use crate::virtio::mmio::MmioTransport;
use crate::vm::{VmError, VmState};

/// The mailbox among the epoll data; devices are numbered from 1.
const MAILBOX: u32 = 0;
/// The first device's number.
pub(crate) const FIRST_SUBSCRIBER: u32 = 1;
const EVENTS_PER_WAIT: usize = 32;
/// For vCPUs to come to rest: a kick takes microseconds, a stuck host longer.
const REST_TIMEOUT: Duration = Duration::from_secs(5);

/// What can be asked of a running machine.
#[derive(Debug)]
pub(crate) enum Request {
    Pause,
    Resume,
    /// Write a snapshot into this folder. While paused.
    Snapshot(PathBuf),
    Stop,
}

pub(crate) type Reply = Result<(), VmError>;

enum Message {
    Request(Request, SyncSender<Reply>),
    VcpuEnded(u8, VcpuEnd),
}

/// Messages for the machine's thread, and the eventfd that wakes it.
pub(crate) struct Mailbox {
    /// Nothing once the thread has read its last: who asks then learns at once that it is gone.
    messages: Mutex<Option<VecDeque<Message>>>,
    wake: OwnedFd,
}

impl Mailbox {
    pub(crate) fn new() -> Result<Arc<Self>, Errno> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self {
            messages: Mutex::new(Some(VecDeque::new())),
            wake,
        }))
    }

    pub(crate) fn request(&self, request: Request, reply: SyncSender<Reply>) {
        self.post(Message::Request(request, reply));
    }

    pub(crate) fn vcpu_ended(&self, index: u8, end: VcpuEnd) {
        self.post(Message::VcpuEnded(index, end));
    }

    fn post(&self, message: Message) {
        if let Some(messages) = &mut *lock(&self.messages) {
            messages.push_back(message);
        }
        while rustix::io::write(&self.wake, &1u64.to_ne_bytes()) == Err(Errno::INTR) {}
    }

    fn take(&self) -> Option<Message> {
        lock(&self.messages).as_mut()?.pop_front()
    }

    /// Take no more, and give out what is left.
    fn close(&self) -> VecDeque<Message> {
        lock(&self.messages).take().unwrap_or_default()
    }

    fn clear_wake(&self) {
        let mut counter = [0; 8];
        let _cleared = rustix::io::read(&self.wake, &mut counter);
    }
}

/// The machine's state, written by its thread alone.
pub(crate) type StateCell = Mutex<VmState>;

/// Everything of a machine that is released when it stops, in this order.
pub(crate) struct Resources {
    /// First: nothing runs any more.
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) devices: Vec<Arc<MmioTransport>>,
    pub(crate) serial: Arc<Serial>,
    pub(crate) slots: Arc<AcpiSlots>,
    pub(crate) epoll: Arc<OwnedFd>,
    pub(crate) vm: MappedVm,
    pub(crate) kvm: Kvm,
}

/// The thread's side of a machine.
pub(crate) struct Machine {
    resources: Option<Resources>,
    mailbox: Arc<Mailbox>,
    state: Arc<StateCell>,
    events: Arc<dyn VmEvents>,
    console: Arc<Console>,
    exit: Option<VmExit>,
}

impl Machine {
    pub(crate) fn new(
        resources: Resources,
        mailbox: Arc<Mailbox>,
        state: Arc<StateCell>,
        events: Arc<dyn VmEvents>,
        console: Arc<Console>,
    ) -> Result<Self, Errno> {
        let data = epoll::EventData::new_u64(u64::from(MAILBOX) << 32);
        epoll::add(&resources.epoll, &mailbox.wake, data, epoll::EventFlags::IN)?;
        Ok(Self {
            resources: Some(resources),
            mailbox,
            state,
            events,
            console,
            exit: None,
        })
    }

    fn set_state(&self, state: VmState) {
        *lock(&self.state) = state;
    }

    fn current_state(&self) -> VmState {
        *lock(&self.state)
    }

    /// Serve until the machine ends.
    fn serve(&mut self) -> Result<(), (&'static str, Errno)> {
        let mut events = Vec::with_capacity(EVENTS_PER_WAIT);
        while self.exit.is_none() {
            if self.current_state() == VmState::Paused {
                // Devices are at rest: only the mailbox matters.
                let mut fds = [PollFd::new(&self.mailbox.wake, PollFlags::IN)];
                match poll(&mut fds, None) {
                    Ok(_) | Err(Errno::INTR) => self.read_mail(),
                    Err(errno) => return Err(("wait for requests", errno)),
                }
                continue;
            }
            let Some(resources) = &self.resources else {
                return Ok(());
            };
            events.clear();
            let room = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&resources.epoll, room, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(("wait for events", errno)),
            }
            let mut has_mail = false;
            for event in &events {
                let data = event.data.u64();
                #[expect(clippy::cast_possible_truncation, reason = "halves of the word")]
                let (subscriber, token) = ((data >> 32) as u32, data as u32);
                let device = subscriber
                    .checked_sub(FIRST_SUBSCRIBER)
                    .and_then(|index| resources.devices.get(index as usize));
                match device {
                    Some(device) => device.ready(token, event.flags),
                    None => has_mail = true,
                }
            }
            // Last, so that a pause finds no event of the batch left.
            if has_mail {
                self.read_mail();
            }
        }
        Ok(())
    }

    fn read_mail(&mut self) {
        self.mailbox.clear_wake();
        while let Some(message) = self.mailbox.take() {
            match message {
                Message::VcpuEnded(index, end) => self.vcpu_ended(index, end),
                Message::Request(request, reply) => {
                    let result = self.act(request);
                    // Whoever asked may have given up.
                    let _received = reply.try_send(result);
                }
            }
        }
    }

    fn vcpu_ended(&mut self, index: u8, end: VcpuEnd) {
        // The first one to tell is the cause; others fall with it.
        if self.exit.is_some() {
            return;
        }
        self.exit = Some(match end {
            VcpuEnd::Shutdown => VmExit::Shutdown,
            VcpuEnd::Reset => self
                .console
                .panic_line()
                .map_or(VmExit::Reset, VmExit::Panic),
            VcpuEnd::TripleFault(registers) => {
                VmExit::TripleFault(format!("vCPU {index} ended in a triple fault: {registers}"))
            }
            VcpuEnd::Failed(what) => VmExit::Failed(format!("vCPU {index}: {what}")),
        });
    }

    fn act(&mut self, request: Request) -> Reply {
        let state = self.current_state();
        match (request, state) {
            (Request::Stop, VmState::Running | VmState::Paused) => {
                self.exit.get_or_insert(VmExit::Stopped);
                Ok(())
            }
            (Request::Pause, VmState::Running) => self.pause(),
            (Request::Resume, VmState::Paused) => {
                self.resume();
                Ok(())
            }
            // Asked twice: there already.
            (Request::Pause, VmState::Paused) | (Request::Resume, VmState::Running) => Ok(()),
            (Request::Snapshot(folder), VmState::Paused) => self.snapshot(&folder),
            (request, state) => Err(VmError::State {
                state,
                request: request.name(),
            }),
        }
    }

    fn pause(&mut self) -> Reply {
        let Some(resources) = &self.resources else {
            return Err(VmError::Gone);
        };
        let paused = rest(&resources.vcpus).and_then(|()| {
            for device in &resources.devices {
                device.pause().map_err(VmError::Device)?;
            }
            Ok(())
        });
        if paused.is_ok() {
            self.set_state(VmState::Paused);
        } else {
            self.resume();
        }
        paused
    }

    fn resume(&mut self) {
        if let Some(resources) = &self.resources {
            for device in &resources.devices {
                device.resume();
            }
            for vcpu in &resources.vcpus {
                vcpu.want(Wanted::Run);
            }
        }
        self.set_state(VmState::Running);
    }

    fn snapshot(&self, folder: &std::path::Path) -> Reply {
        let resources = self.resources.as_ref().ok_or(VmError::Gone)?;
        snapshot::write(folder, resources).map_err(VmError::Snapshot)
    }

    /// Release everything, then tell.
    fn finish(&mut self) {
        let mut exit = self.exit.take().unwrap_or(VmExit::Stopped);
        if let Some(resources) = self.resources.take() {
            for vcpu in &resources.vcpus {
                vcpu.want(Wanted::Stop);
            }
            let deadline = Instant::now() + REST_TIMEOUT;
            for vcpu in &resources.vcpus {
                if !vcpu.wait_ended(deadline) {
                    let index = vcpu.index();
                    exit = VmExit::Failed(format!(
                        "vCPU {index} does not leave the kernel; the machine had ended with {exit}"
                    ));
                }
            }
            for device in &resources.devices {
                device.stop();
            }
        }
        self.set_state(VmState::Stopped);
        self.console.close();
        self.events.exited(&exit);
        // Requests that came too late.
        for message in self.mailbox.close() {
            if let Message::Request(request, reply) = message {
                let result = match request {
                    Request::Stop => Ok(()),
                    _ => Err(VmError::Gone),
                };
                let _received = reply.try_send(result);
            }
        }
    }
}

impl thread::Body for Machine {
    fn run(&mut self) {
        if let Err((operation, errno)) = self.serve() {
            self.exit = Some(VmExit::Failed(format!("{operation}: {errno}")));
        }
    }

    fn panicked(&mut self, message: &str) {
        self.exit = Some(VmExit::Failed(format!(
            "the I/O thread panicked: {message}"
        )));
    }

    fn finished(&mut self) {
        self.finish();
    }
}

impl Request {
    fn name(&self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Snapshot(_) => "snapshot",
            Self::Stop => "stop",
        }
    }
}

/// Park all vCPUs.
fn rest(vcpus: &[Vcpu]) -> Result<(), VmError> {
    for vcpu in vcpus {
        vcpu.want(Wanted::Park);
    }
    let deadline = Instant::now() + REST_TIMEOUT;
    for vcpu in vcpus {
        if !vcpu.wait_at_rest(deadline) {
            return Err(VmError::VcpuStuck(vcpu.index()));
        }
    }
    Ok(())
}
