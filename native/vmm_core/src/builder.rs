//! The order in which the parts of a machine are made, for `start` and for `restore`.
//!
//! ```text
//!   memory ─▶ KVM machine, slots, interrupt controller ─▶ vCPUs ─▶ devices on their buses
//!     start:    kernel, initrd, tables ─▶ first registers ─▶ threads ─▶ run
//!     restore:  registers, controllers, devices as saved  ─▶ threads ─▶ paused
//! ```
//!
//! Runs on the caller's thread. Each step's product is owned by a value on the stack, so that a
//! step that fails releases what was made before it.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use kvm_ioctls::{Kvm, VcpuFd};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;
use virtio_core::ram::GuestRam;

use crate::arch::{self, ClockPolicy, HostFeatures, MmioNode, layout};
use crate::boot::{self, BootSource};
use crate::bus::Bus;
use crate::devices::acpi_power::{self, AcpiPower};
use crate::devices::acpi_slots::{self, AcpiSlots};
use crate::devices::console::Console;
use crate::devices::i8042::{self, I8042};
use crate::devices::serial::Serial;
use crate::event::VmEvents;
use crate::interrupt::{ACKNOWLEDGED_USED, Interrupt};
use crate::kvm::{self, MappedVm};
use crate::lock::lock;
use crate::machine::{FIRST_SUBSCRIBER, Machine, Mailbox, Resources, StateCell};
use crate::memory;
use crate::register_page::REGISTERS_START;
use crate::snapshot::{MachineState, Snapshot};
use crate::thread;
use crate::vcpu::{Vcpu, Wanted};
use crate::virtio::device::{VirtioDevice, Watcher};
use crate::virtio::mmio::{INTERRUPT_ACK, MmioTransport, QUEUE_NOTIFY};
use crate::vm::{Running, VmConfig, VmError, VmState};

/// Each has an interrupt line of its own: two edges on one line would be one interrupt.
pub(crate) const MAX_DEVICES: usize = 19;
const _: () = assert!(
    MAX_DEVICES == (*layout::MMIO_GSIS.end() - *layout::MMIO_GSIS.start() + 1) as usize,
    "one line each"
);

/// A device of a machine that is still to be made.
pub(crate) struct Part {
    pub(crate) device: Box<dyn VirtioDevice>,
    /// The guest does not know of it before it is shown.
    pub(crate) is_hidden: bool,
}

/// What a machine is made from.
pub(crate) struct Parts<'a> {
    pub(crate) config: &'a VmConfig,
    pub(crate) devices: Vec<Part>,
    pub(crate) console: &'a Arc<Console>,
    pub(crate) events: &'a Arc<dyn VmEvents>,
    pub(crate) state: &'a Arc<StateCell>,
}

/// For `map_err` on system calls.
fn system(operation: &'static str) -> impl Fn(Errno) -> VmError {
    move |errno| VmError::System {
        operation,
        source: errno.into(),
    }
}

/// Make the machine, as new or as `snapshot` says, with its threads.
pub(crate) fn launch(mut parts: Parts<'_>, snapshot: Option<&Path>) -> Result<Running, VmError> {
    let config = parts.config;
    let kvm = kvm::open()?;
    kvm::check_api_version(&kvm)?;
    let snapshot = snapshot.map(Snapshot::open).transpose()?;
    let ram = match &snapshot {
        None => memory::allocate(config.memory_mib, config.memory_backing)?,
        Some(snapshot) => {
            snapshot.check(config, parts.devices.len())?;
            memory::from_snapshot(config.memory_mib, &snapshot.memory()?)?
        }
    };
    let mut vm = MappedVm::new(kvm::create_vm(&kvm)?, Arc::clone(&ram))?;
    arch::prepare_vm(&vm.vm)?;
    let vcpus = (0..config.vcpu_count)
        .map(|index| {
            let vcpu = vm.vm.create_vcpu(u64::from(index));
            vcpu.map_err(kvm::KvmError::call("KVM_CREATE_VCPU"))
        })
        .collect::<Result<Vec<VcpuFd>, _>>()?;
    let saved = snapshot.as_ref().map(|snapshot| &snapshot.state);
    if let Some(saved) = saved {
        // Controllers before devices: an interrupt that a device raises would be lost.
        for (vcpu, state) in vcpus.iter().zip(&saved.vcpus) {
            arch::restore_vcpu(&vm.vm, vcpu, state)?;
        }
        arch::restore_vm(&vm.vm, &saved.vm, ClockPolicy::Continue)?;
    }
    let board = Board::new(&mut parts, &mut vm, &ram, saved)?;
    if let Some(saved) = saved {
        for (device, state) in board.devices.iter().zip(&saved.devices) {
            device.restore(state).map_err(VmError::Device)?;
        }
    } else {
        boot_guest(config, &kvm, &ram, &vcpus, &board.nodes)?;
    }
    start_threads(&parts, board, vcpus, kvm, vm, saved.is_some())
}

