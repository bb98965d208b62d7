//! The state machine against hand-written cases and random packets.

use proptest::prelude::*;

use super::*;
use crate::vsock::credit::BUFFER_SIZE;

fn header(operation: Operation, len: u32, flags: u32) -> PacketHeader {
    PacketHeader {
        op: operation as u16,
        len,
        flags,
        buf_alloc: 65_536,
        ..Default::default()
    }
}

fn established() -> Connection {
    let mut connection = Connection::requested();
    let action = connection.on_packet(Operation::Response, &header(Operation::Response, 0, 0));
    assert_eq!(action, Ok(Action::Accepted));
    drain(&mut connection);
    connection
}

fn drain(connection: &mut Connection) -> Vec<ControlPacket> {
    let mut packets = Vec::new();
    while let Some(packet) = connection.next_control_packet() {
        connection.on_control_sent(packet);
        packets.push(packet);
    }
    packets
}

fn on(
    connection: &mut Connection,
    operation: Operation,
    len: u32,
    flags: u32,
) -> Result<Action, ConnectionError> {
    connection.on_packet(operation, &header(operation, len, flags))
}

#[test]
fn a_dialled_connection_sends_request_and_waits() {
    let mut connection = Connection::requested();
    let expected = [ControlPacket {
        operation: Operation::Request,
        flags: 0,
    }];
    assert_eq!(drain(&mut connection), expected);
    assert_eq!(connection.phase(), Phase::Requested);
    assert_eq!(connection.data_allowance(), 0);
}

#[test]
fn an_accepted_connection_sends_response_and_knows_the_guests_room() {
    let mut connection = Connection::accepted(&header(Operation::Request, 0, 0));
    assert_eq!(drain(&mut connection)[0].operation, Operation::Response);
    assert_eq!(connection.data_allowance(), 65_536);
}

#[test]
fn data_before_the_answer_breaks_the_connection() {
    let mut connection = Connection::requested();
    let result = on(&mut connection, Operation::ReadWrite, 1, 0);
    assert!(matches!(
        result,
        Err(ConnectionError::UnexpectedOperation { .. })
    ));
}

#[test]
fn a_second_request_breaks_the_connection() {
    assert!(on(&mut established(), Operation::Request, 0, 0).is_err());
    assert!(on(&mut established(), Operation::Response, 0, 0).is_err());
}

#[test]
fn more_data_than_credit_breaks_the_connection() {
    let mut connection = established();
    assert_eq!(
        on(&mut connection, Operation::ReadWrite, BUFFER_SIZE, 0),
        Ok(Action::Deliver(BUFFER_SIZE))
    );
    assert_eq!(
        on(&mut connection, Operation::ReadWrite, 1, 0),
        Err(ConnectionError::CreditExceeded { len: 1 })
    );
}

#[test]
fn delivered_data_gives_credit_back() {
    let mut connection = established();
    for _ in 0..10 {
        assert!(on(&mut connection, Operation::ReadWrite, BUFFER_SIZE, 0).is_ok());
        connection.on_forwarded(BUFFER_SIZE);
        assert_eq!(drain(&mut connection)[0].operation, Operation::CreditUpdate);
    }
}

#[test]
fn half_close_by_the_guest_leaves_the_other_direction_open() {
    let mut connection = established();
    assert_eq!(
        on(&mut connection, Operation::Shutdown, 0, SHUTDOWN_SEND),
        Ok(Action::HalfClosed)
    );
    assert!(connection.data_allowance() > 0);
    assert_eq!(
        on(&mut connection, Operation::ReadWrite, 1, 0),
        Err(ConnectionError::DataAfterShutdown { len: 1 })
    );
    assert_eq!(
        on(&mut connection, Operation::Shutdown, 0, SHUTDOWN_RECEIVE),
        Ok(Action::Closed)
    );
}

#[test]
fn half_close_by_the_host_leaves_the_other_direction_open() {
    let mut connection = established();
    connection.on_host_closed(false);
    let expected = [ControlPacket {
        operation: Operation::Shutdown,
        flags: SHUTDOWN_SEND,
    }];
    assert_eq!(drain(&mut connection), expected);
    assert_eq!(connection.phase(), Phase::Established);
    assert_eq!(
        on(&mut connection, Operation::ReadWrite, 5, 0),
        Ok(Action::Deliver(5))
    );
    assert_eq!(connection.data_allowance(), 0);
}

