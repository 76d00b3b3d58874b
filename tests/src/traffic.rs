//! Real sockets: what the helper program `klb-traffic` does.
//!
//! Every answer tells who answered, from which address it came and which
//! address the server saw, so that each end can be held against the other.

use std::{
    fmt,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    str::FromStr,
    thread,
    time::{Duration, Instant, SystemTime},
};

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, Type};

/// Milliseconds that a request waits, if nothing else is said: one that is answered is
/// answered within them also where CPUs are taken away for seconds.
const TIMEOUT: u64 = 10_000;

/// What clients and servers speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum)]
pub enum Protocol {
    /// HTTP/1.1
    Tcp,
    /// One datagram each way.
    Udp,
}

/// One exchange with a server, as flags of `klb-traffic`.
#[derive(Args, Clone, Debug)]
pub struct Request {
    #[arg(value_enum)]
    pub protocol: Protocol,
    pub to: SocketAddr,
    /// Own port; any if not given
    #[arg(long, default_value_t = 0)]
    pub from_port: u16,
    /// Speak IPv4 by an IPv6 socket, to `::ffff:a.b.c.d`
    #[arg(long)]
    pub mapped: bool,
    /// UDP: connect the socket, and ask it for its peer
    #[arg(long)]
    pub connected: bool,
    /// TCP: multipath, by a socket that the kernel makes
    #[arg(long)]
    pub multipath: bool,
    /// How long to wait for the connection, and for the answer
    #[arg(long, value_name = "MS", default_value_t = TIMEOUT)]
    pub timeout: u64,
    /// Bytes to send and get back
    #[arg(long, default_value_t = 32)]
    pub size: usize,
}

impl Request {
    pub fn new(protocol: Protocol, to: SocketAddr) -> Self {
        Self {
            protocol,
            to,
            from_port: 0,
            mapped: false,
            connected: false,
            multipath: false,
            timeout: TIMEOUT,
            size: 32,
        }
    }

    #[must_use]
    pub fn from_port(self, from_port: u16) -> Self {
        Self { from_port, ..self }
    }

    #[must_use]
    pub fn mapped(self) -> Self {
        Self {
            mapped: true,
            ..self
        }
    }

    #[must_use]
    pub fn connected(self) -> Self {
        Self {
            connected: true,
            ..self
        }
    }

    #[must_use]
    pub fn multipath(self) -> Self {
        Self {
            multipath: true,
            ..self
        }
    }

    #[must_use]
    pub fn timeout(self, limit: Duration) -> Self {
        let timeout = u64::try_from(limit.as_millis()).expect("a short time");
        Self { timeout, ..self }
    }

    #[must_use]
    pub fn size(self, size: usize) -> Self {
        Self { size, ..self }
    }

    /// As a command line.
    pub fn flags(&self) -> Vec<String> {
        let Self {
            protocol,
            to,
            from_port,
            mapped,
            connected,
            multipath,
            timeout,
            size,
        } = self;
        let protocol = match protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        let mut flags = vec![
            protocol.to_owned(),
            to.to_string(),
            format!("--from-port={from_port}"),
            format!("--timeout={timeout}"),
            format!("--size={size}"),
        ];
        flags.extend(mapped.then(|| "--mapped".to_owned()));
        flags.extend(connected.then(|| "--connected".to_owned()));
        flags.extend(multipath.then(|| "--multipath".to_owned()));
        flags
    }

    fn limit(&self) -> Duration {
        Duration::from_millis(self.timeout)
    }

    /// Does it.
    ///
    /// # Errors
    /// Why no answer came.
    pub fn perform(&self) -> Result<Answer, Failure> {
        match self.protocol {
            Protocol::Tcp => self.http(),
            Protocol::Udp => self.datagram(),
        }
    }

    fn http(&self) -> Result<Answer, Failure> {
        let started = Instant::now();
        let mut connection = Connection::open(self)?;
        let (name, seen) = connection.ask(self.size)?;
        let answer = Answer {
            name,
            from: connection.peer()?,
            peer: Some(connection.peer()?),
            seen,
            micros: micros(started.elapsed()),
        };
        connection.end();
        Ok(answer)
    }

    fn datagram(&self) -> Result<Answer, Failure> {
        self.over(&self.udp_socket()?)
    }

    /// A UDP socket, connected if it is to be.
    ///
    /// # Errors
    /// Why there is none.
    pub fn udp_socket(&self) -> Result<UdpSocket, Failure> {
        let socket = self.unconnected()?;
        if self.connected {
            socket.connect(self.destination())?;
        }
        Ok(socket)
    }

