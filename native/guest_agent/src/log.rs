//! The agent's log: JSON lines for the host, kept in a bounded ring until somebody reads them.
//!
//! Any thread may log; nothing here blocks or waits for the reader. With a log port, one task
//! serves the first connection (`serve`), and lines that find the ring full push out the oldest.
//! Without one, and for warnings in any case, lines go to the kernel log.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::sync::Notify;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

/// Lines kept for a reader that is not there yet or is slow.
const RING_LINES: usize = 2048;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Debug,
    Info,
    Warning,
    Error,
}

impl Level {
    /// The spellings Kata runtimes use; finer levels than ours map to the nearest.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        match text {
            "trace" | "debug" => Some(Self::Debug),
            "info" => Some(Self::Info),
            "warn" | "warning" => Some(Self::Warning),
            "error" | "critical" | "fatal" | "panic" => Some(Self::Error),
            _ => None,
        }
    }

    fn wire(self) -> &'static str {
        match self {
            Self::Debug => "DEBG",
            Self::Info => "INFO",
            Self::Warning => "WARN",
            Self::Error => "ERRO",
        }
    }
}

struct Logger {
    level: Level,
    has_stream: bool,
    kernel: Option<File>,
    ring: Mutex<VecDeque<String>>,
    pending: Notify,
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Sets the log up once; lines logged before are lost.
pub(crate) fn install(level: Level, has_stream: bool) {
    let logger = Logger {
        level,
        has_stream,
        kernel: OpenOptions::new().write(true).open("/dev/kmsg").ok(),
        ring: Mutex::new(VecDeque::new()),
        pending: Notify::new(),
    };
    // A second call changes nothing: the first logger is already in use.
    let _ = LOGGER.set(logger);
}

pub(crate) fn debug(subsystem: &'static str, message: impl AsRef<str>) {
    write(Level::Debug, subsystem, message.as_ref());
}

pub(crate) fn info(subsystem: &'static str, message: impl AsRef<str>) {
    write(Level::Info, subsystem, message.as_ref());
}

pub(crate) fn warning(subsystem: &'static str, message: impl AsRef<str>) {
    write(Level::Warning, subsystem, message.as_ref());
}

pub(crate) fn error(subsystem: &'static str, message: impl AsRef<str>) {
    write(Level::Error, subsystem, message.as_ref());
}

fn write(level: Level, subsystem: &'static str, message: &str) {
    let Some(logger) = LOGGER.get() else { return };
    if level < logger.level {
        return;
    }
    if !logger.has_stream || level >= Level::Warning {
        write_kernel(logger, level, subsystem, message);
    }
    if logger.has_stream {
        let line = record(level, subsystem, message, SystemTime::now());
        let mut ring = lock(&logger.ring);
        if ring.len() >= RING_LINES {
            ring.pop_front();
        }
        ring.push_back(line);
        drop(ring);
        logger.pending.notify_one();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write_kernel(logger: &Logger, level: Level, subsystem: &str, message: &str) {
    let priority = match level {
        Level::Debug => 7,
        Level::Info => 6,
        Level::Warning => 4,
        Level::Error => 3,
    };
    if let Some(mut kernel) = logger.kernel.as_ref() {
        // One write is one record; the log has nowhere to report its own failure.
        let _ = kernel
            .write_all(format!("<{priority}>kata-agent: {subsystem}: {message}\n").as_bytes());
    }
}

fn record(level: Level, subsystem: &str, message: &str, now: SystemTime) -> String {
    let line = json!({
        "msg": message,
        "level": level.wire(),
        "ts": rfc3339(now),
        "version": env!("CARGO_PKG_VERSION"),
        "subsystem": subsystem,
        "pid": std::process::id().to_string(),
        "name": "kata-agent",
        "source": "agent",
    });
    format!("{line}\n")
}

/// UTC, with microseconds. Civil date from days after Howard Hinnant's `civil_from_days`.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let days = seconds / 86_400 + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let of_day = seconds % 86_400;
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:06}Z",
        of_day / 3600,
        of_day % 3600 / 60,
        of_day % 60,
        since.subsec_micros()
    )
}

/// Sends the log to the first connection on `port`, for as long as it lives.
pub(crate) async fn serve(port: u32) {
    let Some(logger) = LOGGER.get() else { return };
    let mut listener = match VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)) {
        Ok(listener) => Some(listener),
        Err(cause) => {
            warning("log", format!("listen on vsock port {port}: {cause}"));
            return;
        }
    };
    let accepted = match listener.take() {
        Some(listener) => listener.accept().await,
        None => return,
    };
    let Ok((mut stream, _)) = accepted else {
        return;
    };
    loop {
        let pending = logger.pending.notified();
        let batch: Vec<String> = lock(&logger.ring).drain(..).collect();
        if batch.is_empty() {
            pending.await;
            continue;
        }
        if AsyncWriteExt::write_all(&mut stream, batch.concat().as_bytes())
            .await
            .is_err()
        {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn timestamp_is_rfc3339() {
        let time = UNIX_EPOCH + Duration::new(1_709_210_096, 5_000);
        assert_eq!(rfc3339(time), "2024-02-29T12:34:56.000005Z");
    }

    #[test]
    fn record_is_one_json_line_with_the_wire_level() {
        let line = record(Level::Warning, "test", "a\nb", UNIX_EPOCH);
        assert_eq!(line.matches('\n').count(), 1);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["level"], "WARN");
        assert_eq!(value["msg"], "a\nb");
        assert_eq!(value["ts"], "1970-01-01T00:00:00.000000Z");
    }
}
