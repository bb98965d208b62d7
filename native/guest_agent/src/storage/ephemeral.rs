//! Storages in the guest's memory and file system: tmpfs, huge pages, plain directories; and the
//! group ownership any storage may ask for.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use protocols::agent::Storage;

use crate::error::{AgentError, IoContext, Result};
use crate::mount::{Options, TargetKind, create_directory, mount_at};

const GROUP_KEY: &str = "fsgid=";
const MODE_KEY: &str = "mode=";
const SETGID: u32 = 0o2000;

/// Mounts a tmpfs or a hugetlbfs.
pub(super) fn mount(storage: &Storage, target: &Path) -> Result<()> {
    let group = find(&storage.options, GROUP_KEY);
    let words = storage
        .options
        .iter()
        .flat_map(|option| option.split(','))
        .filter(|word| !word.starts_with(GROUP_KEY));
    let options = Options::parse(words)?;
    let filesystem = if storage.fstype == "hugetlbfs" {
        reserve_huge_pages(&options.data)?;
        "hugetlbfs"
    } else {
        "tmpfs"
    };
    mount_at(
        filesystem,
        target,
        filesystem,
        &options,
        TargetKind::Directory,
    )?;
    match group {
        Some(group) => set_group(target, group),
        None => Ok(()),
    }
}

/// Makes a directory that containers share.
pub(super) fn make_local(storage: &Storage, target: &Path) -> Result<()> {
    create_directory(target, 0o755)?;
    if let Some(mode) = find(&storage.options, MODE_KEY) {
        let mode = u32::from_str_radix(mode, 8)
            .map_err(|_| AgentError::invalid("storage option", format!("mode={mode}")))?;
        fs::set_permissions(target, fs::Permissions::from_mode(mode & 0o7777))
            .on("set mode of", target)?;
    }
    match find(&storage.options, GROUP_KEY) {
        Some(group) => set_group(target, group),
        None => Ok(()),
    }
}

fn find<'a>(options: &'a [String], key: &str) -> Option<&'a str> {
    options
        .iter()
        .flat_map(|option| option.split(','))
        .find_map(|word| word.strip_prefix(key))
}

fn set_group(target: &Path, group: &str) -> Result<()> {
    let group: u32 = group
        .parse()
        .map_err(|_| AgentError::invalid("storage option", format!("fsgid={group}")))?;
    std::os::unix::fs::chown(target, None, Some(group)).on("change group of", target)?;
    let mode = fs::metadata(target).on("stat", target)?.mode();
    fs::set_permissions(target, fs::Permissions::from_mode((mode & 0o7777) | SETGID))
        .on("set mode of", target)
}

/// `pagesize=` and `size=` are bytes here; the kernel wants a count in the pool first.
fn reserve_huge_pages(data: &str) -> Result<()> {
    let value = |key: &str| {
        data.split(',')
            .find_map(|word| word.strip_prefix(key))
            .and_then(|text| text.parse::<u64>().ok())
            .filter(|number| *number > 0)
    };
    let (Some(page), Some(size)) = (value("pagesize="), value("size=")) else {
        return Err(AgentError::invalid("huge page options", data));
    };
    let pool = format!(
        "/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
        page / 1024
    );
    let wanted = size / page;
    fs::write(&pool, wanted.to_string()).on("write", &pool)?;
    let reserved = fs::read_to_string(&pool).on("read", &pool)?;
    if reserved.trim().parse() == Ok(wanted) {
        return Ok(());
    }
    Err(AgentError::Runtime(format!(
        "{wanted} huge pages of {page} bytes were wanted, the guest has memory for {}",
        reserved.trim()
    )))
}

/// Hands everything below `path` to `group`. Without `is_always`, a root that already belongs to it
/// is taken as done. Links are changed themselves, never followed.
pub(super) fn give_to_group(
    path: &Path,
    group: u32,
    is_readonly: bool,
    is_always: bool,
) -> io::Result<()> {
    let metadata = fs::symlink_metadata(path)?;
    if !is_always && metadata.gid() == group && metadata.mode() & SETGID != 0 {
        return Ok(());
    }
    change(path, &metadata, group, is_readonly)
}

fn change(path: &Path, metadata: &fs::Metadata, group: u32, is_readonly: bool) -> io::Result<()> {
    std::os::unix::fs::lchown(path, None, Some(group))?;
    if metadata.is_symlink() {
        return Ok(());
    }
    let mut bits = if is_readonly { 0o040 } else { 0o060 };
    if metadata.is_dir() {
        bits |= SETGID | 0o010;
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            change(&entry.path(), &entry.metadata()?, group, is_readonly)?;
        }
    }
    let mode = (metadata.mode() & 0o7777) | bits;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_is_given_to_everything_but_what_links_point_at() {
        let directory = tempfile::tempdir().unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        fs::set_permissions(outside.path(), fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink(outside.path(), directory.path().join("link")).unwrap();
        let own = fs::metadata(directory.path()).unwrap().gid();
        give_to_group(directory.path(), own, false, true).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(&directory.path().join("file")) & 0o060, 0o060);
        assert_eq!(mode(directory.path()) & SETGID, SETGID);
        assert_eq!(mode(outside.path()), 0o600);
    }

    #[test]
    fn options_are_found_in_joined_words() {
        let options = ["mode=0777,fsgid=5".to_owned()];
        assert_eq!(find(&options, GROUP_KEY), Some("5"));
        assert_eq!(find(&options, MODE_KEY), Some("0777"));
    }

    #[test]
    fn huge_page_options_without_sizes_are_invalid() {
        assert!(reserve_huge_pages("pagesize=0,size=5").is_err());
        assert!(reserve_huge_pages("size=5").is_err());
    }
}