    /// A UDP socket that is not connected yet.
    ///
    /// # Errors
    /// Why there is none.
    pub fn unconnected(&self) -> io::Result<UdpSocket> {
        let socket = UdpSocket::from(self.socket(Type::DGRAM)?);
        socket.set_read_timeout(Some(self.limit()))?;
        Ok(socket)
    }

    /// Asks over a socket of [`Self::unconnected`], which is connected first if
    /// it is to be and is not.
    ///
    /// # Errors
    /// Why no answer came.
    pub fn insist(&self, socket: &UdpSocket) -> Result<Answer, Failure> {
        if self.connected && socket.peer_addr().is_err() {
            socket.connect(self.destination())?;
        }
        self.over(socket)
    }

    /// Asks over a socket of [`Self::udp_socket`].
    ///
    /// # Errors
    /// Why no answer came.
    pub fn over(&self, socket: &UdpSocket) -> Result<Answer, Failure> {
        let started = Instant::now();
        let payload = payload(self.size);
        if self.connected {
            socket.send(&payload)?;
        } else {
            socket.send_to(&payload, self.destination())?;
        }
        let mut buffer = vec![0; 65536];
        let (length, from) = socket.recv_from(&mut buffer)?;
        let (name, seen, echo) = read_datagram(&buffer[..length])?;
        if echo != payload {
            return Err(Failure::Garbled(format!("{} bytes", echo.len())));
        }
        let peer = self.connected.then(|| socket.peer_addr()).transpose()?;
        Ok(Answer {
            name,
            from: plain(from),
            peer: peer.map(plain),
            seen,
            micros: micros(started.elapsed()),
        })
    }

    /// A socket of the right family, bound if a port is wanted.
    fn socket(&self, kind: Type) -> io::Result<Socket> {
        let destination = self.destination();
        let protocol = self.multipath.then_some(socket2::Protocol::MPTCP);
        let socket = Socket::new(Domain::for_address(destination), kind, protocol)?;
        if self.from_port != 0 {
            // A port that a closed connection still holds may be used again.
            socket.set_reuse_address(true)?;
            let any: IpAddr = match destination {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            socket.bind(&SocketAddr::new(any, self.from_port).into())?;
        }
        Ok(socket)
    }

    /// The address as the socket names it.
    fn destination(&self) -> SocketAddr {
        match self.to.ip() {
            IpAddr::V4(addr) if self.mapped => {
                SocketAddr::new(addr.to_ipv6_mapped().into(), self.to.port())
            }
            _ => self.to,
        }
    }
}

/// What a process does with one UDP socket; as text, an argument of
/// `klb-traffic steps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `connect=ADDR`
    Connect(SocketAddr),
    /// `disconnect`: `connect()` to no family.
    Disconnect,
    /// `ask`: whom the socket is connected to.
    Ask,
    /// `ask=ADDR`: somebody, by `sendto()`.
    AskOf(SocketAddr),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(addr) => write!(f, "connect={addr}"),
            Self::Disconnect => f.write_str("disconnect"),
            Self::Ask => f.write_str("ask"),
            Self::AskOf(addr) => write!(f, "ask={addr}"),
        }
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let addr = |text: &str| text.parse().map_err(|error| format!("{text}: {error}"));
        match text.split_once('=') {
            Some(("connect", to)) => addr(to).map(Self::Connect),
            Some(("ask", to)) => addr(to).map(Self::AskOf),
            None if text == "disconnect" => Ok(Self::Disconnect),
            None if text == "ask" => Ok(Self::Ask),
            _ => Err(format!("{text} is no step")),
        }
    }
}

/// Takes the steps with one socket; returns what each question brought.
///
/// # Errors
/// Why a step failed that is no question.
pub fn take(steps: &[Step], mapped: bool) -> Result<Vec<Result<Answer, Failure>>, Failure> {
    let mut steps = steps.iter().peekable();
    let Some(Step::Connect(to) | Step::AskOf(to)) = steps.peek() else {
        return Err(Failure::Other("the first step names nobody".to_owned()));
    };
    let mut request = Request::new(Protocol::Udp, *to);
    request.mapped = mapped;
    let socket = request.udp_socket()?;
    let mut outcomes = Vec::new();
    for step in steps {
        match *step {
            Step::Connect(to) => {
                request.to = to;
                socket.connect(request.destination())?;
            }
            Step::Disconnect => disconnect(&socket)?,
            Step::Ask => outcomes.push(request.clone().connected().over(&socket)),
            Step::AskOf(to) => {
                request.to = to;
                outcomes.push(request.over(&socket));
            }
        }
    }
    Ok(outcomes)
}

