//! The pod: its containers, shared namespaces, storages. One per guest, made at boot.
//!
//! Requests come in parallel. The maps are locked for look-ups only; nothing waits with a lock
//! held, so `Check`, signals and statistics stay fast while other requests hang.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocols::agent::CreateSandboxRequest;
use tokio::time::timeout;

use crate::config::Config;
use crate::container::Container;
use crate::device::Devices;
use crate::error::{AgentError, IoContext, Result, chain};
use crate::log;
use crate::mount::{Options, TargetKind, mount_at, unmount_at};
use crate::namespace;
use crate::oom::OomEvents;
use crate::process::Process;
use crate::reaper::{ExitReceiver, Reaper, exited};
use crate::spec::SharedNamespaces;
use crate::storage::StorageTable;

/// Everything runtimes place in the guest is below; recreated with the sandbox.
const WORK_ROOT: &str = "/run/kata-containers";

/// `modprobe` reads from memory; longer means it hangs.
const MODPROBE_DEADLINE: Duration = Duration::from_secs(30);

pub(crate) struct Sandbox {
    pub(crate) config: Config,
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) oom: Arc<OomEvents>,
    pub(crate) devices: Arc<Devices>,
    pub(crate) storages: StorageTable,
    containers: Mutex<HashMap<String, Entry>>,
    pod: Mutex<Pod>,
}

enum Entry {
    /// The id is taken; the container is being made.
    Creating,
    Made(Arc<Container>),
}

#[derive(Default)]
struct Pod {
    is_created: bool,
    shared: SharedNamespaces,
    /// The exit of the process that keeps the shared pid namespace alive.
    pid_owner: Option<ExitReceiver>,
}

