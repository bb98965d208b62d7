//! The guest's side, for tests: a driver with both queues, and FUSE requests as a kernel sends them.

use std::path::{Path, PathBuf};

use rustix::io::Errno;
use virtio_core::mock::{MockBuffer, MockDriver, UsedElement, mock_ram};

use super::protocol::{IN_HEADER_SIZE, OUT_HEADER_SIZE, ROOT_ID, opcode};
use super::{CacheMode, Fs, FsConfig};
use crate::virtio::device::VirtioDevice;
use crate::virtio::mock::MockTransport;

const QUEUE_SIZE: u16 = 64;
const RINGS: [u64; 2] = [0x1000, 0x4000];
const REQUEST: u64 = 0x1_0000;
const ANSWER: u64 = 0x20_0000;
const RAM_SIZE: usize = 4 << 20;
/// Room left for an answer if a test does not say.
const ROOM: u32 = 0x1_0100;

/// A request's fields.
#[derive(Clone, Debug, Default)]
pub(super) struct Body(pub(super) Vec<u8>);

impl Body {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// With the zero at its end.
    pub(super) fn text(self, text: impl AsRef<[u8]>) -> Self {
        self.bytes(text.as_ref()).bytes(&[0])
    }
}

/// An answer's fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer(pub(super) Vec<u8>);

impl Answer {
    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().unwrap())
    }

    pub(super) fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    /// Of a `fuse_entry_out`.
    pub(super) fn entry(&self) -> Attributes {
        Attributes::parse(self, self.u64(0), 40)
    }

    /// Of a `fuse_attr_out`.
    pub(super) fn attributes(&self) -> Attributes {
        Attributes::parse(self, 0, 16)
    }
}

/// What tests look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) node: u64,
    pub(super) inode: u64,
    pub(super) size: u64,
    pub(super) access_s: u64,
    pub(super) modified_s: u64,
    pub(super) mode: u32,
    pub(super) links: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) device: u32,
    pub(super) flags: u32,
}

impl Attributes {
    fn parse(answer: &Answer, node: u64, at: usize) -> Self {
        Self {
            node,
            inode: answer.u64(at),
            size: answer.u64(at + 8),
            access_s: answer.u64(at + 24),
            modified_s: answer.u64(at + 32),
            mode: answer.u32(at + 60),
            links: answer.u32(at + 64),
            uid: answer.u32(at + 68),
            gid: answer.u32(at + 72),
            device: answer.u32(at + 76),
            flags: answer.u32(at + 84),
        }
    }
}