fn disconnect(socket: &UdpSocket) -> io::Result<()> {
    let nobody = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        sa_data: [0; 14],
    };
    let size = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the address lives through the call.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &raw const nobody, size) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// An answer, seen from both ends. IPv4-mapped addresses stand as IPv4.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Name of the server.
    pub name: String,
    /// Where the answer came from: the sender of the datagram, or the peer of
    /// the connection.
    pub from: SocketAddr,
    /// What the socket says that it is connected to.
    pub peer: Option<SocketAddr>,
    /// The client's address as the server saw it.
    pub seen: SocketAddr,
    /// From the first call to the end of the answer.
    pub micros: u64,
}

/// Why no answer came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    /// "Connection refused": a RST, an ICMP port unreachable, or a hook's error.
    Refused,
    /// No route: an error of the own kernel, or an ICMP message.
    Unreachable,
    TimedOut,
    /// The connection ended before the answer did.
    Broken,
    /// An answer that is not the one to this question.
    Garbled(String),
    Other(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.write_str("refused"),
            Self::Unreachable => f.write_str("unreachable"),
            Self::TimedOut => f.write_str("timed out"),
            Self::Broken => f.write_str("broken off"),
            Self::Garbled(what) => write!(f, "garbled: {what}"),
            Self::Other(what) => f.write_str(what),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::ConnectionRefused => Self::Refused,
            Kind::NetworkUnreachable | Kind::HostUnreachable => Self::Unreachable,
            // A socket's own timeout is EAGAIN.
            Kind::TimedOut | Kind::WouldBlock => Self::TimedOut,
            Kind::ConnectionReset
            | Kind::ConnectionAborted
            | Kind::BrokenPipe
            | Kind::UnexpectedEof => Self::Broken,
            _ => Self::Other(error.to_string()),
        }
    }
}

/// A line of `klb-traffic`'s output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Microseconds since 1970, when the outcome was known.
    pub at: u64,
    pub outcome: Outcome,
}

/// [`Result`], as JSON has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Answer(Answer),
    Failure(Failure),
}

impl Outcome {
    pub fn result(self) -> Result<Answer, Failure> {
        match self {
            Self::Answer(answer) => Ok(answer),
            Self::Failure(failure) => Err(failure),
        }
    }
}

impl Report {
    pub fn new(result: Result<Answer, Failure>) -> Self {
        let outcome = match result {
            Ok(answer) => Outcome::Answer(answer),
            Err(failure) => Outcome::Failure(failure),
        };
        Self { at: now(), outcome }
    }
}

/// Microseconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    micros(since.unwrap_or_default())
}

/// An HTTP/1.1 connection that stays open between questions.
pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// # Errors
    /// Why it was not made.
    pub fn open(request: &Request) -> Result<Self, Failure> {
        let socket = request.socket(Type::STREAM)?;
        socket.connect_timeout(&SockAddr::from(request.destination()), request.limit())?;
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(request.limit()))?;
        stream.set_write_timeout(Some(request.limit()))?;
        let stream = BufReader::new(stream);
        Ok(Self { stream })
    }

    fn peer(&self) -> io::Result<SocketAddr> {
        self.stream.get_ref().peer_addr().map(plain)
    }

    /// Sends `size` bytes; returns the server's name and the address that it
    /// saw.
    ///
    /// # Errors
    /// Why no answer came.
    pub fn ask(&mut self, size: usize) -> Result<(String, SocketAddr), Failure> {
        let mut question =
            format!("POST / HTTP/1.1\r\nHost: klb\r\nContent-Length: {size}\r\n\r\n").into_bytes();
        question.extend(payload(size));
        self.stream.get_mut().write_all(&question)?;
        let Some(message) = Message::read(&mut self.stream)? else {
            return Err(Failure::Broken);
        };
        if message.start != "HTTP/1.1 200 OK" {
            return Err(Failure::Garbled(message.start));
        }
        let received = message.header("x-received").and_then(|n| n.parse().ok());
        if received != Some(size) {
            return Err(Failure::Garbled(format!("server received {received:?}")));
        }
        let seen = message.header("x-client").and_then(|a| a.parse().ok());
        let seen = seen.ok_or_else(|| Failure::Garbled("no X-Client".to_owned()))?;
        let name = String::from_utf8_lossy(&message.body).trim().to_owned();
        Ok((name, seen))
    }

    /// Closes it, and waits for the server to close it as well: whoever uses the
    /// port again, or counts packets, meets neither FIN. A server that does not is
    /// waited for as long as for an answer.
    fn end(mut self) {
        // The answer is there, whatever happens now.
        drop(self.stream.get_ref().shutdown(Shutdown::Write));
        drop(self.stream.read_to_end(&mut Vec::new()));
    }
}