/// Devices, and where vCPUs find them.
struct Board {
    devices: Vec<Arc<MmioTransport>>,
    nodes: Vec<MmioNode>,
    serial: Arc<Serial>,
    slots: Arc<AcpiSlots>,
    ports: Bus,
    registers: Bus,
    epoll: Arc<OwnedFd>,
}

impl Board {
    fn new(
        parts: &mut Parts<'_>,
        vm: &mut MappedVm,
        ram: &Arc<GuestRam>,
        saved: Option<&MachineState>,
    ) -> Result<Self, VmError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map(Arc::new)
            .map_err(system("create an epoll set"))?;
        let mut port_bus = Bus::new();
        let serial = port_devices(&mut port_bus, parts.console, vm, saved)?;
        let slots = slots(&mut port_bus, vm, saved)?;
        let mut board = Self {
            devices: Vec::new(),
            nodes: Vec::new(),
            serial,
            slots,
            ports: port_bus,
            registers: Bus::new(),
            epoll,
        };
        let places = (FIRST_SUBSCRIBER..).zip(layout::MMIO_GSIS);
        for (part, (subscriber, gsi)) in std::mem::take(&mut parts.devices).into_iter().zip(places)
        {
            board.add(part, subscriber, gsi, parts.events, vm, ram)?;
        }
        Ok(board)
    }

    /// Give a device its registers, its interrupt line and its bells.
    fn add(
        &mut self,
        part: Part,
        subscriber: u32,
        gsi: u32,
        events: &Arc<dyn VmEvents>,
        vm: &mut MappedVm,
        ram: &Arc<GuestRam>,
    ) -> Result<(), VmError> {
        let pages = layout::MMIO_DEVICES_START + self.nodes.len() as u64 * layout::MMIO_DEVICE_SIZE;
        let address = pages + REGISTERS_START as u64;
        let size = layout::MMIO_DEVICE_SIZE - REGISTERS_START as u64;
        let interrupt = Interrupt::new(Some(vm.irq_line(gsi))).map(Arc::new);
        let interrupt = interrupt.map_err(system("create a device's registers"))?;
        vm.add_register_page(Arc::clone(interrupt.page()), pages)?;
        // Nobody reads it: that the write does not leave the kernel is all it is for.
        let acknowledged = eventfd(0, EventfdFlags::CLOEXEC);
        let acknowledged = acknowledged.map_err(system("create an acknowledgement's eventfd"))?;
        vm.register_ioeventfd(acknowledged, address + INTERRUPT_ACK, ACKNOWLEDGED_USED)?;
        let watcher = Watcher::new(Arc::clone(&self.epoll), subscriber);
        let Part { device, is_hidden } = part;
        let transport = MmioTransport::new(
            device,
            Arc::clone(ram),
            interrupt,
            watcher,
            Arc::clone(events),
        );
        let transport = Arc::new(transport.map_err(system("create a queue's eventfd"))?);
        for (index, kick) in (0u32..).zip(transport.kicks()) {
            vm.register_ioeventfd(&**kick, address + QUEUE_NOTIFY, index)?;
        }
        let device = Arc::clone(&transport);
        self.registers.insert(address, size, device)?;
        self.devices.push(transport);
        self.nodes.push(MmioNode {
            address,
            size,
            gsi,
            is_hidden,
        });
        Ok(())
    }
}

/// What every machine has behind ports.
fn port_devices(
    ports: &mut Bus,
    console: &Arc<Console>,
    vm: &MappedVm,
    saved: Option<&MachineState>,
) -> Result<Arc<Serial>, VmError> {
    let irqfd = irqfd(vm, layout::SERIAL_GSI)?;
    let console = Arc::clone(console);
    let serial = Arc::new(match saved {
        None => Serial::new(console, irqfd),
        Some(saved) => Serial::restore(&saved.serial, console, irqfd)?,
    });
    let power = Arc::new(AcpiPower::new(layout::SLEEP_TYPE_OFF, layout::RESET_VALUE));
    ports.insert(
        layout::SERIAL_PORT.into(),
        layout::SERIAL_PORT_COUNT.into(),
        Arc::clone(&serial) as Arc<_>,
    )?;
    ports.insert(
        layout::I8042_DATA_PORT.into(),
        i8042::PORT_COUNT,
        Arc::new(I8042),
    )?;
    ports.insert(
        layout::SLEEP_CONTROL_PORT.into(),
        acpi_power::PORT_COUNT,
        power,
    )?;
    Ok(serial)
}

