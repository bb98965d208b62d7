//! Running another process in a container.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use libcontainer::oci_spec::runtime::{LinuxCapabilities, Process as SpecProcess};
use protocols::oci;
use serde_json::json;

use super::create::run;
use super::{Container, ExecEntry, STATE_ROOT, Status, failed_text, lock};
use crate::error::{AgentError, IoContext, Result};
use crate::oci::{EXTRA_CAPABILITIES, ExecOrder, Order, OrderKind, start_error};
use crate::sandbox::Sandbox;
use crate::spec;

static NEXT_FILE: AtomicU64 = AtomicU64::new(0);

impl Container {
    /// Runs a process; returns when its program executes.
    ///
    /// # Errors
    /// The id is in use, the container does not run, or the program cannot be executed.
    pub(crate) async fn exec(
        &self,
        sandbox: &Arc<Sandbox>,
        exec_id: &str,
        source: &oci::Process,
    ) -> Result<()> {
        if self.is_init(exec_id) {
            return Err(AgentError::ExecExists(exec_id.to_owned()));
        }
        self.require(&[Status::Running], "exec")?;
        let process = spec::process(source, self.capabilities.as_ref())?;
        self.reserve_exec(exec_id)?;
        let made = self.make(sandbox, source, process).await;
        let mut execs = lock(&self.execs);
        match made {
            Ok(process) => {
                execs.insert(exec_id.to_owned(), ExecEntry::Live(Arc::new(process)));
                Ok(())
            }
            Err(error) => {
                execs.remove(exec_id);
                Err(error)
            }
        }
    }

    /// An id whose process has ended and was reported may be used again.
    fn reserve_exec(&self, exec_id: &str) -> Result<()> {
        let mut execs = lock(&self.execs);
        let is_taken = match execs.get(exec_id) {
            Some(ExecEntry::Starting) => true,
            Some(ExecEntry::Live(process)) => process.idle_since().is_none(),
            None => false,
        };
        if is_taken {
            return Err(AgentError::ExecExists(exec_id.to_owned()));
        }
        execs.insert(exec_id.to_owned(), ExecEntry::Starting);
        Ok(())
    }

    async fn make(
        &self,
        sandbox: &Arc<Sandbox>,
        source: &oci::Process,
        mut process: SpecProcess,
    ) -> Result<crate::process::Process> {
        let mut restricted = None;
        if self.has_seccomp
            && process.no_new_privileges() != Some(true)
            && let Some(wanted) = process.capabilities().clone()
        {
            process.set_capabilities(Some(extend(&wanted)?));
            restricted = Some(wanted);
        }
        let file = ProcessFile::write(&self.id, &process)?;
        let order = Order {
            container_id: self.id.clone(),
            state_root: STATE_ROOT.into(),
            console_socket: None,
            kind: OrderKind::Exec(Box::new(ExecOrder {
                process: file.path.clone(),
                seccomp_from: self.has_seccomp.then(|| self.bundle.config()),
                restricted,
                sub_cgroup: self.cgroup.tenant_subgroup(),
            })),
        };
        let (process, failure) = run(sandbox, order, source).await?;
        match failed_text(&failure) {
            Some(text) => Err(start_error(&text)),
            None => Ok(process),
        }
    }
}

/// What loading a seccomp profile needs is added to the sets a process is limited to.
fn extend(wanted: &LinuxCapabilities) -> Result<LinuxCapabilities> {
    let mut value = json!(wanted);
    for set in ["bounding", "effective", "permitted"] {
        let names = value[set].as_array().cloned().unwrap_or_default();
        let mut names: Vec<String> = names
            .iter()
            .filter_map(|name| name.as_str().map(str::to_owned))
            .collect();
        names.extend(EXTRA_CAPABILITIES.map(str::to_owned));
        names.sort();
        names.dedup();
        value[set] = json!(names);
    }
    spec::parse("capabilities", value)
}

/// The process description libcontainer reads; removed when the process was made.
struct ProcessFile {
    path: PathBuf,
}

impl ProcessFile {
    fn write(container_id: &str, process: &SpecProcess) -> Result<Self> {
        let number = NEXT_FILE.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(STATE_ROOT)
            .join(container_id)
            .join(format!("process-{number}.json"));
        let text = serde_json::to_vec(process)
            .map_err(|error| AgentError::Runtime(format!("encode process: {error}")))?;
        fs::write(&path, text).on("write", &path)?;
        Ok(Self { path })
    }
}

impl Drop for ProcessFile {
    fn drop(&mut self) {
        // The container's removal takes the directory with it.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use libcontainer::oci_spec::runtime::Capability;

    use super::*;

    #[test]
    fn extended_sets_keep_what_was_wanted() {
        let wanted: LinuxCapabilities = spec::parse(
            "capabilities",
            json!({ "bounding": ["CAP_CHOWN"], "effective": [], "permitted": ["CAP_SYS_ADMIN"] }),
        )
        .unwrap();
        let extended = extend(&wanted).unwrap();
        let bounding = extended.bounding().clone().unwrap();
        assert!(bounding.contains(&Capability::Chown));
        assert!(bounding.contains(&Capability::SysAdmin));
        assert_eq!(extended.permitted().clone().unwrap().len(), 2);
        assert_eq!(extended.inheritable(), wanted.inheritable());
    }
}