/// An HTTP/1.1 request or response, as far as it matters here.
struct Message {
    start: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Message {
    /// Reads one; `None` if the connection ends before it begins.
    fn read(stream: &mut BufReader<TcpStream>) -> io::Result<Option<Self>> {
        let Some(start) = read_line(stream)? else {
            return Ok(None);
        };
        let mut headers = Vec::new();
        loop {
            let line = read_line(stream)?.ok_or(io::ErrorKind::UnexpectedEof)?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').ok_or(io::ErrorKind::InvalidData)?;
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let mut message = Self {
            start,
            headers,
            body: Vec::new(),
        };
        let length = message
            .header("content-length")
            .and_then(|length| length.parse().ok());
        message.body = vec![0; length.unwrap_or(0)];
        stream.read_exact(&mut message.body)?;
        Ok(Some(message))
    }

    fn header(&self, name: &str) -> Option<&str> {
        let header = self.headers.iter().find(|(known, _)| known == name);
        header.map(|(_, value)| value.as_str())
    }
}

fn read_line(stream: &mut BufReader<TcpStream>) -> io::Result<Option<String>> {
    let mut line = String::new();
    if stream.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    Ok(Some(line.trim_end().to_owned()))
}

/// Answers every request with the server's own name, until the client closes.
/// `curl` prints just the name.
fn serve_http(name: &str, stream: TcpStream) -> io::Result<()> {
    let client = plain(stream.peer_addr()?);
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    while let Some(request) = Message::read(&mut stream)? {
        let body = format!("{name}\n");
        let response = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\
             X-Client: {client}\r\nX-Received: {}\r\n\r\n{body}",
            body.len(),
            request.body.len(),
        );
        stream.get_mut().write_all(response.as_bytes())?;
    }
    Ok(())
}

/// A server of both families on one port each, in threads that never end.
///
/// # Errors
/// If a port is taken.
pub fn serve(name: &str, http_port: u16, udp_port: u16) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, http_port))?;
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, udp_port))?;
    let (http_name, udp_name) = (name.to_owned(), name.to_owned());
    thread::spawn(move || {
        for stream in listener.incoming().filter_map(Result::ok) {
            let name = http_name.clone();
            // A client that breaks off is the client's news.
            thread::spawn(move || serve_http(&name, stream));
        }
    });
    thread::spawn(move || serve_udp(&udp_name, &socket));
    Ok(())
}

