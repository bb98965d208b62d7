//! The device as its driver and host processes meet it.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use virtio_core::ring::RingError;
use virtio_core::vsock::mock::{MAX_MOCK_PAYLOAD, MockPacket};
use virtio_core::vsock::packet::{
    Operation, PacketHeader, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};

use super::*;
use crate::virtio::vsock::mock_machine::{CID, MockMachine};

fn read_now(mut socket: &UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut part = vec![0; 65_536];
    while let Ok(count @ 1..) = socket.read(&mut part) {
        all.extend_from_slice(&part[..count]);
    }
    all
}

fn is_at_end(mut socket: &UnixStream) -> bool {
    matches!(socket.read(&mut [0]), Ok(0))
}

fn is_waiting(mut socket: &UnixStream) -> bool {
    let result = socket.read(&mut [0]);
    result.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

impl MockMachine {
    fn packet(&mut self) -> MockPacket {
        self.settle();
        let mut packets = self.guest.take();
        assert_eq!(packets.len(), 1, "{packets:?}");
        let free = self.guest.rx_free();
        self.guest.post(free);
        packets.remove(0).unwrap()
    }

    fn no_packet(&mut self) {
        self.settle();
        assert_eq!(self.guest.take(), []);
    }

    /// A host's connection to guest port 1024, accepted.
    fn connected(&mut self) -> (UnixStream, PacketHeader) {
        let host = self.dial();
        let (request, _) = self.packet();
        assert_eq!((request.op, request.dst_port), (1, 1024));
        self.guest.answer(&request, Operation::Response, b"");
        self.settle();
        assert_eq!(
            read_now(&host),
            format!("OK {}\n", request.src_port).as_bytes()
        );
        (host, request)
    }

    fn shut_down(&mut self, request: &PacketHeader, flags: u32) {
        let header = self
            .guest
            .header(request.dst_port, request.src_port, Operation::Shutdown);
        self.guest.send(&PacketHeader { flags, ..header }, b"");
        self.settle();
    }

    fn metric(&self, name: &str) -> u64 {
        let metrics = self.device.metrics();
        metrics.iter().find(|metric| metric.0 == name).unwrap().1
    }
}

#[test]
fn the_configuration_is_the_guests_cid_and_nothing_else() {
    let machine = MockMachine::new(true);
    let mut whole = [0; 8];
    machine.device.read_config(0, &mut whole);
    assert_eq!(whole, CID.to_le_bytes());
    let mut beyond = [0; 4];
    machine.device.read_config(7, &mut beyond);
    machine.device.read_config(8, &mut beyond);
    machine.device.read_config(usize::MAX, &mut beyond);
    assert_eq!(beyond, [0; 4]);
}

#[test]
fn reserved_cids_and_taken_paths_are_refused_and_the_path_is_freed() {
    let machine = MockMachine::new(true);
    let path = machine.path();
    for guest_cid in [0, 2, 0xffff_ffff, u64::MAX] {
        let config = VsockConfig {
            guest_cid,
            path: path.with_file_name("other"),
        };
        let error = Vsock::new(config).unwrap_err();
        assert!(matches!(error, VsockError::GuestCid(cid) if cid == guest_cid));
    }
    let config = VsockConfig {
        guest_cid: 3,
        path: path.clone(),
    };
    let error = Vsock::new(config.clone()).unwrap_err();
    assert!(matches!(error, VsockError::Hybrid(HybridError::Listen(_))));
    let MockMachine { device, .. } = machine;
    drop(device);
    assert!(!path.exists());
}

#[test]
fn a_host_that_dials_before_the_guest_is_up_is_served_when_it_is() {
    let mut machine = MockMachine::new(true);
    let host = machine.dial();
    assert_eq!(machine.turn(0), 0);
    machine.boot();
    let (request, _) = machine.packet();
    machine.guest.answer(&request, Operation::Response, b"");
    machine.settle();
    assert!(read_now(&host).starts_with(b"OK "));
}

#[test]
fn host_and_guest_talk_and_close_one_way_each() {
    for has_event_idx in [false, true] {
        let mut machine = MockMachine::active(has_event_idx);
        let (mut host, request) = machine.connected();
        machine
            .guest
            .answer(&request, Operation::ReadWrite, b"question");
        machine.settle();
        assert_eq!(read_now(&host), b"question");
        machine.shut_down(&request, SHUTDOWN_SEND);
        assert!(is_at_end(&host));

        host.write_all(b"answer").unwrap();
        assert_eq!(machine.packet().1, b"answer");
        host.shutdown(std::net::Shutdown::Write).unwrap();
        let (shutdown, _) = machine.packet();
        assert_eq!(
            (shutdown.op, shutdown.flags & SHUTDOWN_SEND),
            (4, SHUTDOWN_SEND)
        );
        machine.shut_down(&request, SHUTDOWN_BOTH);
        assert_eq!(machine.packet().0.op, Operation::Reset as u16);
        assert_eq!(machine.metric("connections_now"), 0);
    }
}

#[test]
fn the_guest_calls_a_host_and_is_refused_where_nobody_listens() {
    let mut machine = MockMachine::active(true);
    let path = machine.path().with_file_name("vsock_1025");
    let listener = UnixListener::bind(&path).unwrap();
    let refused = machine.guest.header(50, 1026, Operation::Request);
    machine.guest.send(&refused, b"");
    assert_eq!(machine.packet().0.op, Operation::Reset as u16);

    let request = machine.guest.header(50, 1025, Operation::Request);
    machine.guest.send(&request, b"");
    let (response, _) = machine.packet();
    assert_eq!(response.op, Operation::Response as u16);
    let (host, _) = listener.accept().unwrap();
    host.set_nonblocking(true).unwrap();
    machine
        .guest
        .answer(&response, Operation::ReadWrite, b"from the guest");
    machine.settle();
    assert_eq!(read_now(&host), b"from the guest");
    (&host).write_all(b"from the host").unwrap();
    assert_eq!(machine.packet().1, b"from the host");

    machine.shut_down(&response, SHUTDOWN_RECEIVE);
    let broken = (&host).write(b"x").unwrap_err();
    assert_eq!(broken.kind(), ErrorKind::BrokenPipe);
    drop(host);
    let (shutdown, _) = machine.packet();
    assert_eq!((shutdown.op, shutdown.flags), (4, SHUTDOWN_BOTH));
    machine.guest.answer(&response, Operation::Reset, b"");
    machine.no_packet();
    assert_eq!(machine.metric("connections_now"), 0);
}

#[test]
fn a_host_that_does_not_read_stops_the_guest_by_its_credit() {
    let mut machine = MockMachine::active(true);
    let (host, request) = machine.connected();
    let payload = vec![7; MAX_MOCK_PAYLOAD];
    let (mut sent, mut forwarded) = (0, 0);
    let buffer = 256 * 1024;
    while sent + payload.len() - forwarded <= buffer {
        machine
            .guest
            .answer(&request, Operation::ReadWrite, &payload);
        sent += payload.len();
        machine.settle();
        if let Some((header, _)) = machine.guest.take().pop_back() {
            forwarded = header.fwd_cnt as usize;
        }
        assert!(sent < 64 << 20, "nothing stops the guest");
    }
    assert_eq!(machine.metric("bytes_from_guest"), sent as u64);
    let mut received = read_now(&host).len();
    machine.settle();
    let updates = machine.guest.take();
    assert!(updates.iter().any(|(header, _)| header.op == 6));
    // What was kept is more than the socket takes at once.
    loop {
        let more = read_now(&host).len();
        if more == 0 {
            break;
        }
        received += more;
        machine.settle();
    }
    assert_eq!(received, sent);
}

#[test]
fn a_guest_without_room_is_sent_no_more_than_it_has() {
    let mut machine = MockMachine::active(true);
    let mut host = machine.dial();
    let (request, _) = machine.packet();
    let header = PacketHeader {
        buf_alloc: 1000,
        ..machine
            .guest
            .header(1024, request.src_port, Operation::Response)
    };
    machine.guest.send(&header, b"");
    host.write_all(&[1; 3000]).unwrap();
    machine.settle();
    let packets = machine.guest.take();
    let got: usize = packets.iter().map(|(_, payload)| payload.len()).sum();
    assert_eq!(got, 1000);
    assert_eq!(
        packets.back().unwrap().0.op,
        Operation::CreditRequest as u16
    );
}

#[test]
fn a_guest_that_does_not_answer_is_given_up_by_the_timer() {
    let mut machine = MockMachine::active(true);
    let host = machine.dial();
    machine.packet();
    assert!(is_waiting(&host));
    while is_waiting(&host) {
        let count = machine.turn(10_000);
        assert!(count > 0, "the timer did not fire");
    }
    assert!(is_at_end(&host));
    assert_eq!(machine.packet().0.op, Operation::Reset as u16);
    assert_eq!(machine.metric("connection_timeouts"), 1);
}

#[test]
fn a_turn_interrupts_once_at_most_and_only_if_wanted() {
    let mut machine = MockMachine::active(false);
    let (mut host, request) = machine.connected();
    let line = Arc::clone(&machine.transport.interrupt);
    line.acknowledge(1);
    host.write_all(b"one").unwrap();
    machine.settle();
    let before = line.raised();
    // One turn takes a packet and gives another.
    machine.device.pause().unwrap();
    machine.shut_down(&request, SHUTDOWN_BOTH);
    machine.device.resume();
    machine.turn(0);
    assert_eq!(line.raised(), before + 1);
    assert_eq!(line.status(), 1);
    machine.settle();

    machine.guest.tx.set_no_interrupt(true);
    let before = line.raised();
    machine.guest.answer(&request, Operation::Reset, b"");
    machine.settle();
    assert_eq!(line.raised(), before);
}

#[test]
fn a_device_without_its_queues_stays_inactive() {
    let mut machine = MockMachine::new(true);
    let drivers = [Some(&machine.guest.rx), None, None];
    let activation = machine.transport.activation(0, &drivers);
    let error = machine.device.activate(activation).unwrap_err();
    assert!(matches!(error, DeviceError::QueueMissing { index: 1 }));
    let _host = machine.dial();
    for token in [0, 1, 2, HOST_TOKEN, TIMER_TOKEN, u32::MAX] {
        machine.device.handle(token, epoll::EventFlags::IN).unwrap();
    }
    assert_eq!(machine.device.ring_states(), [None; 3]);
    machine.boot();
    assert_eq!(machine.packet().0.op, Operation::Request as u16);
}

#[test]
fn events_are_not_missed_by_a_driver_that_wants_none() {
    let mut machine = MockMachine::new(true);
    machine.activate(false).unwrap();
    machine.guest.post(16);
    machine.connected();
    machine.device.pause().unwrap();
    let mut machine = machine.restored();
    machine.device.resume();
    machine.settle();
    machine.connected();
}

#[test]
fn a_broken_ring_is_an_error_that_names_it() {
    let mut machine = MockMachine::active(true);
    machine.guest.tx.set_available_index(1000);
    let error = machine.try_settle().unwrap_err();
    let expected = RingError::AvailableIndex {
        from: 0,
        to: 1000,
        size: 128,
        in_flight: 0,
    };
    assert!(
        matches!(error, DeviceError::Ring { index: 1, source } if source == expected),
        "{error:?}"
    );
}

#[test]
fn a_reset_ends_all_connections_and_the_next_driver_starts_anew() {
    let mut machine = MockMachine::active(true);
    let (host, _) = machine.connected();
    let dialling = machine.dial();
    machine.settle();
    machine.device.reset();
    machine.device.reset();
    assert!(is_at_end(&host) && is_at_end(&dialling));
    assert_eq!(machine.device.ring_states(), [None; 3]);
    // Nothing is watched: who dials now waits for the next driver.
    let early = machine.dial();
    assert_eq!(machine.turn(0), 0);
    machine.boot();
    let (request, _) = machine.packet();
    machine.guest.answer(&request, Operation::Response, b"");
    machine.settle();
    assert!(read_now(&early).starts_with(b"OK "));
    machine.connected();
}

#[test]
fn a_storm_of_resets_leaves_nothing_behind() {
    let mut machine = MockMachine::active(true);
    for round in 0..50 {
        let hosts: Vec<UnixStream> = (0..=round % 5).map(|_| machine.dial()).collect();
        let is_accepted = round % 3 > 0;
        if is_accepted {
            machine.settle();
            for (request, _) in machine.guest.take() {
                machine.guest.answer(&request, Operation::Response, b"");
                machine
                    .guest
                    .answer(&request, Operation::ReadWrite, b"on its way");
            }
        }
        if round % 3 == 2 {
            machine.settle();
        }
        for mut host in &hosts {
            host.write_all(b"on its way").unwrap();
        }
        machine.device.reset();
        assert_eq!(machine.metric("connections_now"), 0);
        for host in &hosts {
            let _answer = read_now(host);
            assert_eq!(is_waiting(host), !is_accepted);
        }
        drop(hosts);
        machine.boot();
        machine.settle();
    }
    machine.device.reset();
    machine.boot();
    machine.connected();
    assert_eq!(machine.metric("connections_now"), 1);
}

#[test]
fn while_paused_nothing_moves_and_afterwards_all_of_it_does() {
    let mut machine = MockMachine::active(true);
    let (mut host, request) = machine.connected();
    machine.device.pause().unwrap();
    machine.device.pause().unwrap();
    let states = machine.device.ring_states();
    host.write_all(b"to the guest").unwrap();
    machine
        .guest
        .answer(&request, Operation::ReadWrite, b"to the host");
    let dialling = machine.dial();
    machine.settle();
    assert_eq!(machine.device.ring_states(), states);
    assert!(is_waiting(&host) && is_waiting(&dialling));

    machine.device.resume();
    machine.device.resume();
    machine.settle();
    assert_eq!(read_now(&host), b"to the host");
    let packets = machine.guest.take();
    let mut operations: Vec<u16> = packets.iter().map(|packet| packet.0.op).collect();
    operations.sort_unstable();
    assert_eq!(operations, [1, 5]);
}

#[test]
fn a_pause_does_not_count_against_the_guest() {
    let mut machine = MockMachine::active(true);
    let host = machine.dial();
    let (request, _) = machine.packet();
    let deadline = machine.device.host.next_deadline().unwrap();
    machine.device.pause().unwrap();
    let active = machine.device.active.as_mut().unwrap();
    active.paused_at = active
        .paused_at
        .unwrap()
        .checked_sub(Duration::from_secs(60));
    machine.device.resume();
    machine.settle();
    assert!(machine.device.host.next_deadline().unwrap() >= deadline + Duration::from_secs(60));
    machine.guest.answer(&request, Operation::Response, b"");
    machine.settle();
    assert!(read_now(&host).starts_with(b"OK "));
}

#[test]
fn a_restored_guest_is_told_and_hosts_wait_until_it_heard() {
    for has_event_idx in [false, true] {
        let mut machine = MockMachine::active(has_event_idx);
        let (_old_host, old) = machine.connected();
        machine.device.pause().unwrap();
        let mut machine = machine.restored();
        // Nothing before the machine goes on.
        let host = machine.dial();
        machine.settle();
        assert_eq!(machine.take_event(), None);

        machine.device.resume();
        machine.settle();
        assert!(machine.transport.interrupt.raised() > 0);
        // The guest still talks on a stream that is gone.
        machine
            .guest
            .answer(&old, Operation::ReadWrite, b"anybody?");
        assert_eq!(machine.packet().0.op, Operation::Reset as u16);
        machine.no_packet();
        assert!(is_waiting(&host));

        assert_eq!(machine.take_event(), Some(vec![0; 4]));
        let (request, _) = machine.packet();
        assert_eq!(request.op, Operation::Request as u16);
        machine.guest.answer(&request, Operation::Response, b"");
        machine.settle();
        assert!(read_now(&host).starts_with(b"OK "));
        assert_eq!(machine.metric("transport_resets"), 1);
        assert_eq!(machine.event_state().unwrap().next_available, 1);
        assert_eq!(machine.take_event(), None);
    }
}

#[test]
fn a_restored_guest_gets_no_stream_by_the_ports_of_one_it_still_has() {
    let mut machine = MockMachine::active(true);
    let (_first, one) = machine.connected();
    let (_second, other) = machine.connected();
    for _ in 0..2 {
        machine.device.pause().unwrap();
        machine = machine.restored();
        machine.device.resume();
        machine.settle();
        machine.take_event();
        let (_host, request) = machine.connected();
        assert!(![one.src_port, other.src_port].contains(&request.src_port));
    }
}

#[test]
fn a_restored_guest_that_ignores_the_event_is_served_all_the_same() {
    let mut machine = MockMachine::active(true);
    machine.device.pause().unwrap();
    let mut machine = machine.restored();
    machine.device.resume();
    let _host = machine.dial();
    machine.no_packet();
    while machine.metric("transport_reset_timeouts") == 0 {
        let count = machine.turn(10_000);
        assert!(count > 0, "the timer did not fire");
    }
    assert_eq!(machine.packet().0.op, Operation::Request as u16);
}

#[test]
fn a_second_snapshot_while_the_guest_is_being_told_loses_no_event_buffer() {
    let mut machine = MockMachine::active(true);
    machine.device.pause().unwrap();
    let mut machine = machine.restored();
    machine.device.resume();
    machine.settle();
    machine.device.pause().unwrap();
    assert_eq!(machine.event_state().unwrap().next_available, 1);
    let mut machine = machine.restored();
    machine.device.resume();
    machine.settle();
    assert_eq!(machine.events.take_used().len(), 2);
}

#[test]
fn a_device_that_was_not_active_has_nobody_to_tell() {
    let machine = MockMachine::new(true);
    let state = machine.device.save().unwrap();
    let mut machine = MockMachine::new(true);
    machine.device.restore(&state).unwrap();
    machine.boot();
    machine.connected();
    assert_eq!(machine.take_event(), None);
}

#[test]
fn a_state_of_another_guest_is_refused() {
    let mut machine = MockMachine::new(true);
    let state = VsockState {
        guest_cid: CID + 1,
        was_active: true,
        next_host_port: 0,
    };
    let other = saved::encode(DeviceKind::Vsock, &state).unwrap();
    let error = machine.device.restore(&other).unwrap_err();
    assert_eq!(
        error.to_string(),
        "restore vsock: the guest's cid is 4, not 3"
    );
    assert!(machine.device.restore(b"").is_err());
}
