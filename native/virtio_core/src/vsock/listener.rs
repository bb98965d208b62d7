//! Unix socket files: the one host processes connect to, and those the guest reaches.
//!
//! [`BoundListener`] is a socket file of mode 0600 that goes away with its owner; [`PathDialer`]
//! connects the guest's calls to port P to the socket file `<path>_P`. Both only make calls that
//! return at once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

use super::muxer::Dialer;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// A listening socket could not be made.
#[derive(Debug, Error)]
#[error("listen on {path}")]
pub struct ListenError {
    /// Where.
    pub path: PathBuf,
    /// The cause.
    #[source]
    pub source: io::Error,
}

fn socket() -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)
}

/// A socket file that goes away with its owner.
#[derive(Debug)]
pub struct BoundListener {
    listener: OwnedFd,
    path: PathBuf,
}

impl BoundListener {
    /// Bind `path` with mode 0600 from its first moment on.
    ///
    /// # Errors
    /// There is something at that path, or the system refused; nothing is left behind.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let bind = || -> Result<OwnedFd, Errno> {
            let address = SocketAddrUnix::new(path)?;
            let listener = socket()?;
            // Before bind(2), which gives the file the socket's mode.
            rustix::fs::fchmod(&listener, Mode::RUSR | Mode::WUSR)?;
            rustix::net::bind(&listener, &address)?;
            Ok(listener)
        };
        let failed = |errno: Errno| ListenError {
            path: path.to_owned(),
            source: errno.into(),
        };
        let bound = Self {
            listener: bind().map_err(failed)?,
            path: path.to_owned(),
        };
        rustix::net::listen(&bound.listener, BACKLOG).map_err(failed)?;
        Ok(bound)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Take the next connection, non-blocking.
    ///
    /// # Errors
    /// As accept4(2); EAGAIN when none waits.
    pub fn accept(&self) -> Result<UnixStream, Errno> {
        rustix::net::accept_with(&self.listener, FLAGS).map(UnixStream::from)
    }
}

impl AsFd for BoundListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for BoundListener {
    fn drop(&mut self) {
        // Gone already is as good.
        let _result = rustix::fs::unlink(&self.path);
    }
}

/// Guest-initiated connections to port P go to the socket `<hybrid path>_P`.
#[derive(Debug)]
pub struct PathDialer {
    hybrid_path: PathBuf,
}

impl PathDialer {
    /// For a device that host processes reach at `hybrid_path`.
    pub fn new(hybrid_path: &Path) -> Self {
        Self {
            hybrid_path: hybrid_path.to_owned(),
        }
    }
}

impl Dialer for PathDialer {
    fn dial(&mut self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.hybrid_path.clone().into_os_string();
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(PathBuf::from(path))?;
        let socket = socket()?;
        // A Unix socket connects at once or not at all.
        rustix::net::connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_socket_file_is_private_and_goes_with_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = BoundListener::bind(&path).unwrap();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let _host = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        assert_eq!(listener.accept().unwrap_err(), Errno::AGAIN);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_taken_path_is_an_error_and_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let _first = BoundListener::bind(&path).unwrap();
        let error = BoundListener::bind(&path).unwrap_err();
        assert_eq!(
            (error.path.as_path(), error.source.kind()),
            (path.as_path(), ErrorKind::AddrInUse)
        );
        assert!(path.exists());
        let long = directory.path().join("x".repeat(200));
        assert!(BoundListener::bind(&long).is_err());
    }

    #[test]
    fn a_port_is_a_suffix_of_the_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let mut dialer = PathDialer::new(&path);
        let refused = dialer.dial(1025).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotFound);
        let listener = BoundListener::bind(&directory.path().join("vsock_1025")).unwrap();
        let _connected = dialer.dial(1025).unwrap();
        listener.accept().unwrap();
    }
}
