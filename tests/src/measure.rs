//! Requests that are timed: what `klb-traffic measure` does.
//!
//! Client and server are loops around system calls and nothing else, on one CPU,
//! so that a request takes as long as all the work that it causes. Every answer
//! is compared with its question, and tells which server gave it.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::cpu::tie;

/// Where servers answer each [`Test`].
pub const CONNECT_PORT: u16 = 4000;
pub const ROUND_TRIP_PORT: u16 = 4001;
pub const DATAGRAM_PORT: u16 = 4002;

/// Bytes of a question, and of an answer: the server's number, and the question.
const QUESTION: usize = 64;
const ANSWER: usize = QUESTION + 1;
/// An answer that takes longer than this is lost.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Test {
    /// A TCP connection: connect, question, answer, close
    Connect,
    /// A byte there and a byte back, over one TCP connection
    RoundTrip,
    /// A datagram there and one back, by a UDP socket of its own
    Datagram,
}

impl Test {
    /// The port of the servers.
    pub const fn port(self) -> u16 {
        match self {
            Self::Connect => CONNECT_PORT,
            Self::RoundTrip => ROUND_TRIP_PORT,
            Self::Datagram => DATAGRAM_PORT,
        }
    }

    /// As an argument of `klb-traffic`.
    pub const fn flag(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::RoundTrip => "round-trip",
            Self::Datagram => "datagram",
        }
    }
}

/// What a client found out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    pub requests: usize,
    /// Nanoseconds that half of the requests did not exceed.
    pub p50: u32,
    pub p99: u32,
    /// One in a thousand took longer.
    pub p999: u32,
    /// Answers by the number of the server.
    pub servers: BTreeMap<u8, usize>,
}

/// Ties this process to one CPU, where it comes before all others.
///
/// # Errors
/// If the kernel refuses.
pub fn take_cpu(cpu: usize) -> io::Result<()> {
    tie(cpu)?;
    // SAFETY: the call takes numbers only.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Answers all tests as the server with this number, in threads that never end.
///
/// # Errors
/// If a port is taken.
pub fn serve(number: u8) -> io::Result<()> {
    let connections = TcpListener::bind((Ipv4Addr::UNSPECIFIED, CONNECT_PORT))?;
    let round_trips = TcpListener::bind((Ipv4Addr::UNSPECIFIED, ROUND_TRIP_PORT))?;
    let datagrams = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, DATAGRAM_PORT))?;
    // A client that breaks off is the client's news.
    thread::spawn(move || {
        for stream in connections.incoming().filter_map(Result::ok) {
            drop(answer_connection(stream, number));
        }
    });
    thread::spawn(move || {
        for stream in round_trips.incoming().filter_map(Result::ok) {
            drop(answer_round_trips(stream, number));
        }
    });
    thread::spawn(move || {
        loop {
            drop(answer_datagram(&datagrams, number));
        }
    });
    Ok(())
}

/// Closes first: the client's port is free at once, and never runs out.
fn answer_connection(mut stream: TcpStream, number: u8) -> io::Result<()> {
    let mut message = [0; ANSWER];
    message[0] = number;
    stream.read_exact(&mut message[1..])?;
    stream.write_all(&message)
}

fn answer_round_trips(mut stream: TcpStream, number: u8) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        byte[0] ^= number;
        stream.write_all(&byte)?;
    }
}

fn answer_datagram(socket: &UdpSocket, number: u8) -> io::Result<()> {
    let mut message = [0; ANSWER];
    message[0] = number;
    let (length, client) = socket.recv_from(&mut message[1..])?;
    socket.send_to(&message[..=length], client)?;
    Ok(())
}

