//! The agent's side of making a container or a process: starts the child, follows its reports.
//!
//! Blocking; runs on a thread of its own, under a deadline, because a child that hangs (a dead
//! shared folder) must not hold a worker of the runtime.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags,
    SocketType, recv, recvmsg, send, socketpair,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{CHILD_ARGUMENT, CONTROL_FD, FAILURE_FD, Order, PACKET_BYTES, Report};
use crate::error::{AgentError, IoContext, Result};
use crate::log;
use crate::reaper::{ExitReceiver, Reaper};

/// Longer than any request deadline a runtime uses by default.
const CHILD_DEADLINE: Duration = Duration::from_secs(90);

/// Descriptors are moved above the fixed ones before the child gets them.
const FIRST_FREE_FD: i32 = 16;

/// Notes kept for the error text.
const MAX_NOTES: usize = 8;

static NEXT_CONSOLE: AtomicU64 = AtomicU64::new(0);

/// The new process's ends of its streams.
pub(crate) struct ChildStdio {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

/// A process that was made.
pub(crate) struct Launched {
    pub(crate) pid: i32,
    pub(crate) exit: ExitReceiver,
    /// End of file: the program runs. Text: why it does not.
    pub(crate) failure: OwnedFd,
    /// The terminal's master side.
    pub(crate) console: Option<OwnedFd>,
}

/// Carries out `order`. With `console_directory` the process gets a terminal.
///
/// # Errors
/// The process could not be made; the text is for users.
pub(crate) async fn launch(
    reaper: Arc<Reaper>,
    order: Order,
    stdio: ChildStdio,
    console_directory: Option<PathBuf>,
) -> Result<Launched> {
    tokio::task::spawn_blocking(move || {
        launch_blocking(&reaper, order, stdio, console_directory.as_deref())
    })
    .await
    .map_err(|_| AgentError::TaskLost)?
}

fn launch_blocking(
    reaper: &Reaper,
    mut order: Order,
    stdio: ChildStdio,
    console_directory: Option<&Path>,
) -> Result<Launched> {
    let console = console_directory.map(ConsoleSocket::bind).transpose()?;
    order.console_socket = console.as_ref().map(|console| console.path.clone());

    let (control, child_control) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .during("make control socket")?;
    let (failure, child_failure) =
        pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).during("make failure pipe")?;
    let mut child = spawn(reaper, stdio, &child_control, &child_failure)?;
    drop((child_control, child_failure));

    let packet =
        serde_json::to_vec(&order).map_err(|error| AgentError::Runtime(error.to_string()))?;
    send(&control, &packet, SendFlags::NOSIGNAL).during("send order")?;
    let outcome = child.follow(control.as_fd());
    let pid = match outcome {
        Ok(pid) => pid,
        Err(error) => {
            child.kill();
            return Err(match read_failure(failure.as_fd()) {
                Some(text) => start_error(&text),
                None => error,
            });
        }
    };
    let exit = reaper.adopt(pid);
    let console = console.map(|console| console.receive()).transpose();
    // Lets the child end; if it already did, it has nothing left to wait for.
    let _ = send(&control, b"k", SendFlags::NOSIGNAL);
    Ok(Launched {
        pid,
        exit,
        failure,
        console: console?,
    })
}

/// The error of a program that could not be executed, in the words users know.
pub(crate) fn start_error(text: &str) -> AgentError {
    AgentError::Runtime(format!("unable to start container process: {text}"))
}

/// What the failure pipe holds now.
pub(crate) fn read_failure(failure: BorrowedFd<'_>) -> Option<String> {
    let mut text = [0_u8; 4096];
    let length = rustix::io::read(failure, &mut text).ok()?;
    (length > 0)
        .then(|| String::from_utf8_lossy(text.get(..length).unwrap_or_default()).into_owned())
}

struct Child {
    pid: i32,
    pidfd: Option<OwnedFd>,
}