impl Pod {
    /// A pid namespace ends with its first process.
    fn live_pid_namespace(&self) -> Option<String> {
        let owner = self.pid_owner.as_ref()?;
        let is_alive = owner.borrow().is_none();
        self.shared.pid.clone().filter(|_| is_alive)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An id that is taken until the container is inserted or the value dropped.
pub(crate) struct Reservation {
    sandbox: Arc<Sandbox>,
    id: String,
    is_used: bool,
}

impl Reservation {
    pub(crate) fn insert(mut self, container: Container) {
        self.is_used = true;
        let entry = Entry::Made(Arc::new(container));
        lock(&self.sandbox.containers).insert(self.id.clone(), entry);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.is_used {
            lock(&self.sandbox.containers).remove(&self.id);
        }
    }
}

impl Sandbox {
    /// Starts what the requests share, on the current runtime.
    ///
    /// # Errors
    /// The kernel refuses a descriptor or the signal handler.
    pub(crate) fn new(config: Config) -> Result<Arc<Self>> {
        let devices = Devices::start(config.hotplug_timeout)?;
        Ok(Arc::new(Self {
            reaper: Reaper::start().during("start reaper")?,
            oom: OomEvents::start()?,
            devices,
            config,
            storages: StorageTable::default(),
            containers: Mutex::default(),
            pod: Mutex::default(),
        }))
    }

    /// Prepares the guest for the pod.
    ///
    /// # Errors
    /// It was prepared before, or a step fails.
    pub(crate) async fn create(&self, request: CreateSandboxRequest) -> Result<()> {
        {
            let mut pod = lock(&self.pod);
            if pod.is_created {
                return Err(AgentError::State {
                    id: request.sandbox_id,
                    state: "created",
                    operation: "create sandbox",
                });
            }
            pod.is_created = true;
        }
        let prepared = self.prepare(&request).await;
        let mut pod = lock(&self.pod);
        match prepared {
            Ok(shared) => {
                pod.shared = shared;
                Ok(())
            }
            Err(error) => {
                pod.is_created = false;
                Err(error)
            }
        }
    }

    async fn prepare(&self, request: &CreateSandboxRequest) -> Result<SharedNamespaces> {
        for module in &request.kernel_modules {
            self.load_module(&module.name, &module.parameters).await?;
        }
        if !request.guest_hook_path.is_empty() {
            log::warning("sandbox", "guest hooks are not supported and do not run");
        }
        let (hostname, dns) = (request.hostname.clone(), request.dns.clone());
        let shared = tokio::task::spawn_blocking(move || {
            recreate_work_root()?;
            let shared = namespace::create_shared(&hostname)?;
            set_dns(&dns)?;
            Ok::<_, AgentError>(shared)
        })
        .await
        .map_err(|_| AgentError::TaskLost)??;
        // Held by the sandbox: never released before the guest ends.
        self.storages.add(&request.storages, &self.devices).await?;
        Ok(shared)
    }

    async fn load_module(&self, name: &str, parameters: &[String]) -> Result<()> {
        let mut command = Command::new("/sbin/modprobe");
        command.arg("-v").arg("--").arg(name).args(parameters);
        let (_, mut exit) = self
            .reaper
            .spawn(&mut command)
            .on("run", "/sbin/modprobe")?;
        let exit = timeout(MODPROBE_DEADLINE, exited(&mut exit))
            .await
            .map_err(|_| AgentError::Timeout { what: "modprobe" })?;
        if exit.status == 0 {
            return Ok(());
        }
        Err(AgentError::Runtime(format!(
            "modprobe {name} ended with {}",
            exit.status
        )))
    }

    /// The namespaces a new container shares.
    ///
    /// # Errors
    /// The pod's pid namespace is asked for, but the first container was made without one.
    pub(crate) fn shared_namespaces(&self, is_pid_shared: bool) -> Result<SharedNamespaces> {
        let pod = lock(&self.pod);
        let mut shared = pod.shared.clone();
        shared.pid = pod.live_pid_namespace().filter(|_| is_pid_shared);
        drop(pod);
        if is_pid_shared && shared.pid.is_none() && !self.containers().is_empty() {
            return Err(AgentError::Runtime(
                "Sandbox does not have sandbox_pidns".into(),
            ));
        }
        Ok(shared)
    }

    /// The first container's pid namespace becomes the pod's.
    pub(crate) fn record_pid_namespace(&self, process: &Process) {
        let mut pod = lock(&self.pod);
        if pod.live_pid_namespace().is_none() {
            match namespace::pin_pid(process.pid) {
                Ok(path) => {
                    pod.shared.pid = Some(path);
                    pod.pid_owner = Some(process.exit().clone());
                }
                Err(error) => log::warning("sandbox", chain(&error)),
            }
        }
    }

    /// Takes an id for a new container.
    ///
    /// # Errors
    /// It is taken.
    pub(crate) fn reserve(self: &Arc<Self>, id: &str) -> Result<Reservation> {
        let mut containers = lock(&self.containers);
        if containers.contains_key(id) {
            return Err(AgentError::ContainerExists(id.to_owned()));
        }
        containers.insert(id.to_owned(), Entry::Creating);
        Ok(Reservation {
            sandbox: Arc::clone(self),
            id: id.to_owned(),
            is_used: false,
        })
    }

    /// # Errors
    /// There is no such container.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>> {
        match lock(&self.containers).get(id) {
            Some(Entry::Made(container)) => Ok(Arc::clone(container)),
            _ => Err(AgentError::UnknownContainer(id.to_owned())),
        }
    }

    fn containers(&self) -> Vec<Arc<Container>> {
        lock(&self.containers)
            .values()
            .filter_map(|entry| match entry {
                Entry::Made(container) => Some(Arc::clone(container)),
                Entry::Creating => None,
            })
            .collect()
    }

    /// Ends and forgets a container. Its id is free when this returns.
    ///
    /// # Errors
    /// There is no such container, or something may still use its storages.
    pub(crate) async fn remove(&self, id: &str) -> Result<()> {
        let container = {
            let mut containers = lock(&self.containers);
            match containers.insert(id.to_owned(), Entry::Creating) {
                Some(Entry::Made(container)) => container,
                Some(Entry::Creating) => {
                    return Err(AgentError::UnknownContainer(id.to_owned()));
                }
                None => {
                    containers.remove(id);
                    return Err(AgentError::UnknownContainer(id.to_owned()));
                }
            }
        };
        let removed = container.remove(self).await;
        lock(&self.containers).remove(id);
        removed
    }

    /// Ends every container.
    pub(crate) async fn destroy(&self) {
        for container in self.containers() {
            // Somebody else may have removed it meanwhile.
            let _ = self.remove(&container.id).await;
        }
    }
}

/// Nothing is removed recursively: the shared folder may still be mounted below.
fn recreate_work_root() -> Result<()> {
    let root = Path::new(WORK_ROOT);
    let mounts = fs::read_to_string("/proc/self/mounts").on("read", "/proc/self/mounts")?;
    let below: Vec<&str> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|target| Path::new(target).starts_with(root))
        .collect();
    for target in below.iter().rev() {
        unmount_at(Path::new(target))?;
    }
    match fs::remove_dir_all(root) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).on("remove", root)?;
        }
        _ => {}
    }
    let sandbox = root.join("sandbox");
    fs::create_dir_all(&sandbox).on("create", sandbox)
}

/// The entries are complete lines of `resolv.conf`.
fn set_dns(lines: &[String]) -> Result<()> {
    const TARGET: &str = "/etc/resolv.conf";
    if lines.is_empty() || !Path::new(TARGET).is_file() {
        return Ok(());
    }
    let source = format!("{WORK_ROOT}/sandbox/resolv.conf");
    let lines: Vec<&str> = lines.iter().map(|line| line.trim()).collect();
    fs::write(&source, lines.join("\n")).on("write", &source)?;
    let options = Options {
        is_bind: true,
        ..Options::default()
    };
    mount_at(
        &source,
        Path::new(TARGET),
        "bind",
        &options,
        TargetKind::File,
    )
}
