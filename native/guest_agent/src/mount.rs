//! Mounting in the guest: option words, safe mount points, unmounting.
//!
//! A mount point can lie in a directory that a container can write, so it is created and resolved
//! without following any symbolic link, and mounted on through its descriptor.

use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, open, openat, openat2};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};

use crate::error::{AgentError, IoContext, Result};

/// Mount options, sorted into what the kernel takes separately.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) flags: MountFlags,
    pub(crate) propagation: MountPropagationFlags,
    pub(crate) is_bind: bool,
    pub(crate) is_recursive: bool,
    /// File system specific words, joined by commas.
    pub(crate) data: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            flags: MountFlags::empty(),
            propagation: MountPropagationFlags::empty(),
            is_bind: false,
            is_recursive: false,
            data: String::new(),
        }
    }
}

impl Options {
    /// # Errors
    /// `loop`: there is no loop device to set up here.
    pub(crate) fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut options = Self::default();
        let words = words.into_iter().flat_map(|text| text.split(','));
        for word in words.filter(|word| !word.is_empty()) {
            options.add(word)?;
        }
        Ok(options)
    }

    fn add(&mut self, word: &str) -> Result<()> {
        let flag = match word {
            "ro" => (MountFlags::RDONLY, true),
            "rw" => (MountFlags::RDONLY, false),
            "nosuid" => (MountFlags::NOSUID, true),
            "suid" => (MountFlags::NOSUID, false),
            "nodev" => (MountFlags::NODEV, true),
            "dev" => (MountFlags::NODEV, false),
            "noexec" => (MountFlags::NOEXEC, true),
            "exec" => (MountFlags::NOEXEC, false),
            "sync" => (MountFlags::SYNCHRONOUS, true),
            "dirsync" => (MountFlags::DIRSYNC, true),
            "noatime" => (MountFlags::NOATIME, true),
            "nodiratime" => (MountFlags::NODIRATIME, true),
            "relatime" => (MountFlags::RELATIME, true),
            "strictatime" => (MountFlags::STRICTATIME, true),
            "defaults" | "async" | "atime" => (MountFlags::empty(), true),
            "loop" => return Err(AgentError::invalid("mount option", "loop is not supported")),
            _ => {
                self.add_other(word);
                return Ok(());
            }
        };
        self.flags.set(flag.0, flag.1);
        Ok(())
    }

    fn add_other(&mut self, word: &str) {
        let (kind, is_recursive) = match word {
            "bind" | "rbind" => {
                self.is_bind = true;
                self.is_recursive |= word == "rbind";
                return;
            }
            "private" | "rprivate" => (MountPropagationFlags::PRIVATE, word == "rprivate"),
            "slave" | "rslave" => (MountPropagationFlags::DOWNSTREAM, word == "rslave"),
            "shared" | "rshared" => (MountPropagationFlags::SHARED, word == "rshared"),
            "unbindable" | "runbindable" => {
                (MountPropagationFlags::UNBINDABLE, word == "runbindable")
            }
            _ => {
                if !self.data.is_empty() {
                    self.data.push(',');
                }
                self.data.push_str(word);
                return;
            }
        };
        self.propagation = kind;
        self.propagation
            .set(MountPropagationFlags::REC, is_recursive);
    }
}

/// Whether a mount point is to be a directory or a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TargetKind {
    Directory,
    File,
}

/// Mounts `source` on `target`, which is created.
///
/// # Errors
/// The target cannot be made without following a link, or the kernel refuses the mount.
pub(crate) fn mount_at(
    source: &str,
    target: &Path,
    filesystem: &str,
    options: &Options,
    kind: TargetKind,
) -> Result<()> {
    let descriptor = create_target(target, kind)?;
    let through = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    if options.is_bind || filesystem == "bind" {
        let recursive = if options.is_recursive {
            MountFlags::BIND | MountFlags::REC
        } else {
            MountFlags::BIND
        };
        mount(
            source,
            through.as_str(),
            "",
            recursive,
            None::<&std::ffi::CStr>,
        )
        .on("bind mount on", target)?;
        if !options.flags.is_empty() {
            // The flags of a bind mount only count when it is remounted; the descriptor still shows
            // what lies below, so it is looked up again.
            let mounted = resolve(target)?;
            let mounted = format!("/proc/self/fd/{}", mounted.as_raw_fd());
            mount_remount(mounted.as_str(), options.flags | MountFlags::BIND, "")
                .on("remount", target)?;
        }
    } else {
        let data = CString::new(options.data.as_str())
            .map_err(|_| AgentError::invalid("mount option", "holds a NUL byte"))?;
        mount(
            source,
            through.as_str(),
            filesystem,
            options.flags,
            data.as_c_str(),
        )
        .on("mount on", target)?;
    }
    if !options.propagation.is_empty() {
        let mounted = resolve(target)?;
        let mounted = format!("/proc/self/fd/{}", mounted.as_raw_fd());
        mount_change(mounted.as_str(), options.propagation).on("set propagation of", target)?;
    }
    Ok(())
}

