//! Mounting with fstab-style options: which words are flags, which are propagation, and which go
//! to the file system. mount(2) takes a page of data; an overlay with many layers needs more and
//! is mounted through fsopen(2). Called by [`crate::host`], detached from the interpreter.

use std::ffi::CString;
use std::os::fd::AsFd;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    UnmountFlags,
};

/// Bytes of data that mount(2) copies, its zero included.
const DATA_LIMIT: usize = 4096;

/// Options sorted by what they are for.
#[derive(Debug)]
pub(crate) struct MountOptions {
    flags: MountFlags,
    propagation: Vec<MountPropagationFlags>,
    data: Vec<String>,
}

enum Word {
    Set(MountFlags),
    Clear(MountFlags),
    Propagation(MountPropagationFlags),
    Nothing,
    Data,
}

fn classify(word: &str) -> Word {
    use Word::{Clear, Data, Nothing, Propagation, Set};
    let recursive = MountPropagationFlags::REC;
    match word {
        "" | "defaults" => Nothing,
        "ro" => Set(MountFlags::RDONLY),
        "rw" => Clear(MountFlags::RDONLY),
        "nosuid" => Set(MountFlags::NOSUID),
        "suid" => Clear(MountFlags::NOSUID),
        "nodev" => Set(MountFlags::NODEV),
        "dev" => Clear(MountFlags::NODEV),
        "noexec" => Set(MountFlags::NOEXEC),
        "exec" => Clear(MountFlags::NOEXEC),
        "sync" => Set(MountFlags::SYNCHRONOUS),
        "async" => Clear(MountFlags::SYNCHRONOUS),
        "dirsync" => Set(MountFlags::DIRSYNC),
        "noatime" => Set(MountFlags::NOATIME),
        "atime" => Clear(MountFlags::NOATIME),
        "nodiratime" => Set(MountFlags::NODIRATIME),
        "diratime" => Clear(MountFlags::NODIRATIME),
        "relatime" => Set(MountFlags::RELATIME),
        "norelatime" => Clear(MountFlags::RELATIME),
        "strictatime" => Set(MountFlags::STRICTATIME),
        "nostrictatime" => Clear(MountFlags::STRICTATIME),
        "lazytime" => Set(MountFlags::LAZYTIME),
        "nosymfollow" => Set(MountFlags::NOSYMFOLLOW),
        "silent" => Set(MountFlags::SILENT),
        "loud" => Clear(MountFlags::SILENT),
        "bind" => Set(MountFlags::BIND),
        "rbind" => Set(MountFlags::BIND.union(MountFlags::REC)),
        "private" => Propagation(MountPropagationFlags::PRIVATE),
        "rprivate" => Propagation(MountPropagationFlags::PRIVATE.union(recursive)),
        "slave" => Propagation(MountPropagationFlags::DOWNSTREAM),
        "rslave" => Propagation(MountPropagationFlags::DOWNSTREAM.union(recursive)),
        "shared" => Propagation(MountPropagationFlags::SHARED),
        "rshared" => Propagation(MountPropagationFlags::SHARED.union(recursive)),
        "unbindable" => Propagation(MountPropagationFlags::UNBINDABLE),
        "runbindable" => Propagation(MountPropagationFlags::UNBINDABLE.union(recursive)),
        _ => Data,
    }
}