/// Sends every datagram back, behind a line with name and client.
fn serve_udp(name: &str, socket: &UdpSocket) {
    let mut buffer = vec![0; 65536];
    loop {
        // An error is the ICMP answer to an earlier datagram.
        let Ok((length, client)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let mut answer = format!("{name} {}\n", plain(client)).into_bytes();
        answer.extend_from_slice(&buffer[..length]);
        // A client that has gone is no error of the server.
        drop(socket.send_to(&answer, client));
    }
}

fn read_datagram(bytes: &[u8]) -> Result<(String, SocketAddr, &[u8]), Failure> {
    let garbled = || Failure::Garbled(String::from_utf8_lossy(bytes).into_owned());
    let end = bytes
        .iter()
        .position(|byte| *byte == b'\n')
        .ok_or_else(garbled)?;
    let (line, echo) = (&bytes[..end], &bytes[end + 1..]);
    let line = String::from_utf8_lossy(line);
    let (name, client) = line.split_once(' ').ok_or_else(garbled)?;
    let client = client.parse().ok().ok_or_else(garbled)?;
    Ok((name.to_owned(), client, echo))
}

/// Bytes in which a shift, a swap or a repetition shows.
fn payload(size: usize) -> Vec<u8> {
    (0..size)
        .map(|index| u8::try_from(index * 7 % 251).expect("below 251"))
        .collect()
}

/// IPv4-mapped addresses as IPv4.
fn plain(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> (SocketAddr, SocketAddr) {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let ports = (
            tcp.local_addr().expect("bound"),
            udp.local_addr().expect("bound"),
        );
        drop((tcp, udp));
        serve("here", ports.0.port(), ports.1.port()).expect("free just now");
        ports
    }

    #[test]
    fn answers_tell_both_ends() {
        let (tcp, udp) = server();
        for request in [
            Request::new(Protocol::Tcp, tcp),
            Request::new(Protocol::Tcp, tcp).mapped().size(5000),
            Request::new(Protocol::Udp, udp),
            Request::new(Protocol::Udp, udp).connected(),
            Request::new(Protocol::Udp, udp).mapped().size(0),
            Request::new(Protocol::Udp, udp).mapped().connected(),
        ] {
            let answer = request.perform().expect("an answer");
            assert_eq!(answer.name, "here");
            assert_eq!(answer.from, request.to, "{request:?}");
            assert_eq!(answer.seen.ip(), Ipv4Addr::LOCALHOST);
            let asks_for_peer = request.connected || request.protocol == Protocol::Tcp;
            assert_eq!(answer.peer, asks_for_peer.then_some(request.to));
        }
    }

    #[test]
    fn nobody_there_is_a_refusal() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let nobody = listener.local_addr().expect("bound");
        drop(listener);
        let refused = Request::new(Protocol::Tcp, nobody).perform();
        assert_eq!(refused, Err(Failure::Refused));
        let refused = Request::new(Protocol::Udp, nobody).connected().perform();
        assert_eq!(refused, Err(Failure::Refused));
    }

    #[test]
    fn one_socket_asks_many() {
        let (_, here) = server();
        let (_, there) = server();
        let steps = [
            Step::AskOf(here),
            Step::Connect(there),
            Step::Ask,
            Step::Disconnect,
            Step::AskOf(here),
        ];
        let text: Vec<String> = steps.iter().map(ToString::to_string).collect();
        let read: Result<Vec<Step>, String> = text.iter().map(|step| step.parse()).collect();
        assert_eq!(read.as_deref(), Ok(&steps[..]));
        for mapped in [false, true] {
            let outcomes = take(&steps, mapped).expect("all steps").into_iter();
            let answers = outcomes.map(|outcome| outcome.expect("an answer"));
            let answers: Vec<_> = answers.map(|answer| (answer.from, answer.peer)).collect();
            assert_eq!(answers, [(here, None), (there, Some(there)), (here, None)]);
        }
    }

    #[test]
    fn a_connection_is_asked_again() {
        let (tcp, _) = server();
        let request = Request::new(Protocol::Tcp, tcp);
        let mut connection = Connection::open(&request).expect("a connection");
        let first = connection.ask(10).expect("an answer");
        assert_eq!(connection.ask(3000).expect("an answer"), first);
    }

    /// A server of one connection, which stays open so much longer than its
    /// client leaves it.
    fn server_that_lingers(time: Duration) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let addr = listener.local_addr().expect("bound");
        thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a client");
            let open = stream.try_clone().expect("a descriptor");
            serve_http("here", stream).expect("a client that closes");
            thread::sleep(time);
            drop(open);
        });
        addr
    }

    #[test]
    fn an_answer_is_told_once_both_ends_have_closed() {
        let late = Duration::from_millis(100);
        let request = Request::new(Protocol::Tcp, server_that_lingers(late));
        let started = Instant::now();
        request.perform().expect("an answer");
        assert!(started.elapsed() >= late, "{:?}", started.elapsed());
    }

    #[test]
    fn a_server_that_does_not_close_takes_no_answer_away() {
        let request = Request::new(
            Protocol::Tcp,
            server_that_lingers(Duration::from_secs(3600)),
        );
        let request = request.timeout(Duration::from_secs(1));
        request.perform().expect("an answer");
    }

    #[test]
    fn reports_survive_json() {
        for result in [
            Err(Failure::Refused),
            Err(Failure::Other("strange".to_owned())),
            Ok(Answer {
                name: "pod-1".to_owned(),
                from: ([10, 96, 0, 1], 80).into(),
                peer: None,
                seen: ([10, 244, 0, 9], 40000).into(),
                micros: 120,
            }),
        ] {
            let report = Report::new(result);
            let text = serde_json::to_string(&report).expect("JSON");
            let read: Report = serde_json::from_str(&text).expect("read back");
            assert_eq!(read, report);
        }
    }
}
