//! `/init` of the initrd: loads kernel modules, then becomes `/sbin/init`, the agent.
//!
//! Any agent: so it leaves nothing behind that the next one would set up itself, no mounts above
//! all. `/etc/kata-hybrid/modules` names one plain `.ko` file per line, in the order of loading.
//! What fails is written to the kernel log and passed over.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

const MODULES: &str = "/etc/kata-hybrid/modules";
const NEXT: &str = "/sbin/init";

fn main() {
    let log = KernelLog::open();
    match fs::read_to_string(MODULES) {
        Ok(list) => load_all(&list, &log),
        Err(error) => log.write(&format!("{MODULES}: {error}")),
    }
    let error = Command::new(NEXT).exec();
    log.write(&format!("{NEXT}: {error}"));
    // Nothing is left to run: the kernel panics when this ends, and says so on the console.
}

fn load_all(list: &str, log: &KernelLog) {
    for path in list.lines().map(str::trim) {
        if path.is_empty() || path.starts_with('#') {
            continue;
        }
        if let Err(error) = load(Path::new(path)) {
            log.write(&format!("load {path}: {error}"));
        }
    }
}

fn load(path: &Path) -> std::io::Result<()> {
    let file = File::open(path)?;
    match rustix::system::finit_module(&file, c"", 0) {
        // Built in, or named twice.
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// `/dev` may be empty this early, so the log's node is made where it lacks.
struct KernelLog(Option<File>);

impl KernelLog {
    fn open() -> Self {
        const PLACE: &str = "/dev/kmsg";
        if !Path::new(PLACE).exists() {
            let mode = Mode::from_raw_mode(0o600);
            // Without the node there is no log, and nobody to tell.
            let _ = mknodat(CWD, PLACE, FileType::CharacterDevice, mode, makedev(1, 11));
        }
        Self(OpenOptions::new().write(true).open(PLACE).ok())
    }

    fn write(&self, text: &str) {
        if let Some(mut file) = self.0.as_ref() {
            // As above.
            let _ = writeln!(file, "<3>guest-init: {text}");
        }
    }
}
