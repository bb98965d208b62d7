//! The event port: a view of the native event queue. Python polls the eventfd and drains on its
//! own thread; the I/O thread pushes without ever attaching.

use std::os::fd::{AsFd, AsRawFd, IntoRawFd, RawFd};
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vsock_io::event::{Completion, EventQueue, EventSink, Value};

use crate::errors::NativeError;

/// One completion, or a line for a log. Frozen.
#[pyclass(frozen, module = "kata_hybrid._native.events")]
pub(crate) struct Event {
    /// The number Python gave the operation.
    #[pyo3(get)]
    token: u64,
    /// google.rpc status code; 0 is success.
    #[pyo3(get)]
    code: i32,
    /// Error text, empty on success; the line of a log.
    #[pyo3(get)]
    message: String,
    value: Option<Py<PyAny>>,
}

#[pymethods]
impl Event {
    /// The result: reply payload, a file descriptor the receiver now owns, a byte count.
    #[getter]
    fn value(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.value.as_ref().map(|value| value.clone_ref(py))
    }

    fn __repr__(&self) -> String {
        format!(
            "<Event token={} code={} message={:?}>",
            self.token, self.code, self.message
        )
    }
}

impl Event {
    fn new(py: Python<'_>, completion: Completion) -> PyResult<Self> {
        let Completion {
            token,
            code,
            value,
            message,
        } = completion;
        let value = match value {
            Value::None => None,
            Value::Bytes(bytes) => Some(PyBytes::new(py, &bytes).into_any().unbind()),
            Value::Fd(fd) => Some(fd.into_raw_fd().into_pyobject(py)?.into_any().unbind()),
            Value::Count(count) => Some(count.into_pyobject(py)?.into_any().unbind()),
        };
        Ok(Self {
            token,
            code: code.0,
            message,
            value,
        })
    }
}

/// A queue of events and an eventfd that is readable while the queue is not empty.
#[pyclass(frozen, module = "kata_hybrid._native.events")]
pub(crate) struct EventPort {
    queue: Arc<EventQueue>,
}

#[pymethods]
impl EventPort {
    #[new]
    fn new() -> Result<Self, NativeError> {
        let queue =
            EventQueue::new(EventQueue::DEFAULT_BYTE_BUDGET).map_err(NativeError::EventPort)?;
        Ok(Self {
            queue: Arc::new(queue),
        })
    }

    /// The eventfd (non-blocking). Owned by the port: do not close it.
    fn fileno(&self) -> RawFd {
        self.queue.as_fd().as_raw_fd()
    }

    /// Take every queued event, in order, and reset the eventfd.
    fn drain(&self, py: Python<'_>) -> PyResult<Vec<Event>> {
        self.queue
            .drain()
            .into_iter()
            .map(|completion| Event::new(py, completion))
            .collect()
    }
}

impl EventPort {
    /// The sink that native threads report to.
    pub(crate) fn sink(&self) -> Arc<dyn EventSink> {
        self.queue()
    }

    /// The queue itself, for those who have lines for a log, too.
    pub(crate) fn queue(&self) -> Arc<EventQueue> {
        Arc::clone(&self.queue)
    }
}
