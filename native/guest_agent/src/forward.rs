//! Ports of the guest's loopback, for the host: each vsock connection becomes one of TCP.
//!
//! The host writes the port's number and a newline. The answer is a line too, `OK` or why not;
//! after it come the connection's bytes, both ways, each direction ending by itself. It is an
//! extension of ours to the Kata agent protocol ([`FEATURE`]), for `kubectl port-forward`.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

use crate::log;

/// How the agent's details name it.
pub(crate) const FEATURE: &str = "port-forward";

/// Connections at once; the next ones wait.
const MAX_CONNECTIONS: usize = 256;
/// The longest request: five digits and the newline.
const MAX_REQUEST: usize = 6;
/// For the request, and for the connection to be made.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves connections to vsock `port` for as long as the guest lives.
pub(crate) async fn serve(port: u32) {
    let listener = match VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)) {
        Ok(listener) => listener,
        Err(cause) => {
            log::warning("forward", format!("listen on vsock port {port}: {cause}"));
            return;
        }
    };
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(async move {
                    // How it ended is known to the two at its ends.
                    let _ended = connect(stream).await;
                    drop(place);
                });
            }
            Err(cause) => {
                log::warning("forward", format!("accept: {cause}"));
                tokio::time::sleep(PATIENCE).await;
            }
        }
    }
}

async fn connect<S>(mut host: S) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let dialled = match timeout(PATIENCE, request(&mut host)).await {
        Ok(Ok(port)) => dial(port).await,
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    match dialled {
        Ok(program) => {
            host.write_all(b"OK\n").await?;
            relay(host, program).await;
        }
        Err(error) => host.write_all(format!("{error}\n").as_bytes()).await?,
    }
    Ok(())
}

/// Copies both ways, each for itself: a program may answer and close without having read everything,
/// and its answer is still the host's. What the host goes on to send is dropped, for a while.
async fn relay<H, P>(host: H, program: P)
where
    H: AsyncRead + AsyncWrite,
    P: AsyncRead + AsyncWrite,
{
    let (mut from_host, mut to_host) = tokio::io::split(host);
    let (mut from_program, mut to_program) = tokio::io::split(program);
    let (answered, has_answered) = oneshot::channel::<()>();
    let forth = async {
        let copied = copy(&mut from_host, &mut to_program).await;
        // Whoever is gone needs not be told.
        let _told = to_program.shutdown().await;
        if copied.is_err() {
            let lingering = async {
                let _answered = has_answered.await;
                tokio::time::sleep(PATIENCE).await;
            };
            let mut nowhere = tokio::io::sink();
            tokio::select! {
                _ = copy(&mut from_host, &mut nowhere) => {}
                () = lingering => {}
            }
        }
    };
    let back = async {
        let _copied = copy(&mut from_program, &mut to_host).await;
        let _told = to_host.shutdown().await;
        let _heard = answered.send(());
    };
    tokio::join!(forth, back);
}

/// Reads the port, and not a byte more.
async fn request<S: AsyncReadExt + Unpin>(host: &mut S) -> io::Result<u16> {
    let mut line = String::new();
    while line.len() < MAX_REQUEST {
        match char::from(host.read_u8().await?) {
            '\n' => break,
            digit if digit.is_ascii_digit() => line.push(digit),
            _ => return Err(no_port(&line)),
        }
    }
    line.parse().map_err(|_| no_port(&line))
}

fn no_port(line: &str) -> io::Error {
    let message = format!("{line:?} begins no port and newline");
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// Connects to a program that listens on either family's loopback; a refusal is IPv4's.
async fn dial(port: u16) -> io::Result<TcpStream> {
    let attempt = |address: SocketAddr| async move {
        match timeout(PATIENCE, TcpStream::connect(address)).await {
            Ok(connected) => connected,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    };
    match attempt((Ipv4Addr::LOCALHOST, port).into()).await {
        Ok(stream) => Ok(stream),
        Err(error) => attempt((Ipv6Addr::LOCALHOST, port).into())
            .await
            .map_err(|_| error),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;
    use tokio::net::TcpListener;

    use super::*;

    /// The host's end of a connection that is served.
    fn served() -> DuplexStream {
        let (host, guest) = tokio::io::duplex(64);
        tokio::spawn(connect(guest));
        host
    }

    async fn answer(request: &[u8]) -> String {
        let mut host = served();
        host.write_all(request).await.unwrap();
        let mut answer = String::new();
        host.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_and_each_direction_ends_by_itself() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let program = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut question = String::new();
                stream.read_to_string(&mut question).await.unwrap();
                stream
                    .write_all(question.to_uppercase().as_bytes())
                    .await
                    .unwrap();
            });
            let mut host = served();
            host.write_all(format!("{port}\nquestion").as_bytes())
                .await
                .unwrap();
            host.shutdown().await.unwrap();
            let mut answer = String::new();
            host.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "OK\nQUESTION");
            program.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_long_answer_arrives_whole_though_the_question_was_not_read() {
        const MANY: usize = 3 << 20;
        let (host, guest) = tokio::io::duplex(64);
        // What one of these has sent is not taken back when it is gone.
        let (program, mut far) = tokio::net::UnixStream::pair().unwrap();
        let relay = tokio::spawn(relay(guest, program));
        tokio::spawn(async move {
            far.read_exact(&mut [0; 4096]).await.unwrap();
            far.write_all(&vec![7; MANY]).await.unwrap();
        });
        let (mut from, mut to) = tokio::io::split(host);
        // For as long as anybody takes it.
        let asking = tokio::spawn(async move { while to.write_all(&[0; 4096]).await.is_ok() {} });
        let mut answer = Vec::new();
        from.read_to_end(&mut answer).await.unwrap();
        assert!(answer == vec![7; MANY], "{} bytes", answer.len());
        asking.abort();
        drop((asking.await, from));
        relay.await.unwrap();
    }

    #[tokio::test]
    async fn a_port_where_nobody_listens_is_said_to_be_one() {
        let unused = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = unused.local_addr().unwrap().port();
        drop(unused);
        let answer = answer(format!("{port}\n").as_bytes()).await;
        assert!(answer.contains("refused"), "{answer}");
    }

    #[tokio::test]
    async fn what_is_no_port_is_refused() {
        for request in ["\n", "65536\n", "1234567", "-1\n", "8 \n", "\u{e9}\n"] {
            let answer = answer(request.as_bytes()).await;
            assert!(answer.contains("no port"), "{request:?}: {answer}");
        }
    }
}
