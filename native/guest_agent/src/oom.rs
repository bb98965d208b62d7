//! Out-of-memory events: one inotify descriptor over every container's `memory.events`.
//!
//! One task reads it and queues the id of each container whose `oom_kill` count rose. `GetOOMEvent`
//! takes from the queue and blocks as long as it is empty.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use crate::cgroup::{Cgroup, keyed};
use crate::error::{IoContext, Result};
use crate::readiness;

/// Events kept while nobody asks for them; one container cannot fill the memory.
const MAX_PENDING: usize = 1024;

struct Watch {
    container_id: String,
    events: PathBuf,
    kills: u64,
}

pub(crate) struct OomEvents {
    descriptor: AsyncFd<OwnedFd>,
    watches: Mutex<HashMap<i32, Watch>>,
    pending: Mutex<VecDeque<String>>,
    arrived: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl OomEvents {
    /// Starts watching, on the current runtime.
    ///
    /// # Errors
    /// The kernel has no inotify instance left.
    pub(crate) fn start() -> Result<Arc<Self>> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let descriptor = inotify::init(flags).during("start inotify")?;
        let events = Arc::new(Self {
            descriptor: readiness::watch(descriptor).during("watch inotify")?,
            watches: Mutex::default(),
            pending: Mutex::default(),
            arrived: Notify::new(),
        });
        let task = Arc::clone(&events);
        tokio::spawn(async move { task.collect().await });
        Ok(events)
    }

    /// Watches a container's group.
    ///
    /// # Errors
    /// The group has no memory controller.
    pub(crate) fn watch(&self, container_id: &str, cgroup: &Cgroup) -> Result<()> {
        let events = cgroup.directory().join("memory.events");
        let mut watches = lock(&self.watches);
        let number = inotify::add_watch(
            self.descriptor.get_ref(),
            &events,
            inotify::WatchFlags::MODIFY,
        )
        .on("watch", &events)?;
        watches.insert(
            number,
            Watch {
                container_id: container_id.to_owned(),
                events,
                kills: 0,
            },
        );
        Ok(())
    }

    pub(crate) fn forget(&self, container_id: &str) {
        lock(&self.watches).retain(|number, watch| {
            let is_other = watch.container_id != container_id;
            if !is_other {
                // The kernel drops the watch itself when the file goes.
                let _ = inotify::remove_watch(self.descriptor.get_ref(), *number);
            }
            is_other
        });
    }

    /// The next container in which the kernel killed; waits for it.
    pub(crate) async fn next(&self) -> String {
        loop {
            let arrived = self.arrived.notified();
            if let Some(container_id) = lock(&self.pending).pop_front() {
                return container_id;
            }
            arrived.await;
        }
    }

    async fn collect(&self) {
        loop {
            let Ok(mut ready) = self.descriptor.readable().await else {
                return;
            };
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(self.descriptor.get_ref(), &mut buffer);
            while let Ok(event) = reader.next() {
                self.check(event.wd());
            }
            ready.clear_ready();
        }
    }

    fn check(&self, number: i32) {
        let mut watches = lock(&self.watches);
        let Some(watch) = watches.get_mut(&number) else {
            return;
        };
        // A group that is being removed has nothing to say.
        let Ok(text) = fs::read_to_string(&watch.events) else {
            return;
        };
        let kills = keyed(&text, "oom_kill").unwrap_or_default();
        if kills <= watch.kills {
            return;
        }
        watch.kills = kills;
        let mut pending = lock(&self.pending);
        if pending.len() < MAX_PENDING {
            pending.push_back(watch.container_id.clone());
        }
        drop(pending);
        self.arrived.notify_one();
    }
}
