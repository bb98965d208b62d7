//! What fuzz targets of devices share: reading the input as a program, and a driver that runs it.

mod hostile_driver;
mod input;

pub use hostile_driver::HostileDriver;
pub use input::Input;