impl MountOptions {
    /// Sort options; a later word wins over an earlier one.
    pub(crate) fn parse<'a>(words: impl Iterator<Item = &'a str>) -> Self {
        let mut options = Self {
            flags: MountFlags::empty(),
            propagation: Vec::new(),
            data: Vec::new(),
        };
        for word in words {
            match classify(word) {
                Word::Set(flags) => options.flags |= flags,
                Word::Clear(flags) => options.flags -= flags,
                Word::Propagation(flags) => options.propagation.push(flags),
                Word::Nothing => {}
                Word::Data => options.data.push(word.to_owned()),
            }
        }
        options
    }

    /// Mount, with all that the flags imply; undone if a later step fails.
    pub(crate) fn mount(&self, source: &str, target: &str, fstype: &str) -> Result<(), Errno> {
        let data = self.data.join(",");
        if self.flags.contains(MountFlags::BIND) || data.len() < DATA_LIMIT {
            let data = CString::new(data).map_err(|_| Errno::INVAL)?;
            rustix::mount::mount(source, target, fstype, self.flags, data.as_c_str())?;
        } else {
            self.mount_by_descriptor(source, target, fstype)?;
        }
        self.finish(target).inspect_err(|_| {
            // The first failure is the one to report.
            let _undone = rustix::mount::unmount(target, UnmountFlags::DETACH);
        })
    }

    /// A bind mount takes its flags only when it is remounted; propagation is a call of its own.
    fn finish(&self, target: &str) -> Result<(), Errno> {
        let kept = self.flags - (MountFlags::BIND | MountFlags::REC | MountFlags::SILENT);
        if self.flags.contains(MountFlags::BIND) && !kept.is_empty() {
            rustix::mount::mount_remount(target, kept | MountFlags::BIND, c"")?;
        }
        for propagation in &self.propagation {
            rustix::mount::mount_change(target, *propagation)?;
        }
        Ok(())
    }

    fn mount_by_descriptor(&self, source: &str, target: &str, fstype: &str) -> Result<(), Errno> {
        let context = rustix::mount::fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC)?;
        let context = context.as_fd();
        if !source.is_empty() {
            rustix::mount::fsconfig_set_string(context, "source", source)?;
        }
        for option in &self.data {
            match option.split_once('=') {
                None => rustix::mount::fsconfig_set_flag(context, option.as_str())?,
                // One value is limited to 255 bytes here, so layers are added one by one.
                Some(("lowerdir", layers)) if fstype == "overlay" => {
                    for layer in split_layers(layers) {
                        rustix::mount::fsconfig_set_string(context, "lowerdir+", layer)?;
                    }
                }
                Some((key, value)) => rustix::mount::fsconfig_set_string(context, key, value)?,
            }
        }
        rustix::mount::fsconfig_create(context)?;
        let attributes = attributes_of(self.flags);
        let mounted = rustix::mount::fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(mounted.as_fd(), "", CWD, target, flags)
    }
}

/// The layers of a `lowerdir` value: separated by colons, which a backslash escapes.
fn split_layers(layers: &str) -> Vec<String> {
    let mut split = vec![String::new()];
    let mut characters = layers.chars();
    while let Some(character) = characters.next() {
        let next = match character {
            ':' => {
                split.push(String::new());
                continue;
            }
            '\\' => characters.next().unwrap_or('\\'),
            other => other,
        };
        if let Some(layer) = split.last_mut() {
            layer.push(next);
        }
    }
    split
}

fn attributes_of(flags: MountFlags) -> MountAttrFlags {
    let pairs = [
        (MountFlags::RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (MountFlags::NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (MountFlags::NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
        (MountFlags::NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (MountFlags::NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
        (
            MountFlags::STRICTATIME,
            MountAttrFlags::MOUNT_ATTR_STRICTATIME,
        ),
        (
            MountFlags::NODIRATIME,
            MountAttrFlags::MOUNT_ATTR_NODIRATIME,
        ),
        (
            MountFlags::NOSYMFOLLOW,
            MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW,
        ),
    ];
    let wanted = pairs.into_iter().filter(|(flag, _)| flags.contains(*flag));
    wanted.fold(MountAttrFlags::empty(), |attributes, (_, attribute)| {
        attributes | attribute
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_sorted_and_the_last_one_wins() {
        let words = [
            "rbind", "ro", "nosuid", "rw", "rslave", "size=1m", "defaults", "",
        ];
        let options = MountOptions::parse(words.into_iter());
        assert_eq!(
            options.flags,
            MountFlags::BIND | MountFlags::REC | MountFlags::NOSUID
        );
        let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        assert_eq!(options.propagation, [slave]);
        assert_eq!(options.data, ["size=1m"]);
    }

    #[test]
    fn layers_are_split_at_colons_that_are_not_escaped() {
        assert_eq!(split_layers(r"/a:/b\:c:/d\\e"), ["/a", "/b:c", r"/d\e"]);
    }
}
