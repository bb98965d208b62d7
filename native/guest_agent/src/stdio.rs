//! A process's standard streams, as the requests that read and write them see them.
//!
//! Reads block until there is a byte; no data is the end. The end is the pipe's own (or the
//! terminal's hang-up); when the process has exited but a descendant still holds the pipe, the
//! stream ends after a grace time with what had been written by then. The exit is a level: a read
//! that starts later sees it too. Nothing that a process wrote before it exited is lost.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::termios::{LocalModes, SpecialCodeIndex, Winsize, tcgetattr, tcsetwinsize};
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, sleep_until};

use crate::error::{AgentError, IoContext, Result};
use crate::oci::ChildStdio;
use crate::readiness;
use crate::reaper::{ExitReceiver, exited};

/// How long descendants of an exited process may go on writing.
const GRACE: Duration = Duration::from_millis(500);

/// A terminal nobody has open yet or any more reads as an error; this long until the next try.
const HANGUP_RETRY: Duration = Duration::from_millis(50);

/// One reply carries at most this much, whatever was asked for; a frame may be 4 MiB.
const MAX_READ_BYTES: usize = 1024 * 1024;

/// The agent's ends of a process's streams.
pub(crate) struct ProcessStdio {
    stdin: Mutex<Option<AsyncFd<OwnedFd>>>,
    pub(crate) stdout: Output,
    pub(crate) stderr: Option<Output>,
    terminal: Option<OwnedFd>,
}

/// Both ends of a new process's pipes.
pub(crate) struct Pipes {
    pub(crate) child: ChildStdio,
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Pipes {
    /// Makes three pipes that belong to `uid`, so that the process may reopen them.
    ///
    /// # Errors
    /// No descriptors are left, or `size_bytes` is not allowed.
    pub(crate) fn new(uid: u32, size_bytes: u32) -> Result<Self> {
        let make = || -> rustix::io::Result<(OwnedFd, OwnedFd)> {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            if size_bytes > 0 {
                fcntl_setpipe_size(&write, size_bytes as usize)?;
            }
            rustix::fs::fchown(&read, Some(rustix::fs::Uid::from_raw(uid)), None)?;
            Ok((read, write))
        };
        let (child_stdin, stdin) = make().during("make stdin pipe")?;
        let (stdout, child_stdout) = make().during("make stdout pipe")?;
        let (stderr, child_stderr) = make().during("make stderr pipe")?;
        Ok(Self {
            child: ChildStdio {
                stdin: child_stdin,
                stdout: child_stdout,
                stderr: child_stderr,
            },
            stdin,
            stdout,
            stderr,
        })
    }

    /// The agent's ends. The child's are closed, or the streams would never end.
    ///
    /// # Errors
    /// The runtime cannot watch the descriptors.
    pub(crate) fn into_parts(self) -> (ChildStdio, AgentPipes) {
        (
            self.child,
            AgentPipes {
                stdin: self.stdin,
                stdout: self.stdout,
                stderr: self.stderr,
            },
        )
    }
}

/// The agent's ends of pipes, not yet watched.
pub(crate) struct AgentPipes {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

/// `/dev/null` three times: a process with a terminal gets its streams from there.
///
/// # Errors
/// `/dev/null` cannot be opened.
pub(crate) fn null_stdio() -> Result<ChildStdio> {
    let open = || {
        let null = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null");
        null.map(OwnedFd::from).on("open", "/dev/null")
    };
    Ok(ChildStdio {
        stdin: open()?,
        stdout: open()?,
        stderr: open()?,
    })
}

impl ProcessStdio {
    /// # Errors
    /// The runtime cannot watch the descriptors.
    pub(crate) fn pipes(pipes: AgentPipes, exit: &ExitReceiver) -> Result<Self> {
        Ok(Self {
            stdin: Mutex::new(Some(watch(pipes.stdin)?)),
            stdout: Output::new(pipes.stdout, exit.clone(), false)?,
            stderr: Some(Output::new(pipes.stderr, exit.clone(), false)?),
            terminal: None,
        })
    }

    /// # Errors
    /// The runtime cannot watch the descriptors.
    pub(crate) fn terminal(master: OwnedFd, exit: &ExitReceiver) -> Result<Self> {
        let duplicate = || master.try_clone().during("duplicate terminal");
        Ok(Self {
            stdin: Mutex::new(Some(watch(duplicate()?)?)),
            stdout: Output::new(duplicate()?, exit.clone(), true)?,
            stderr: None,
            terminal: Some(master),
        })
    }

    /// Writes all of `data`; no data closes stdin. `exit` ends a write nobody will read.
    ///
    /// # Errors
    /// Stdin is closed, or the process is gone.
    pub(crate) async fn write_stdin(&self, data: &[u8], exit: &ExitReceiver) -> Result<()> {
        let mut guard = self.stdin.lock().await;
        let Some(stdin) = guard.as_ref() else {
            // Closing twice is no mistake.
            return if data.is_empty() {
                Ok(())
            } else {
                Err(AgentError::NoStream("writer"))
            };
        };
        if data.is_empty() {
            if self.terminal.is_some() {
                send_end_of_file(stdin).await;
            } else {
                *guard = None;
            }
            return Ok(());
        }
        let mut exit = exit.clone();
        tokio::select! {
            biased;
            written = write_all(stdin, data) => written.during("write stdin"),
            _ = exited(&mut exit) => Err(AgentError::NoStream("writer")),
        }
    }

