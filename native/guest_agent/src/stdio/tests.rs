use std::io::Write;
use std::time::Instant as StdInstant;

use tokio::sync::watch;

use super::*;
use crate::reaper::Exit;

type ExitSender = watch::Sender<Option<Exit>>;

fn stream() -> (std::fs::File, Output, ExitSender) {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let (sender, receiver) = watch::channel(None);
    let output = Output::new(read, receiver, false).unwrap();
    (std::fs::File::from(write), output, sender)
}

fn exit(sender: &ExitSender) {
    sender.send_replace(Some(Exit {
        status: 0,
        at: StdInstant::now(),
    }));
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), future)
        .await
        .unwrap()
}

#[tokio::test]
async fn everything_written_before_the_exit_is_read_after_it() {
    let (mut writer, output, sender) = stream();
    let written = vec![7_u8; 60_000];
    writer.write_all(&written).unwrap();
    drop(writer);
    exit(&sender);
    let mut read = Vec::new();
    loop {
        let data = within(output.read(1000)).await.unwrap();
        if data.is_empty() {
            break;
        }
        read.extend(data);
    }
    assert_eq!(read, written);
    assert!(output.has_ended());
}

#[tokio::test]
async fn read_that_starts_after_the_exit_ends_though_a_descendant_holds_the_pipe() {
    let (writer, output, sender) = stream();
    exit(&sender);
    assert!(within(output.read(10)).await.unwrap().is_empty());
    drop(writer);
}

#[tokio::test]
async fn waiting_read_ends_after_the_exit_though_a_descendant_holds_the_pipe() {
    let (writer, output, sender) = stream();
    let read = output.read(10);
    let (data, ()) = within(async { tokio::join!(read, async { exit(&sender) }) }).await;
    assert!(data.unwrap().is_empty());
    drop(writer);
}

#[tokio::test]
async fn endless_descendant_does_not_keep_the_stream_open() {
    let (mut writer, output, sender) = stream();
    exit(&sender);
    let thread = std::thread::spawn(move || while writer.write_all(&[1; 4096]).is_ok() {});
    within(async { while !output.read(4096).await.unwrap().is_empty() {} }).await;
    thread.join().unwrap();
}

#[tokio::test]
async fn end_of_pipe_is_the_end_while_the_process_runs() {
    let (writer, output, _sender) = stream();
    drop(writer);
    assert!(within(output.read(10)).await.unwrap().is_empty());
    assert!(within(output.read(10)).await.unwrap().is_empty());
}

#[tokio::test]
async fn read_waits_for_the_first_byte() {
    let (mut writer, output, _sender) = stream();
    let read = output.read(10);
    let (data, ()) =
        within(async { tokio::join!(read, async { writer.write_all(b"x").unwrap() }) }).await;
    assert_eq!(data.unwrap(), b"x");
}

#[tokio::test]
async fn closing_stdin_reaches_the_process_and_may_be_repeated() {
    let pipes = Pipes::new(0, 0).unwrap();
    let (child, agent) = pipes.into_parts();
    let (_sender, receiver) = watch::channel(None);
    let stdio = ProcessStdio::pipes(agent, &receiver).unwrap();
    within(stdio.write_stdin(b"abc", &receiver)).await.unwrap();
    within(stdio.write_stdin(b"", &receiver)).await.unwrap();
    within(stdio.write_stdin(b"", &receiver)).await.unwrap();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut std::fs::File::from(child.stdin), &mut text).unwrap();
    assert_eq!(text, "abc");
    assert!(within(stdio.write_stdin(b"x", &receiver)).await.is_err());
}

#[tokio::test]
async fn full_stdin_of_an_exited_process_does_not_block() {
    let pipes = Pipes::new(0, 0).unwrap();
    let (_child, agent) = pipes.into_parts();
    let (sender, receiver) = watch::channel(None);
    let stdio = ProcessStdio::pipes(agent, &receiver).unwrap();
    let data = vec![0; 1 << 20];
    let write = stdio.write_stdin(&data, &receiver);
    let (result, ()) = within(async { tokio::join!(write, async { exit(&sender) }) }).await;
    assert!(result.is_err());
}
