//! Extended attributes, by the two-step protocol: asked with size 0, the answer is the size.

use rustix::fs::{XattrFlags, getxattr, getxattr_query, listxattr, listxattr_query};
use rustix::fs::{removexattr, setxattr};
use rustix::io::Errno;

use super::descriptor_path::DescriptorPath;
use super::protocol::{MAX_NAME, MAX_XATTR};
use super::reply::Reply;
use super::request::Fields;
use super::share::Share;

impl Share {
    /// `FUSE_SETXATTR`.
    pub(super) fn set_xattr(&self, node: u64, mut body: Fields<'_>) -> Result<(), Errno> {
        let (size, flags) = (body.u32()?, body.u32()?);
        let name = xattr_name(&mut body)?;
        if size as usize > MAX_XATTR {
            return Err(Errno::TOOBIG);
        }
        let value = body.bytes(size as usize)?;
        let path = self.path(node)?;
        let flags = XattrFlags::from_bits_retain(flags);
        setxattr(path.as_c_str(), name, value, flags)
    }

    /// `FUSE_GETXATTR`.
    pub(super) fn get_xattr(
        &self,
        node: u64,
        mut body: Fields<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let size = body.u32()?;
        body.skip::<4>()?;
        let name = xattr_name(&mut body)?;
        let path = self.path(node)?;
        if size == 0 {
            return answer_size(reply, getxattr_query(path.as_c_str(), name)?);
        }
        reply.fill(bounded(size), |value| {
            getxattr(path.as_c_str(), name, value)
        })
    }

    /// `FUSE_LISTXATTR`.
    pub(super) fn list_xattrs(
        &self,
        node: u64,
        mut body: Fields<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let size = body.u32()?;
        let path = self.path(node)?;
        if size == 0 {
            return answer_size(reply, listxattr_query(path.as_c_str())?);
        }
        reply.fill(bounded(size), |names| listxattr(path.as_c_str(), names))
    }

    /// `FUSE_REMOVEXATTR`.
    pub(super) fn remove_xattr(&self, node: u64, mut body: Fields<'_>) -> Result<(), Errno> {
        let name = xattr_name(&mut body)?;
        removexattr(self.path(node)?.as_c_str(), name)
    }

    fn path(&self, node: u64) -> Result<DescriptorPath, Errno> {
        let descriptor = self.nodes.get(node)?.descriptor()?;
        Ok(DescriptorPath::new(descriptor))
    }
}

fn xattr_name<'a>(body: &mut Fields<'a>) -> Result<&'a std::ffi::CStr, Errno> {
    let name = body.text()?;
    if name.count_bytes() > MAX_NAME {
        return Err(Errno::RANGE);
    }
    Ok(name)
}

/// No more than any attribute or list has.
fn bounded(size: u32) -> usize {
    (size as usize).min(MAX_XATTR)
}

/// `struct fuse_getxattr_out`.
fn answer_size(reply: &mut Reply, size: usize) -> Result<(), Errno> {
    reply.u32(u32::try_from(size).map_err(|_| Errno::OVERFLOW)?);
    reply.u32(0);
    Ok(())
}

#[cfg(test)]
#[path = "xattrs_tests.rs"]
mod tests;
