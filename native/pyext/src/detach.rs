//! The one way in which a call that may wait leaves the interpreter to others.
//!
//! A binding that opens a file, starts a thread or waits for one goes through [`detached`], so that
//! Python's event loop, on another thread, goes on meanwhile.

use pyo3::{PyErr, PyResult, Python};

use crate::errors::NativeError;

/// Run `work` without the interpreter, and turn its error into an exception.
pub(crate) fn detached<T, E>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T, E> + Send,
) -> PyResult<T>
where
    T: Send,
    E: Into<NativeError> + Send,
{
    py.detach(work).map_err(|error| PyErr::from(error.into()))
}