#[test]
fn a_host_that_is_gone_closes_both_ways_once() {
    let mut connection = established();
    connection.on_host_closed(true);
    connection.on_host_closed(true);
    connection.on_host_deaf();
    let expected = [ControlPacket {
        operation: Operation::Shutdown,
        flags: SHUTDOWN_BOTH,
    }];
    assert_eq!(drain(&mut connection), expected);
    assert!(connection.take_closing_start());
    assert!(!connection.take_closing_start());
    assert_eq!(connection.phase(), Phase::Closing);
}

#[test]
fn data_that_crosses_our_shutdown_is_dropped_and_counted() {
    let mut connection = established();
    connection.on_host_deaf();
    for _ in 0..4 {
        assert_eq!(
            on(&mut connection, Operation::ReadWrite, BUFFER_SIZE, 0),
            Ok(Action::None)
        );
    }
    assert_eq!(connection.credit().forwarded(), 4 * BUFFER_SIZE);
}

#[test]
fn a_credit_request_is_answered() {
    let mut connection = established();
    assert_eq!(
        on(&mut connection, Operation::CreditRequest, 0, 0),
        Ok(Action::None)
    );
    assert_eq!(drain(&mut connection)[0].operation, Operation::CreditUpdate);
}

#[test]
fn without_room_the_guest_is_asked_once() {
    let mut connection = established();
    connection.on_data_sent(connection.data_allowance());
    assert_eq!(connection.data_allowance(), 0);
    connection.on_blocked_by_credit();
    connection.on_blocked_by_credit();
    let expected = [ControlPacket {
        operation: Operation::CreditRequest,
        flags: 0,
    }];
    assert_eq!(drain(&mut connection), expected);
    connection.on_blocked_by_credit();
    assert_eq!(drain(&mut connection), []);
}

#[derive(Clone, Debug)]
enum Step {
    Packet(u16, PacketHeader),
    Forward(u32),
    Send(u32),
    HostClosed(bool),
    HostDeaf,
    Blocked,
    TakeControl,
}

fn any_step() -> impl Strategy<Value = Step> {
    let packet = (
        1u16..=7,
        0u32..=65_536,
        any::<u32>(),
        any::<u32>(),
        any::<u32>(),
    );
    prop_oneof![
        6 => packet.prop_map(|(op, len, flags, buf_alloc, fwd_cnt)| {
            let len = if op == 5 { len } else { 0 };
            Step::Packet(op, PacketHeader { len, op, flags, buf_alloc, fwd_cnt, ..Default::default() })
        }),
        2 => (0u32..=65_536).prop_map(Step::Forward),
        2 => any::<u32>().prop_map(Step::Send),
        1 => any::<bool>().prop_map(Step::HostClosed),
        1 => Just(Step::HostDeaf),
        1 => Just(Step::Blocked),
        2 => Just(Step::TakeControl),
    ]
}

proptest! {
    /// Whatever the guest sends: the bytes buffered stay within the buffer, data goes out only
    /// when established and within the guest's room, and control packets come to an end.
    #[test]
    fn no_guest_breaks_the_bounds(
        is_dialled in any::<bool>(),
        steps in proptest::collection::vec(any_step(), 0..200),
    ) {
        let mut connection = if is_dialled {
            Connection::requested()
        } else {
            Connection::accepted(&header(Operation::Request, 0, 0))
        };
        for step in steps {
            match step {
                Step::Packet(op, header) => {
                    let before = connection.phase();
                    let operation = Operation::try_from(op).unwrap();
                    let result = connection.on_packet(operation, &header);
                    if before == Phase::Requested && connection.phase() != before {
                        prop_assert_eq!(operation, Operation::Response);
                    }
                    match result {
                        Ok(Action::Closed | Action::Reset) | Err(_) => break,
                        Ok(Action::Deliver(len)) => prop_assert!(len <= connection.credit().buffered()),
                        Ok(_) => {}
                    }
                }
                Step::Forward(len) => connection.on_forwarded(len.min(connection.credit().buffered())),
                Step::Send(len) => connection.on_data_sent(len.min(connection.data_allowance())),
                Step::HostClosed(is_gone) => connection.on_host_closed(is_gone),
                Step::HostDeaf => connection.on_host_deaf(),
                Step::Blocked => connection.on_blocked_by_credit(),
                Step::TakeControl => {
                    let packets = drain(&mut connection);
                    prop_assert!(packets.len() <= PendingControl::ORDER.len());
                }
            }
            prop_assert!(connection.credit().buffered() <= BUFFER_SIZE);
            prop_assert!(connection.data_allowance() <= connection.credit().peer_free());
            prop_assert!(connection.data_allowance() == 0 || connection.phase() == Phase::Established);
        }
    }
}
