//! Talking to the guest: the I/O thread, the agent's client and its copies. Each method hands
//! its arguments to the native crate and returns; results come through the event port.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use pyo3::prelude::*;
use vsock_io::address::Address;
use vsock_io::dial::Dial;
use vsock_io::event::Completion;
use vsock_io::reactor::Reactor;
use vsock_io::relay::Relay;
use vsock_io::status::Code;
use vsock_io::stdio::pump::{OutputStream, ProcessName};

use crate::convert::take_fd;
use crate::detach::detached;
use crate::errors::NativeError;
use crate::events::EventPort;

/// The I/O thread (``vsock-io``) and everything it serves.
#[pyclass(frozen, module = "kata_hybrid._native.vsock")]
pub(crate) struct IoThread {
    pub(crate) reactor: Reactor,
}

#[pymethods]
impl IoThread {
    #[new]
    fn new(port: &EventPort) -> Result<Self, NativeError> {
        Ok(Self {
            reactor: Reactor::start(port.sink())?,
        })
    }

    /// Connect to ``port`` of the guest, retrying with backoff until ``timeout_ms`` is over.
    #[pyo3(signature = (token, address, port, *, timeout_ms))]
    fn dial(
        &self,
        token: u64,
        address: &str,
        port: u32,
        timeout_ms: u64,
    ) -> Result<(), NativeError> {
        let address: Address = address.parse()?;
        let dial = Dial::new(token, address, port, Duration::from_millis(timeout_ms));
        let handle = self.reactor.handle();
        if let Err(error) = handle.add(dial) {
            let completion = Completion::failed(token, Code::CANCELLED, error.to_string());
            handle.sink().complete(completion);
        }
        Ok(())
    }

    /// Copy between two connected stream sockets both ways until both have ended, then close them.
    fn relay(&self, token: u64, first_fd: RawFd, second_fd: RawFd) -> Result<(), NativeError> {
        let first = take_fd(first_fd)?;
        let relay = Relay::new(token, first, take_fd(second_fd)?);
        let handle = self.reactor.handle();
        if let Err(error) = handle.add(relay) {
            let completion = Completion::failed(token, Code::CANCELLED, error.to_string());
            handle.sink().complete(completion);
        }
        Ok(())
    }

    /// Stop the thread: pending operations complete with CANCELLED, descriptors are closed.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.reactor.close())
    }
}

/// A ttRPC client on one connection; any number of requests in flight.
#[pyclass(frozen, module = "kata_hybrid._native.vsock")]
pub(crate) struct AgentClient {
    client: vsock_io::agent::AgentClient,
}

#[pymethods]
impl AgentClient {
    #[new]
    #[pyo3(signature = (io, fd, *, closed_token))]
    fn new(io: &IoThread, fd: RawFd, closed_token: u64) -> Result<Self, NativeError> {
        let fd = take_fd(fd)?;
        let handle = io.reactor.handle();
        Ok(Self {
            client: vsock_io::agent::AgentClient::new(&handle, fd, closed_token),
        })
    }

    /// Send a unary request. ``timeout_ms`` 0 means no deadline.
    #[pyo3(signature = (token, service, method, payload, *, timeout_ms))]
    fn call(
        &self,
        py: Python<'_>,
        token: u64,
        service: &str,
        method: &str,
        payload: &[u8],
        timeout_ms: u64,
    ) {
        let timeout = Duration::from_millis(timeout_ms);
        py.detach(|| self.client.call(token, service, method, payload, timeout));
    }

    /// Copy a stream of a guest process to ``fd`` until its end, then close ``fd``.
    fn copy_output(
        &self,
        token: u64,
        container_id: String,
        exec_id: String,
        stream: &str,
        fd: RawFd,
    ) -> Result<StdioCopy, NativeError> {
        let stream = match stream {
            "stdout" => OutputStream::Stdout,
            "stderr" => OutputStream::Stderr,
            _ => {
                return Err(NativeError::Word {
                    argument: "stream",
                    allowed: "stdout, stderr",
                    given: stream.to_owned(),
                });
            }
        };
        let fd = take_fd(fd)?;
        let process = ProcessName {
            container_id,
            exec_id,
        };
        Ok(StdioCopy {
            copy: self.client.copy_output(token, process, stream, fd),
        })
    }

    /// Copy ``fd`` to the stdin of a guest process until end of file, then close both.
    fn copy_input(
        &self,
        token: u64,
        container_id: String,
        exec_id: String,
        fd: RawFd,
    ) -> Result<StdioCopy, NativeError> {
        let fd = take_fd(fd)?;
        let process = ProcessName {
            container_id,
            exec_id,
        };
        Ok(StdioCopy {
            copy: self.client.copy_input(token, process, fd),
        })
    }

    /// Close the connection; pending calls complete with CANCELLED.
    fn close(&self) {
        self.client.close();
    }
}

/// A running copy.
#[pyclass(frozen, module = "kata_hybrid._native.vsock")]
pub(crate) struct StdioCopy {
    copy: vsock_io::agent::StdioCopy,
}

#[pymethods]
impl StdioCopy {
    /// End the copy now: what is buffered is written if that does not block. Idempotent.
    fn stop(&self) {
        self.copy.stop();
    }
}

/// A virtio-vsock device for another process's machine (vhost-user back end).
#[pyclass(frozen, module = "kata_hybrid._native.vsock")]
pub(crate) struct VhostUserVsock {
    device: vsock_io::vhost_user::VhostUserVsock,
}

#[pymethods]
impl VhostUserVsock {
    #[new]
    #[pyo3(signature = (io, *, socket_path, hybrid_path, guest_cid, closed_token))]
    #[expect(clippy::needless_pass_by_value, reason = "paths arrive as PathBuf")]
    fn new(
        py: Python<'_>,
        io: &IoThread,
        socket_path: PathBuf,
        hybrid_path: PathBuf,
        guest_cid: u32,
        closed_token: u64,
    ) -> PyResult<Self> {
        let handle = io.reactor.handle();
        let device = detached(py, || {
            vsock_io::vhost_user::VhostUserVsock::new(
                &handle,
                &socket_path,
                &hybrid_path,
                guest_cid.into(),
                closed_token,
            )
        })?;
        Ok(Self { device })
    }

    /// Stop serving and unlink both paths. Idempotent.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.device.close());
    }
}
