//! Files, directories and links that the host writes below the shared folder's place.
//!
//! Only paths below [`ROOT`] are taken, and no component above the last may be a symbolic link: the
//! tree is visible to containers. A file is written next to its final name and moved there when it
//! is complete. Parts of one file come in order, one writer per path. Blocking.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use protocols::agent::CopyFileRequest;
use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Uid, chownat, fchmod, fchown, mkdirat, openat, renameat, statat,
    symlinkat, unlinkat,
};
use rustix::io::Errno;

use crate::error::{AgentError, IoContext, Result};
use crate::mount::{absolute, create_directory};

pub(crate) const ROOT: &str = "/run/kata-containers/shared/containers";

const PERMISSIONS: u32 = 0o7777;

/// # Errors
/// The path is elsewhere, the type unknown, or the file system refuses.
pub(crate) fn copy(request: &CopyFileRequest) -> Result<()> {
    copy_below(request, Path::new(ROOT))
}

fn copy_below(request: &CopyFileRequest, root: &Path) -> Result<()> {
    let path = absolute(&request.path)?;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(AgentError::invalid("path", request.path.as_str()));
    };
    if !path.starts_with(root) || path == root {
        return Err(AgentError::invalid("path", request.path.as_str()));
    }
    let is_new = !parent.exists();
    let directory = create_directory(parent, request.dir_mode & 0o777)?;
    let owner = Some(Uid::from_raw(request.uid.cast_unsigned()));
    let group = Some(Gid::from_raw(request.gid.cast_unsigned()));
    let own = |name: &std::ffi::OsStr| {
        chownat(&directory, name, owner, group, AtFlags::SYMLINK_NOFOLLOW).on("own", &path)
    };
    if is_new {
        chownat(&directory, "", owner, group, AtFlags::EMPTY_PATH).on("own", parent)?;
    }
    let permissions = Mode::from_raw_mode(request.file_mode & PERMISSIONS);
    match request.file_mode & libc::S_IFMT {
        libc::S_IFDIR => {
            match statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if stat.st_mode & libc::S_IFMT == libc::S_IFDIR => {}
                Ok(_) => unlinkat(&directory, name, AtFlags::empty()).on("remove", &path)?,
                Err(_) => {}
            }
            match mkdirat(&directory, name, permissions) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error).on("create", &path),
            }
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = openat(&directory, name, flags, Mode::empty()).on("open", &path)?;
            fchmod(&made, permissions).on("set mode of", &path)?;
            own(name)
        }
        libc::S_IFLNK => {
            remove(&path)?;
            symlinkat(request.data.as_slice(), &directory, name).on("link", &path)?;
            own(name)
        }
        libc::S_IFREG => {
            let offset = u64::try_from(request.offset)
                .map_err(|_| AgentError::invalid("offset", request.offset.to_string()))?;
            let mut temporary = name.to_os_string();
            temporary.push(".kata-copy");
            let mut flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            if offset == 0 {
                flags |= OFlags::TRUNC;
            }
            let file = openat(&directory, &temporary, flags, Mode::from_raw_mode(0o600))
                .on("create", &path)?;
            let file = File::from(file);
            file.write_all_at(&request.data, offset)
                .on("write", &path)?;
            let written = i64::try_from(file.metadata().on("stat", &path)?.len());
            if written == Ok(request.file_size) {
                fchown(&file, owner, group).on("own", &path)?;
                fchmod(&file, permissions).on("set mode of", &path)?;
                if path.is_dir() {
                    remove(&path)?;
                }
                renameat(&directory, &temporary, &directory, name).on("rename", &path)?;
            }
            Ok(())
        }
        other => Err(AgentError::invalid("file type", format!("{other:o}"))),
    }
}

/// Whatever is there; links are not followed.
fn remove(path: &Path) -> Result<()> {
    let result = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(_) => Ok(()),
    };
    result.on("remove", path)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    struct Tree {
        _directory: tempfile::TempDir,
        root: std::path::PathBuf,
    }

    impl Tree {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let root = directory.path().canonicalize().unwrap();
            Self {
                _directory: directory,
                root,
            }
        }

        fn request(&self, name: &str, mode: u32, data: &[u8]) -> CopyFileRequest {
            let metadata = fs::metadata(&self.root).unwrap();
            let mut request = CopyFileRequest::new();
            request.path = self.root.join(name).to_string_lossy().into_owned();
            request.file_mode = mode;
            request.dir_mode = 0o755;
            request.file_size = data.len().try_into().unwrap();
            request.uid = metadata.uid().cast_signed();
            request.gid = metadata.gid().cast_signed();
            request.data = data.to_vec();
            request
        }
    }

    #[test]
    fn file_appears_when_its_last_part_arrives() {
        let tree = Tree::new();
        let mut first = tree.request("a/b.crt", libc::S_IFREG | 0o640, b"one");
        first.file_size = 6;
        copy_below(&first, &tree.root).unwrap();
        let path = tree.root.join("a/b.crt");
        assert!(!path.exists());
        let mut second = first.clone();
        second.data = b"two".to_vec();
        second.offset = 3;
        copy_below(&second, &tree.root).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"onetwo");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o640
        );
    }

    #[test]
    fn empty_file_directory_and_link_are_made() {
        let tree = Tree::new();
        copy_below(
            &tree.request("empty", libc::S_IFREG | 0o600, b""),
            &tree.root,
        )
        .unwrap();
        copy_below(&tree.request("dir", libc::S_IFDIR | 0o700, b""), &tree.root).unwrap();
        copy_below(&tree.request("link", libc::S_IFLNK, b"empty"), &tree.root).unwrap();
        assert!(tree.root.join("dir").is_dir());
        let target = fs::read_link(tree.root.join("link")).unwrap();
        assert_eq!(target, Path::new("empty"));
        assert_eq!(fs::metadata(tree.root.join("link")).unwrap().len(), 0);
    }

    #[test]
    fn paths_that_leave_the_root_are_refused() {
        let tree = Tree::new();
        std::os::unix::fs::symlink("/tmp", tree.root.join("out")).unwrap();
        for name in ["../x", "out/x", "/etc/x", "."] {
            let request = tree.request(name, libc::S_IFREG | 0o600, b"x");
            assert!(copy_below(&request, &tree.root).is_err(), "{name}");
        }
    }
}