/// A guest that has mounted a folder.
pub(super) struct MockGuest {
    pub(super) fs: Fs,
    pub(super) drivers: [MockDriver; 2],
    pub(super) transport: MockTransport,
    unique: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl MockGuest {
    /// Mount a folder writable, with the usual caching.
    pub(super) fn mount(folder: &Path) -> Self {
        Self::mount_with(FsConfig::new("shared", folder))
    }

    /// Mount as configured.
    pub(super) fn mount_with(config: FsConfig) -> Self {
        let mut guest = Self::boot(Fs::new(config).unwrap());
        guest.init(u64::MAX).unwrap();
        guest
    }

    /// Save the device and restore it as another process would, on the same folder.
    pub(super) fn restore_elsewhere(self, config: FsConfig) -> Self {
        let state = self.fs.save().unwrap();
        let (unique, uid, gid) = (self.unique, self.uid, self.gid);
        // What was open is closed, as when a process ends.
        drop(self);
        let mut fs = Fs::new(config).unwrap();
        fs.restore(&state).unwrap();
        let guest = Self::boot(fs);
        Self {
            unique,
            uid,
            gid,
            ..guest
        }
    }

    /// Activate a device; nothing is mounted.
    pub(super) fn boot(mut fs: Fs) -> Self {
        let ram = mock_ram(RAM_SIZE);
        let drivers = RINGS.map(|base| MockDriver::new(&ram, base, QUEUE_SIZE));
        let transport = MockTransport::new(&ram, 2);
        let activation = transport.activation(
            virtio_core::features::RING,
            &[Some(&drivers[0]), Some(&drivers[1])],
        );
        fs.activate(activation).unwrap();
        Self {
            fs,
            drivers,
            transport,
            unique: 0,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        }
    }

    /// `FUSE_INIT` with these flags.
    pub(super) fn init(&mut self, flags: u64) -> Result<Answer, Errno> {
        let [low, high] =
            [flags, flags >> 32].map(|half| u32::try_from(half & 0xffff_ffff).unwrap());
        let body = Body::new().u32(7).u32(39).u32(1 << 20).u32(low).u32(high);
        self.request(opcode::INIT, 0, body.bytes(&[0; 44]))
    }

    /// A whole request with the usual room for its answer.
    #[expect(clippy::needless_pass_by_value, reason = "bodies are built in place")]
    pub(super) fn request(&mut self, opcode: u32, node: u64, body: Body) -> Result<Answer, Errno> {
        self.request_with_room(opcode, node, &body, ROOM)
    }

    /// A whole request with room for an answer of so many bytes.
    pub(super) fn request_with_room(
        &mut self,
        opcode: u32,
        node: u64,
        body: &Body,
        room: u32,
    ) -> Result<Answer, Errno> {
        let request = self.header(opcode, node, body);
        let unique = self.unique;
        let (used, bytes) = self.send(1, &request, room);
        assert!(used.len >= 16, "an answer to {opcode}");
        let answer = Answer(bytes);
        assert_eq!(answer.u32(0), used.len, "length of the answer to {opcode}");
        assert_eq!(answer.u64(8), unique);
        match answer.u32(4).cast_signed() {
            0 => Ok(Answer(answer.0[OUT_HEADER_SIZE..].to_vec())),
            code => {
                assert_eq!(used.len, 16, "an error has no fields");
                Err(Errno::from_raw_os_error(-code))
            }
        }
    }

    /// The bytes of a request.
    pub(super) fn header(&mut self, opcode: u32, node: u64, body: &Body) -> Vec<u8> {
        self.unique += 1;
        let len = u32::try_from(IN_HEADER_SIZE + body.0.len()).unwrap();
        let header = Body::new().u32(len).u32(opcode).u64(self.unique).u64(node);
        let header = header.u32(self.uid).u32(self.gid).u32(1).u32(0);
        header.bytes(&body.0).0
    }

    /// Any bytes through queue `index`, cut as kernels do it; gives what was answered.
    pub(super) fn send(
        &mut self,
        index: usize,
        request: &[u8],
        room: u32,
    ) -> (UsedElement, Vec<u8>) {
        let driver = &mut self.drivers[index];
        driver.write(REQUEST, request);
        driver.write(ANSWER, &vec![0xa5; room as usize]);
        let mut buffers = Vec::new();
        let mut at = REQUEST;
        for piece in pieces(u32::try_from(request.len()).unwrap(), 40) {
            buffers.push(MockBuffer::readable(at, piece));
            at += u64::from(piece);
        }
        let mut at = ANSWER;
        for piece in pieces(room, 16) {
            buffers.push(MockBuffer::writable(at, piece));
            at += u64::from(piece);
        }
        let head = driver.add(&buffers);
        self.transport.kick(index);
        self.transport.settle(&mut self.fs).unwrap();
        let driver = &mut self.drivers[index];
        let used = driver.take_used();
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].head, u32::from(head));
        assert!(used[0].len <= room);
        let answer = driver.read(ANSWER, used[0].len as usize);
        let after = driver.read(
            ANSWER + u64::from(used[0].len),
            (room - used[0].len) as usize,
        );
        assert!(
            after.iter().all(|byte| *byte == 0xa5),
            "nothing after the answer"
        );
        (used[0], answer)
    }

    pub(super) fn lookup(&mut self, parent: u64, name: &str) -> Result<Attributes, Errno> {
        let answer = self.request(opcode::LOOKUP, parent, Body::new().text(name))?;
        Ok(answer.entry())
    }

    /// Follow names from the root.
    pub(super) fn walk(&mut self, path: &str) -> Result<Attributes, Errno> {
        let mut found = None;
        for name in path.split('/') {
            let parent = found.map_or(ROOT_ID, |entry: Attributes| entry.node);
            found = Some(self.lookup(parent, name)?);
        }
        Ok(found.unwrap())
    }

    pub(super) fn forget(&mut self, node: u64, lookups: u64) {
        let request = self.header(opcode::FORGET, node, &Body::new().u64(lookups));
        let (used, _) = self.send(0, &request, 0);
        assert_eq!(used.len, 0);
    }

    pub(super) fn attributes(&mut self, node: u64) -> Result<Attributes, Errno> {
        let body = Body::new().u32(0).u32(0).u64(0);
        Ok(self.request(opcode::GETATTR, node, body)?.attributes())
    }

    /// Gives the handle.
    pub(super) fn open(&mut self, node: u64, flags: i32) -> Result<u64, Errno> {
        let body = Body::new().u32(flags.cast_unsigned()).u32(0);
        Ok(self.request(opcode::OPEN, node, body)?.u64(0))
    }

    /// Gives what was made, and the handle.
    pub(super) fn create(
        &mut self,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> Result<(Attributes, u64), Errno> {
        let flags = (flags | libc::O_CREAT).cast_unsigned();
        let body = Body::new()
            .u32(flags)
            .u32(libc::S_IFREG | mode)
            .u32(0)
            .u32(0);
        let answer = self.request(opcode::CREATE, parent, body.text(name))?;
        Ok((answer.entry(), answer.u64(128)))
    }

    pub(super) fn read(&mut self, handle: u64, position: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let body = Body::new().u64(handle).u64(position).u32(size).u32(0);
        let body = body.u64(0).u32(0).u32(0);
        let room = size + 16;
        Ok(self
            .request_with_room(opcode::READ, ROOT_ID, &body, room)?
            .0)
    }

    pub(super) fn write(&mut self, handle: u64, position: u64, data: &[u8]) -> Result<u32, Errno> {
        self.write_with(handle, position, data, 0, 0)
    }

    pub(super) fn write_with(
        &mut self,
        handle: u64,
        position: u64,
        data: &[u8],
        write_flags: u32,
        file_flags: i32,
    ) -> Result<u32, Errno> {
        let size = u32::try_from(data.len()).unwrap();
        let body = Body::new()
            .u64(handle)
            .u64(position)
            .u32(size)
            .u32(write_flags);
        let body = body
            .u64(0)
            .u32(file_flags.cast_unsigned())
            .u32(0)
            .bytes(data);
        let answer = self.request_with_room(opcode::WRITE, ROOT_ID, &body, 24)?;
        Ok(answer.u32(0))
    }

    pub(super) fn release(&mut self, handle: u64) -> Result<(), Errno> {
        let body = Body::new().u64(handle).u32(0).u32(0).u64(0);
        self.request(opcode::RELEASE, ROOT_ID, body).map(drop)
    }

    pub(super) fn metric(&self, name: &str) -> u64 {
        let metrics = self.fs.metrics();
        metrics.iter().find(|(key, _)| *key == name).unwrap().1
    }
}