/// Sends requests for so long, to these addresses by turns. The first tenth of
/// the time is not counted.
///
/// # Errors
/// If a request fails, or its answer is not the right one.
pub fn measure(test: Test, to: &[SocketAddr], time: Duration) -> io::Result<Measured> {
    let mut ask: Box<dyn FnMut(SocketAddr, u64) -> io::Result<u8>> = match test {
        Test::Connect => Box::new(connect),
        Test::Datagram => Box::new(datagram),
        Test::RoundTrip => {
            let first = to.first().ok_or(io::ErrorKind::InvalidInput)?;
            let mut stream = TcpStream::connect(first)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Box::new(move |_, turn| round_trip(&mut stream, turn))
        }
    };
    let started = Instant::now();
    let begin = started + time / 10;
    let end = begin + time;
    let mut nanoseconds = Vec::with_capacity(1 << 17);
    let mut servers = BTreeMap::new();
    let mut now = Instant::now();
    for (turn, to) in (0..).zip(to.iter().cycle()) {
        let number = ask(*to, turn)?;
        let after = Instant::now();
        if now >= begin {
            let took = u32::try_from((after - now).as_nanos());
            nanoseconds.push(took.unwrap_or(u32::MAX));
            *servers.entry(number).or_insert(0) += 1;
        }
        now = after;
        if now >= end && !nanoseconds.is_empty() {
            break;
        }
    }
    nanoseconds.sort_unstable();
    let at = |permille: usize| {
        let last = nanoseconds.len().saturating_sub(1);
        nanoseconds
            .get(last * permille / 1000)
            .copied()
            .unwrap_or(0)
    };
    Ok(Measured {
        requests: nanoseconds.len(),
        p50: at(500),
        p99: at(990),
        p999: at(999),
        servers,
    })
}

/// A question that no other turn has.
fn question(turn: u64) -> [u8; QUESTION] {
    let mut question = [0x5a; QUESTION];
    question[..8].copy_from_slice(&turn.to_be_bytes());
    question
}

/// The server's number, if this is the answer to the question.
fn check(answer: &[u8], question: &[u8; QUESTION]) -> io::Result<u8> {
    match answer.split_first() {
        Some((number, echo)) if echo == question => Ok(*number),
        _ => Err(io::Error::other(format!("a wrong answer: {answer:?}"))),
    }
}

fn connect(to: SocketAddr, turn: u64) -> io::Result<u8> {
    let question = question(turn);
    let mut stream = TcpStream::connect(to)?;
    stream.write_all(&question)?;
    let mut answer = [0; ANSWER];
    stream.read_exact(&mut answer)?;
    // The server closes.
    if stream.read(&mut [0])? != 0 {
        return Err(io::Error::other("more than an answer"));
    }
    check(&answer, &question)
}

fn round_trip(stream: &mut TcpStream, turn: u64) -> io::Result<u8> {
    let [.., low] = turn.to_be_bytes();
    let mut byte = [low];
    stream.write_all(&byte)?;
    stream.read_exact(&mut byte)?;
    Ok(byte[0] ^ low)
}

fn datagram(to: SocketAddr, turn: u64) -> io::Result<u8> {
    let question = question(turn);
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    // As resolvers do: from somebody else no answer is taken.
    socket.connect(to)?;
    socket.send(&question)?;
    let mut answer = [0; ANSWER];
    let length = socket.recv(&mut answer)?;
    check(&answer[..length], &question)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_test_is_answered_by_its_server() {
        serve(7).expect("free ports");
        for test in [Test::Connect, Test::RoundTrip, Test::Datagram] {
            let to = SocketAddr::from((Ipv4Addr::LOCALHOST, test.port()));
            let measured = measure(test, &[to, to], Duration::from_millis(20)).expect("answers");
            assert_eq!(measured.servers, [(7, measured.requests)].into());
            assert!(measured.p50 <= measured.p99 && measured.p99 <= measured.p999);
        }
    }

    #[test]
    fn a_wrong_answer_is_noticed() {
        let asked = question(1);
        let mut answer = vec![7];
        answer.extend(question(2));
        assert!(check(&answer, &asked).is_err());
        assert!(check(&[], &asked).is_err());
    }
}