    /// Sets the terminal's window size.
    ///
    /// # Errors
    /// There is no terminal.
    pub(crate) fn resize(&self, rows: u32, columns: u32) -> Result<()> {
        let terminal = self.terminal.as_ref().ok_or(AgentError::NoTty)?;
        let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        let size = Winsize {
            ws_row: cells(rows),
            ws_col: cells(columns),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(terminal, size).during("set window size")
    }

    /// Whether every output stream was read to its end.
    pub(crate) fn is_drained(&self) -> bool {
        self.stdout.has_ended() && self.stderr.as_ref().is_none_or(Output::has_ended)
    }
}

/// A line editor takes its end-of-file character as the end; a program in raw mode gets nothing.
async fn send_end_of_file(terminal: &AsyncFd<OwnedFd>) {
    let Ok(attributes) = tcgetattr(terminal.get_ref()) else {
        return;
    };
    if attributes.local_modes.contains(LocalModes::ICANON) {
        let character = attributes.special_codes[SpecialCodeIndex::VEOF];
        // The terminal may have been hung up; then there is nothing to end.
        let _ = write_all(terminal, &[character]).await;
    }
}

fn watch(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>> {
    let flags = fcntl_getfl(&fd).during("get descriptor flags")?;
    fcntl_setfl(&fd, flags | OFlags::NONBLOCK).during("set descriptor flags")?;
    readiness::watch(fd).during("watch descriptor")
}

async fn write_all(fd: &AsyncFd<OwnedFd>, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let mut ready = fd.writable().await?;
        match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), data)?)) {
            Ok(Ok(written)) => data = data.get(written..).unwrap_or_default(),
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
    Ok(())
}

/// One output stream. Reads queue up; each gets the next bytes.
pub(crate) struct Output {
    state: Mutex<OutputState>,
    /// Set with the lock held, read without it.
    ended: std::sync::atomic::AtomicBool,
    is_terminal: bool,
}

struct OutputState {
    fd: Option<AsyncFd<OwnedFd>>,
    exit: ExitReceiver,
    /// Bytes still to be delivered once the grace time is over.
    left: Option<usize>,
}

/// What one attempt to read gave.
enum Attempt {
    Data(Vec<u8>),
    End,
    Nothing,
    HungUp,
}

impl Output {
    fn new(fd: OwnedFd, exit: ExitReceiver, is_terminal: bool) -> Result<Self> {
        Ok(Self {
            state: Mutex::new(OutputState {
                fd: Some(watch(fd)?),
                exit,
                left: None,
            }),
            ended: false.into(),
            is_terminal,
        })
    }

    fn has_ended(&self) -> bool {
        self.ended.load(std::sync::atomic::Ordering::Acquire)
    }

    /// The next bytes, at most `length`; none at the end.
    ///
    /// # Errors
    /// The descriptor fails in an unexpected way.
    pub(crate) async fn read(&self, length: u32) -> Result<Vec<u8>> {
        let length = (length as usize).min(MAX_READ_BYTES);
        let mut state = self.state.lock().await;
        loop {
            let attempt = state.attempt(length, self.is_terminal)?;
            match attempt {
                Attempt::Data(data) => return Ok(data),
                Attempt::End => {
                    // Closes the descriptor: a descendant that goes on writing gets EPIPE.
                    state.fd = None;
                    self.ended.store(true, std::sync::atomic::Ordering::Release);
                    return Ok(Vec::new());
                }
                Attempt::Nothing => state.wait().await?,
                Attempt::HungUp => {
                    let mut exit = state.exit.clone();
                    tokio::select! {
                        _ = exited(&mut exit) => {}
                        () = sleep(HANGUP_RETRY) => {}
                    }
                }
            }
        }
    }
}

impl OutputState {
    fn attempt(&mut self, length: usize, is_terminal: bool) -> Result<Attempt> {
        let Some(fd) = self.fd.as_ref() else {
            return Ok(Attempt::End);
        };
        let exit = *self.exit.borrow();
        let is_over = exit.is_some_and(|exit| exit.at.elapsed() >= GRACE);
        if is_over && self.left.is_none() {
            self.left = Some(available(fd.get_ref()));
        }
        let length = self.left.map_or(length, |left| left.min(length));
        if length == 0 && self.left == Some(0) {
            return Ok(Attempt::End);
        }
        let mut data = vec![0; length];
        match rustix::io::read(fd.get_ref(), data.as_mut_slice()) {
            Ok(0) => Ok(Attempt::End),
            Ok(read) => {
                data.truncate(read);
                self.left = self.left.map(|left| left - read.min(left));
                Ok(Attempt::Data(data))
            }
            Err(Errno::AGAIN) if is_over => Ok(Attempt::End),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Attempt::Nothing),
            Err(Errno::IO) if is_terminal && exit.is_none() => Ok(Attempt::HungUp),
            Err(Errno::IO) if is_terminal => Ok(Attempt::End),
            Err(error) => Err(error).during("read stream"),
        }
    }

    /// Until there may be something to read, or the process has exited, or its grace is over.
    async fn wait(&mut self) -> Result<()> {
        let Some(fd) = self.fd.as_ref() else {
            return Ok(());
        };
        let readable = async {
            let mut ready = fd.readable().await.during("wait for stream")?;
            // A later wait must not return for what was already read.
            if available(fd.get_ref()) == 0 && !ready.ready().is_read_closed() {
                ready.clear_ready();
            }
            Ok(())
        };
        let exit = *self.exit.borrow();
        if let Some(exit) = exit {
            tokio::select! {
                result = readable => result,
                () = sleep_until(Instant::from_std(exit.at + GRACE)) => Ok(()),
            }
        } else {
            tokio::select! {
                result = readable => result,
                _ = exited(&mut self.exit) => Ok(()),
            }
        }
    }
}

/// Bytes that can be read now.
fn available(fd: impl AsFd) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, to which the pointer leads.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if result < 0 {
        return 0;
    }
    usize::try_from(count).unwrap_or(0)
}

#[cfg(test)]
mod tests;
