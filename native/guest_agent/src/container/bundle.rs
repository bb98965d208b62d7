//! A container's bundle: `/run/kata-containers/<id>/{config.json,rootfs}`.

use std::fs;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, open, openat2};

use crate::error::{AgentError, IoContext, Result};
use crate::mount::{Options, TargetKind, absolute, create_directory, mount_at, unmount_at};

pub(crate) const BUNDLE_ROOT: &str = "/run/kata-containers";

#[derive(Debug, Clone)]
pub(crate) struct Bundle {
    directory: PathBuf,
}

impl Bundle {
    pub(super) fn new(container_id: &str) -> Self {
        Self {
            directory: Path::new(BUNDLE_ROOT).join(container_id),
        }
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn rootfs(&self) -> PathBuf {
        self.directory.join("rootfs")
    }

    pub(super) fn config(&self) -> PathBuf {
        self.directory.join("config.json")
    }

    /// Puts the root file system in place, unless a storage already did.
    ///
    /// # Errors
    /// There is no such root, or it cannot be mounted.
    pub(super) fn mount_root(&self, source: &str) -> Result<()> {
        let rootfs = self.rootfs();
        if rootfs.exists() {
            return Ok(());
        }
        let source = absolute(source)?;
        fs::metadata(&source).on("find root file system", &source)?;
        create_directory(&self.directory, 0o755)?;
        let options = Options {
            is_bind: true,
            ..Options::default()
        };
        let source = source
            .to_str()
            .ok_or_else(|| AgentError::invalid("root path", "is not UTF-8"))?;
        mount_at(source, &rootfs, "bind", &options, TargetKind::Directory)
    }

    pub(super) fn write_config(&self, spec: &Spec) -> Result<()> {
        spec.save(self.config()).map_err(|error| {
            AgentError::Runtime(format!("write {}: {error}", self.config().display()))
        })
    }

    /// Makes the working directory where the image lacks it, as other runtimes do. Links are
    /// resolved inside the root. What cannot be made is reported when the process goes there.
    pub(super) fn create_working_directory(&self, spec: &Spec) {
        let Some(process) = spec.process() else {
            return;
        };
        let wanted = process.cwd();
        let is_mounted = spec.mounts().iter().flatten().any(|mount| {
            mount.destination() != Path::new("/") && wanted.starts_with(mount.destination())
        });
        if !is_mounted {
            // Not an error here: the process's own report names the directory.
            let _ = create_in_root(&self.rootfs(), wanted);
        }
    }

    /// Unmounts the root and removes the bundle. Nothing is removed recursively: what is mounted
    /// below belongs to the container.
    pub(crate) fn remove(&self) -> Result<()> {
        let rootfs = self.rootfs();
        if !self.directory.exists() {
            return Ok(());
        }
        unmount_at(&rootfs)?;
        for file in fs::read_dir(&self.directory).on("read", &self.directory)? {
            let path = file.on("read", &self.directory)?.path();
            if path.is_dir() {
                fs::remove_dir(&path).on("remove", &path)?;
            } else {
                fs::remove_file(&path).on("remove", &path)?;
            }
        }
        fs::remove_dir(&self.directory).on("remove", &self.directory)
    }
}

/// Creates a directory inside `root`, as a process with that root would see the path.
fn create_in_root(root: &Path, path: &Path) -> rustix::io::Result<()> {
    let root = open(
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let look = |path: &Path| {
        openat2(
            &root,
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )
    };
    let mut missing: Vec<&Path> = path
        .ancestors()
        .take_while(|ancestor| look(ancestor).is_err())
        .collect();
    while let Some(next) = missing.pop() {
        if let (Some(parent), Some(name)) = (next.parent(), next.file_name()) {
            mkdirat(look(parent)?, name, Mode::from_raw_mode(0o755))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn working_directory_is_made_inside_the_root_through_links() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/target", directory.path().join("link")).unwrap();
        fs::create_dir(directory.path().join("target")).unwrap();
        create_in_root(directory.path(), Path::new("/link/a/b")).unwrap();
        assert!(directory.path().join("target/a/b").is_dir());
        assert!(!Path::new("/target/a").exists());
    }

    #[test]
    fn dangling_link_does_not_lead_out_of_the_root() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/../../nowhere", directory.path().join("link")).unwrap();
        assert!(create_in_root(directory.path(), Path::new("/link/a")).is_err());
    }
}