/// The first piece of a kernel's buffer is a header; the rest comes in pages.
fn pieces(len: u32, header: u32) -> Vec<u32> {
    let mut pieces = vec![len.min(header)];
    let mut rest = len - pieces[0];
    while rest > 0 {
        // Bigger than pages when many, to stay within the ring.
        pieces.push(rest.min(if len > 0x2_0000 { 0x1_0000 } else { 0x1000 }));
        rest -= pieces[pieces.len() - 1];
    }
    pieces.retain(|piece| *piece > 0);
    pieces
}

/// A folder with something in it, and next to it what no guest may reach.
pub(super) struct Folder {
    around: tempfile::TempDir,
}

impl Folder {
    pub(super) fn new() -> Self {
        Self::new_in(std::env::temp_dir())
    }

    pub(super) fn new_in(parent: impl AsRef<Path>) -> Self {
        let around = tempfile::tempdir_in(parent).unwrap();
        std::fs::create_dir(around.path().join("shared")).unwrap();
        std::fs::write(around.path().join("canary"), "secret").unwrap();
        Self { around }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.around.path().join("shared")
    }

    /// The same place for another process.
    pub(super) fn config(&self) -> FsConfig {
        FsConfig::new("shared", self.path())
    }

    /// A path below.
    pub(super) fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub(super) fn outside(&self) -> &Path {
        self.around.path()
    }

    pub(super) fn mount(&self) -> MockGuest {
        MockGuest::mount(&self.path())
    }

    pub(super) fn mount_cached(&self, cache: CacheMode) -> MockGuest {
        MockGuest::mount_with(FsConfig {
            cache,
            ..self.config()
        })
    }

    pub(super) fn mount_read_only(&self) -> MockGuest {
        MockGuest::mount_with(FsConfig {
            is_read_only: true,
            ..self.config()
        })
    }
}
