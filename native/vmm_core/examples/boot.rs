//! The bare runner: boots a kernel, prints its console, and says how it ended.
//!
//!     boot KERNEL [--initrd FILE] [--command-line TEXT] [--vcpus N] [--memory-mib N]
//!
//! No Python, no containers: what a machine costs by itself is measured with this.

#![allow(clippy::print_stdout, reason = "printing is what it is for")]

use std::error::Error;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmm_core::event::{VmEvents, VmExit};
use vmm_core::memory::MemoryBacking;
use vmm_core::vm::{Vm, VmConfig};

struct Events {
    exits: Mutex<Sender<VmExit>>,
}

impl VmEvents for Events {
    fn exited(&self, exit: &VmExit) {
        if let Ok(exits) = self.exits.lock() {
            // The receiver waits until there is one.
            let _received = exits.send(exit.clone());
        }
    }

    fn warning(&self, text: &str) {
        println!("warning: {text}");
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let kernel = arguments.next().ok_or("usage: boot KERNEL [options]")?;
    let mut config = VmConfig {
        kernel: PathBuf::from(kernel),
        initrd: None,
        command_line: "console=ttyS0 reboot=k panic=-1".to_owned(),
        vcpu_count: 1,
        memory_mib: 256,
        memory_backing: MemoryBacking::default(),
    };
    while let Some(option) = arguments.next() {
        let value = arguments.next().ok_or("an option needs a value")?;
        match option.as_str() {
            "--initrd" => config.initrd = Some(PathBuf::from(value)),
            "--command-line" => config.command_line = value,
            "--vcpus" => config.vcpu_count = value.parse()?,
            "--memory-mib" => config.memory_mib = value.parse()?,
            "--shared" => config.memory_backing = MemoryBacking::Shared,
            other => return Err(format!("no option {other}").into()),
        }
    }
    let (sender, exits) = channel();
    let events = Arc::new(Events {
        exits: Mutex::new(sender),
    });
    let console = std::os::fd::AsFd::as_fd(&std::io::stdout()).try_clone_to_owned()?;
    let began = Instant::now();
    let vm = Vm::new(config, Some(console), events)?;
    vm.start()?;
    println!("started in {:?}", began.elapsed());
    let exit = exits.recv()?;
    println!("{exit} after {:?}", began.elapsed());
    Ok(())
}
