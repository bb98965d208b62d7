//! The last steps before a container's program runs, inside the container.
//!
//! Finds the program and words the errors users know from runc, loads the seccomp profile of a
//! second process, executes. Failures go to the agent over [`FAILURE_FD`] as plain text; the
//! descriptor closes on success. Runs in the process that becomes the container's.

use std::cell::RefCell;
use std::collections::HashMap;
use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use caps::{CapSet, Capability, CapsHashSet};
use libcontainer::capabilities::CapabilityExt;
use libcontainer::oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp, Spec};
use libcontainer::seccomp::initialize_seccomp;
use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};

use super::FAILURE_FD;
use crate::error::errno_text;

#[derive(Clone, Default)]
pub(super) struct AgentExecutor {
    pub(super) seccomp: Option<LinuxSeccomp>,
    pub(super) restricted: Option<LinuxCapabilities>,
    pub(super) environment: RefCell<Vec<CString>>,
}

impl Executor for AgentExecutor {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        find_program(spec).map(drop).map_err(|text| {
            tell_agent(&text);
            ExecutorValidationError::ArgValidationError(text)
        })
    }

    fn setup_envs(&self, variables: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        let mut environment = self.environment.borrow_mut();
        for (key, value) in variables {
            // What holds a NUL cannot be passed to a program at all.
            if let Ok(entry) = CString::new(format!("{key}={value}")) {
                environment.push(entry);
            }
        }
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        match self.execute(spec) {
            Ok(never) => match never {},
            Err(text) => {
                tell_agent(&text);
                Err(ExecutorError::Other(text))
            }
        }
    }
}

impl AgentExecutor {
    fn execute(&self, spec: &Spec) -> Result<Infallible, String> {
        let program = find_program(spec)?;
        if let Some(profile) = &self.seccomp {
            initialize_seccomp(profile)
                .map_err(|error| format!("load seccomp profile: {error}"))?;
        }
        if let Some(capabilities) = &self.restricted {
            restrict(capabilities).map_err(|error| format!("drop capabilities: {error}"))?;
        }
        let path = CString::new(program.as_os_str().as_bytes())
            .map_err(|_| "program path holds a NUL byte".to_owned())?;
        let arguments: Vec<CString> = arguments(spec)
            .iter()
            .filter_map(|argument| CString::new(argument.as_bytes()).ok())
            .collect();
        let environment = self.environment.borrow();
        // The Rust runtime ignores SIGPIPE, and what is ignored stays so across execve.
        // SAFETY: sets a default disposition; no handler of ours is involved.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        let errno = exec(&path, &arguments, &environment);
        Err(format!(
            "exec {}: {}",
            program.display(),
            errno_text(errno.raw_os_error().unwrap_or_default())
        ))
    }
}

fn exec(path: &CString, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|string| string.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: the path and every string are NUL-terminated and live until the call returns; both
    // arrays end with a null pointer.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

fn arguments(spec: &Spec) -> &[String] {
    spec.process()
        .as_ref()
        .and_then(|process| process.args().as_deref())
        .unwrap_or_default()
}

/// Keeps exactly `wanted`; the extra capabilities were only for the seccomp profile.
fn restrict(wanted: &LinuxCapabilities) -> Result<(), caps::errors::CapsError> {
    let set = |names: &Option<libcontainer::oci_spec::runtime::Capabilities>| -> CapsHashSet {
        names.iter().flatten().map(CapabilityExt::to_cap).collect()
    };
    let bounding = set(wanted.bounding());
    for capability in [Capability::CAP_SYS_ADMIN, Capability::CAP_SETPCAP] {
        if !bounding.contains(&capability) {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    caps::set(None, CapSet::Effective, &set(wanted.effective()))?;
    caps::set(None, CapSet::Permitted, &set(wanted.permitted()))
}

/// Looks the program up as `execvp` would, and says what is wrong with it as runc does.
fn find_program(spec: &Spec) -> Result<PathBuf, String> {
    let name = arguments(spec)
        .first()
        .map(String::as_str)
        .unwrap_or_default();
    if name.contains('/') {
        return match check_program(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(libc::EACCES) => Err(format!("exec: {name:?}: permission denied")),
            Err(libc::EISDIR) => Err(format!("exec: {name:?}: is a directory")),
            Err(errno) => Err(format!(
                "exec: {name:?}: stat {name}: {}",
                errno_text(errno)
            )),
        };
    }
    let not_found = || format!("exec: {name:?}: executable file not found in $PATH");
    if name.is_empty() {
        return Err(not_found());
    }
    let environment = spec
        .process()
        .as_ref()
        .and_then(|process| process.env().as_deref());
    let search = environment
        .unwrap_or_default()
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or_default();
    let mut is_denied = false;
    for directory in search.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = Path::new(directory).join(name);
        match check_program(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(libc::EACCES) => is_denied = true,
            Err(_) => {}
        }
    }
    Err(if is_denied {
        format!("exec: {name:?}: permission denied")
    } else {
        not_found()
    })
}

fn check_program(path: &Path) -> Result<(), i32> {
    let metadata = fs::metadata(path).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?;
    if metadata.is_dir() {
        return Err(libc::EISDIR);
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(libc::EACCES);
    }
    Ok(())
}

fn tell_agent(text: &str) {
    // SAFETY: the agent passes this descriptor to every child, and nothing in it closes it before
    // execve does.
    let failure = unsafe { BorrowedFd::borrow_raw(FAILURE_FD) };
    // Without the text the agent still sees that the process ended.
    let _ = rustix::io::write(failure, text.as_bytes());
}

#[cfg(test)]
mod tests {
    use libcontainer::oci_spec::runtime::Spec;
    use serde_json::json;

    use super::find_program;

    fn spec(program: &str, path: &str) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "process": { "cwd": "/", "user": { "uid": 0, "gid": 0 },
                         "args": [program], "env": [format!("PATH={path}")] },
        }))
        .unwrap()
    }

    #[test]
    fn program_is_found_in_path() {
        let found = find_program(&spec("sh", "/nowhere:/bin")).unwrap();
        assert_eq!(found.to_str(), Some("/bin/sh"));
    }

    #[test]
    fn missing_program_is_named_as_runc_does() {
        assert_eq!(
            find_program(&spec("foo", "/bin")).unwrap_err(),
            r#"exec: "foo": executable file not found in $PATH"#
        );
        assert_eq!(
            find_program(&spec("/no/foo", "/bin")).unwrap_err(),
            r#"exec: "/no/foo": stat /no/foo: no such file or directory"#
        );
    }

    #[test]
    fn file_without_execute_permission_is_denied() {
        assert_eq!(
            find_program(&spec("/etc/passwd", "/bin")).unwrap_err(),
            r#"exec: "/etc/passwd": permission denied"#
        );
    }

    #[test]
    fn directory_is_not_a_program() {
        assert_eq!(
            find_program(&spec("/etc", "/bin")).unwrap_err(),
            r#"exec: "/etc": is a directory"#
        );
    }
}