/// The register of what the guest is to know of.
fn slots(
    ports: &mut Bus,
    vm: &MappedVm,
    saved: Option<&MachineState>,
) -> Result<Arc<AcpiSlots>, VmError> {
    let irqfd = irqfd(vm, layout::SLOTS_GSI)?;
    let shown = saved.map_or(0, |saved| saved.shown);
    let slots = Arc::new(AcpiSlots::new(shown, irqfd));
    let device = Arc::clone(&slots) as Arc<_>;
    ports.insert(layout::SLOTS_PORT.into(), acpi_slots::PORT_COUNT, device)?;
    Ok(slots)
}

/// An eventfd whose writes are edges of a line.
fn irqfd(vm: &MappedVm, gsi: u32) -> Result<Arc<OwnedFd>, VmError> {
    let irqfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map(Arc::new)
        .map_err(system("create a port device's eventfd"))?;
    vm.register_irqfd(&*irqfd, gsi)?;
    Ok(irqfd)
}

/// Load what is booted and give each vCPU its first registers.
fn boot_guest(
    config: &VmConfig,
    kvm: &Kvm,
    ram: &GuestRam,
    vcpus: &[VcpuFd],
    nodes: &[MmioNode],
) -> Result<(), VmError> {
    let kernel = boot::open_kernel(&config.kernel)?;
    let initrd = config
        .initrd
        .as_deref()
        .map(boot::open_initrd)
        .transpose()?;
    let source = BootSource {
        kernel: &kernel,
        initrd: initrd.as_ref(),
        command_line: &config.command_line,
    };
    let entry = boot::load(ram.mappings(), &source)?;
    arch::write_tables(ram.mappings(), config.vcpu_count, nodes)?;
    let features = HostFeatures::of(kvm)?;
    for (index, vcpu) in (0..).zip(vcpus) {
        let entry = (index == 0).then_some(&entry);
        arch::configure_vcpu(&features, vcpu, index, config.vcpu_count, entry)?;
    }
    Ok(())
}

/// Start the threads and let the vCPUs run, unless the machine is to be paused.
fn start_threads(
    parts: &Parts<'_>,
    board: Board,
    fds: Vec<VcpuFd>,
    kvm: Kvm,
    vm: MappedVm,
    is_paused: bool,
) -> Result<Running, VmError> {
    let mailbox = Mailbox::new().map_err(system("create the mailbox"))?;
    let port_bus = Arc::new(board.ports);
    let registers = Arc::new(board.registers);
    let mut vcpus = Vec::with_capacity(fds.len());
    let mut thread_ids = Vec::with_capacity(fds.len() + 1);
    for (index, fd) in (0u8..).zip(fds) {
        let target = Arc::clone(&mailbox);
        let on_end = Box::new(move |end| target.vcpu_ended(index, end));
        let vcpu = Vcpu::start(
            index,
            fd,
            Arc::clone(&port_bus),
            Arc::clone(&registers),
            on_end,
        );
        let vcpu = vcpu.map_err(|source| VmError::System {
            operation: "start a vCPU's thread",
            source,
        })?;
        thread_ids.push((format!("vcpu-{index}"), vcpu.thread_id()));
        vcpus.push(vcpu);
    }
    let state = if is_paused {
        VmState::Paused
    } else {
        VmState::Running
    };
    *lock(parts.state) = state;
    if !is_paused {
        for vcpu in &vcpus {
            vcpu.want(Wanted::Run);
        }
    }
    let devices = board.devices.clone();
    let slots = Arc::clone(&board.slots);
    let machine = Machine::new(
        Resources {
            vcpus,
            devices: board.devices,
            serial: board.serial,
            slots: board.slots,
            epoll: board.epoll,
            vm,
            kvm,
        },
        Arc::clone(&mailbox),
        Arc::clone(parts.state),
        Arc::clone(parts.events),
        Arc::clone(parts.console),
    );
    let machine = machine.map_err(system("watch the mailbox"))?;
    let (thread, id) =
        thread::spawn("vmm-io".to_owned(), thread::Kind::Io, machine).map_err(|source| {
            VmError::System {
                operation: "start the I/O thread",
                source,
            }
        })?;
    thread_ids.push(("vmm-io".to_owned(), id));
    Ok(Running {
        mailbox,
        thread,
        thread_ids,
        devices,
        slots,
    })
}