/// Unmounts lazily; what is not mounted is fine.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn unmount_at(target: &Path) -> Result<()> {
    match unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(error).on("unmount", target),
    }
}

/// Checks that a path from the host is absolute and has no `..`.
///
/// # Errors
/// It is not.
pub(crate) fn absolute(path: &str) -> Result<PathBuf> {
    let path = Path::new(path);
    let is_plain = path
        .components()
        .all(|component| matches!(component, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !is_plain || path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(AgentError::invalid("path", path.display().to_string()));
    }
    Ok(path.to_path_buf())
}

/// Opens a path no component of which is a symbolic link.
fn resolve(path: &Path) -> Result<OwnedFd> {
    openat2(
        rustix::fs::CWD,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )
    .on("open", path)
}

/// Creates a directory and those above it, following no link, and opens it.
///
/// # Errors
/// A component is a link or no directory.
pub(crate) fn create_directory(path: &Path, mode: u32) -> Result<OwnedFd> {
    let mut directory = open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).on("open", "/")?;
    for component in path.components() {
        let name = match component {
            Component::RootDir => continue,
            Component::Normal(name) => name,
            _ => return Err(AgentError::invalid("path", path.display().to_string())),
        };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY | OFlags::CLOEXEC;
        directory = match openat(&directory, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => {
                match mkdirat(&directory, name, Mode::from_raw_mode(mode)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error).on("create", path),
                }
                openat(&directory, name, flags, Mode::empty()).on("open", path)?
            }
            other => other.on("open", path)?,
        };
    }
    Ok(directory)
}

fn create_target(path: &Path, kind: TargetKind) -> Result<OwnedFd> {
    const DIRECTORY_MODE: u32 = 0o755;
    if kind == TargetKind::Directory {
        return create_directory(path, DIRECTORY_MODE);
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(AgentError::invalid("path", path.display().to_string()));
    };
    let parent = create_directory(parent, DIRECTORY_MODE)?;
    let flags = OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    openat(&parent, name, flags, Mode::from_raw_mode(0o644)).on("create", path)?;
    openat(
        &parent,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .on("open", path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_sorted_into_flags_and_data() {
        let options = Options::parse(["ro,nosuid", "mode=1777", "size=5", "rslave", "rw"]).unwrap();
        assert_eq!(options.flags, MountFlags::NOSUID);
        assert_eq!(options.data, "mode=1777,size=5");
        assert_eq!(
            options.propagation,
            MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC
        );
        assert!(!options.is_bind);
    }

    #[test]
    fn loop_is_refused() {
        assert!(Options::parse(["loop"]).is_err());
    }

    #[test]
    fn only_plain_absolute_paths_pass() {
        assert!(absolute("/run/a").is_ok());
        for path in ["run/a", "/run/../a", "", "/a\0b"] {
            assert!(absolute(path).is_err(), "{path:?}");
        }
    }

    #[test]
    fn directories_are_not_created_through_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().canonicalize().unwrap();
        std::os::unix::fs::symlink("/tmp", base.join("link")).unwrap();
        assert!(create_directory(&base.join("link/x"), 0o755).is_err());
        assert!(create_directory(&base.join("a/b"), 0o755).is_ok());
        assert!(base.join("a/b").is_dir());
    }

    proptest::proptest! {
        #[test]
        fn any_option_words_are_parsed(words in proptest::collection::vec(".*", 0..4)) {
            let _ = Options::parse(words.iter().map(String::as_str));
        }
    }
}
