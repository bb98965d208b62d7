//! A request as the guest wrote it: the header, and a cursor over what follows.
//!
//! Works on a copy, so the guest cannot change what was checked. Names are single path components
//! by their type: nothing else can be given to the calls that resolve them.

use std::ffi::CStr;

use rustix::io::Errno;

use super::protocol::{IN_HEADER_SIZE, MAX_NAME};

/// `struct fuse_in_header`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes of the request, this header among them.
    pub(super) len: u32,
    pub(super) opcode: u32,
    /// Returned in the answer.
    pub(super) unique: u64,
    /// What the request is about.
    pub(super) node: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl Header {
    /// From the first bytes of a request.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes.get(..IN_HEADER_SIZE)?);
        let mut parse = || {
            Ok::<_, Errno>(Self {
                len: fields.u32()?,
                opcode: fields.u32()?,
                unique: fields.u64()?,
                node: fields.u64()?,
                uid: fields.u32()?,
                gid: fields.u32()?,
            })
        };
        parse().ok()
    }
}

/// A path component: not empty, `.` or `..`, no slash, at most 255 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Check it.
    ///
    /// # Errors
    /// `EINVAL`, `ENAMETOOLONG`.
    pub(super) fn new(text: &'a CStr) -> Result<Self, Errno> {
        match text.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.len() > MAX_NAME => Err(Errno::NAMETOOLONG),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(Self(text)),
        }
    }

    /// For a system call.
    pub(super) fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

/// What of a request is yet to be read. Each call takes from the front.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (array, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*array)
    }

    /// A 32-bit field.
    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        self.array().map(u32::from_le_bytes)
    }

    /// A 64-bit field.
    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        self.array().map(u64::from_le_bytes)
    }

    /// Bytes of no interest.
    pub(super) fn skip<const N: usize>(&mut self) -> Result<(), Errno> {
        self.array::<N>().map(drop)
    }

    /// Bytes up to a zero, which is taken too.
    pub(super) fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = self.0.get(text.count_bytes() + 1..).unwrap_or_default();
        Ok(text)
    }

    /// A path component.
    pub(super) fn name(&mut self) -> Result<Name<'a>, Errno> {
        Name::new(self.text()?)
    }

    /// The next `len` bytes.
    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_single_components() {
        for bad in [c"", c".", c"..", c"/", c"a/b", c"../x", c"a/"] {
            assert_eq!(Name::new(bad), Err(Errno::INVAL), "{bad:?}");
        }
        let long = std::ffi::CString::new(vec![b'x'; MAX_NAME + 1]).unwrap();
        assert_eq!(Name::new(&long), Err(Errno::NAMETOOLONG));
        for good in [c"a", c"...", c"..a", c".a", c"\xff\n"] {
            assert_eq!(Name::new(good).map(Name::as_c_str), Ok(good));
        }
    }

    #[test]
    fn fields_end_where_the_request_does() {
        let mut fields = Fields(b"\x01\0\0\0ab\0c");
        assert_eq!(fields.u64().map(|_| ()), Ok(()));
        assert_eq!(fields.u32(), Err(Errno::INVAL));
        let mut fields = Fields(b"\x01\0\0\0ab\0c");
        assert_eq!(fields.u32(), Ok(1));
        assert_eq!(fields.text(), Ok(c"ab"));
        assert_eq!(fields.text(), Err(Errno::INVAL), "no zero at the end");
        assert_eq!(fields.bytes(2), Err(Errno::INVAL));
        assert_eq!(fields.bytes(1), Ok(&b"c"[..]));
    }

    #[test]
    fn a_short_header_is_none() {
        assert_eq!(Header::parse(&[0; IN_HEADER_SIZE - 1]), None);
        let mut bytes = [0; IN_HEADER_SIZE];
        bytes[4] = 15;
        bytes[16] = 1;
        let header = Header::parse(&bytes).unwrap();
        assert_eq!((header.opcode, header.node), (15, 1));
    }
}