fn spawn(
    reaper: &Reaper,
    stdio: ChildStdio,
    control: &OwnedFd,
    failure: &OwnedFd,
) -> Result<Child> {
    let raise = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, FIRST_FREE_FD);
    let control = raise(control).during("duplicate control socket")?;
    let failure = raise(failure).during("duplicate failure pipe")?;
    let (control_fd, failure_fd) = (control.as_raw_fd(), failure.as_raw_fd());
    let mut command = Command::new("/proc/self/exe");
    command
        .arg(CHILD_ARGUMENT)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(stdio.stdin))
        .stdout(Stdio::from(stdio.stdout))
        .stderr(Stdio::from(stdio.stderr));
    let place = move || {
        for (from, to) in [(control_fd, CONTROL_FD), (failure_fd, FAILURE_FD)] {
            // SAFETY: both sources are open until spawn returns and lie above the targets, so
            // neither call closes the other's source; in the child nothing else uses the targets.
            if unsafe { libc::dup2(from, to) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure calls only dup2, which is async-signal-safe, and allocates nothing.
    unsafe { command.pre_exec(place) };
    let (pid, _) = reaper.spawn(&mut command).during("start container child")?;
    let pidfd = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    Ok(Child { pid, pidfd })
}

impl Child {
    /// Waits for the report.
    fn follow(&mut self, control: BorrowedFd<'_>) -> Result<i32> {
        let deadline = Instant::now() + CHILD_DEADLINE;
        let mut notes: Vec<String> = Vec::new();
        let mut packet = vec![0_u8; PACKET_BYTES];
        loop {
            let has_ended = self.wait_for_packet(control, deadline)?;
            let length = match recv(control, packet.as_mut_slice(), RecvFlags::DONTWAIT) {
                Ok((length, _)) if length > 0 => length,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) if !has_ended => continue,
                _ => return Err(runtime_error("the container child ended early", &notes)),
            };
            match serde_json::from_slice(packet.get(..length).unwrap_or_default()) {
                Ok(Report::Note(note)) => {
                    log::debug("oci", &note);
                    if notes.len() < MAX_NOTES {
                        notes.push(note);
                    }
                }
                Ok(Report::Done { pid }) => return Ok(pid),
                Ok(Report::Failed(text)) => return Err(runtime_error(&text, &notes)),
                Err(error) => return Err(runtime_error(&error.to_string(), &notes)),
            }
        }
    }

    /// Whether the child has ended; packets may still be waiting.
    fn wait_for_packet(&self, control: BorrowedFd<'_>, deadline: Instant) -> Result<bool> {
        let remaining = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(remaining.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(remaining.subsec_nanos()),
        };
        let mut fds = vec![PollFd::from_borrowed_fd(control, PollFlags::IN)];
        if let Some(pidfd) = &self.pidfd {
            fds.push(PollFd::new(pidfd, PollFlags::IN));
        }
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => Err(AgentError::Timeout {
                what: "making the container process",
            }),
            Ok(_) => {
                Ok(self.pidfd.is_none() || fds.get(1).is_some_and(|fd| !fd.revents().is_empty()))
            }
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error).during("wait for container child"),
        }
    }

    fn kill(&self) {
        if let Some(pidfd) = &self.pidfd {
            // Already gone is as good.
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        } else {
            log::debug("oci", format!("child {} was gone at once", self.pid));
        }
    }
}

/// libcontainer's text, and the first cause it logged.
fn runtime_error(text: &str, notes: &[String]) -> AgentError {
    AgentError::Runtime(match notes.first() {
        Some(note) if !text.contains(note.as_str()) => format!("{text}: {note}"),
        _ => text.to_owned(),
    })
}

/// The socket over which libcontainer hands over a terminal.
struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    fn bind(directory: &Path) -> Result<Self> {
        let number = NEXT_CONSOLE.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("console-{number}"));
        let listener = UnixListener::bind(&path).on("bind console socket", &path)?;
        Ok(Self { listener, path })
    }

    /// The process is made, so the terminal was sent before: nothing here has to wait.
    fn receive(&self) -> Result<OwnedFd> {
        self.listener
            .set_nonblocking(true)
            .during("set console socket")?;
        let (stream, _) = self.listener.accept().during("accept console")?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut name = [0_u8; 256];
        recvmsg(
            &stream,
            &mut [IoSliceMut::new(&mut name)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        )
        .during("receive console")?;
        ancillary
            .drain()
            .find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
                _ => None,
            })
            .ok_or_else(|| AgentError::Runtime("no terminal was handed over".into()))
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        // A leftover socket file has no effect: numbers are not used twice.
        let _ = std::fs::remove_file(&self.path);
    }
}
