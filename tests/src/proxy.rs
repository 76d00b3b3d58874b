//! A way out of a namespace to one server, and a proxy as companies have them.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use socket2::SockRef;

use crate::netns::Netns;

/// Listens in a namespace, and passes all on to a server that the calling
/// thread's namespace reaches. Dropping it lets nobody in any more.
#[derive(Debug)]
pub struct Proxy {
    listener: TcpListener,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Proxy {
    /// # Panics
    /// If there is no free port.
    pub fn start(netns: &Netns, server: String) -> Self {
        let listener = netns.within(|| TcpListener::bind("127.0.0.1:0"));
        let listener = listener.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let accepting = listener.try_clone().expect("a file descriptor");
        thread::spawn(move || {
            while let Ok((client, _)) = accepting.accept() {
                let server = server.clone();
                thread::spawn(move || drop(pass_on(client, &server)));
            }
        });
        Self { listener, address }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(SockRef::from(&self.listener).shutdown(Shutdown::Both));
    }
}

/// A proxy that is asked for each connection (`CONNECT`, RFC 9110, 9.3.6), in the
/// calling thread's namespace. Dropping it lets nobody in any more.
#[derive(Debug)]
pub struct Tunnels {
    listener: TcpListener,
    /// Where it listens.
    pub address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Tunnels {
    /// # Panics
    /// If there is no free port.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let accepting = listener.try_clone().expect("a file descriptor");
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let log = Arc::clone(&asked);
        thread::spawn(move || {
            while let Ok((client, _)) = accepting.accept() {
                let log = Arc::clone(&log);
                thread::spawn(move || drop(tunnel(client, &log)));
            }
        });
        Self {
            listener,
            address,
            asked,
        }
    }

    /// To which servers tunnels were asked for.
    pub fn asked(&self) -> Vec<String> {
        lock(&self.asked).clone()
    }
}

impl Drop for Tunnels {
    fn drop(&mut self) {
        drop(SockRef::from(&self.listener).shutdown(Shutdown::Both));
    }
}

fn lock(log: &Mutex<Vec<String>>) -> MutexGuard<'_, Vec<String>> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tunnel(mut client: TcpStream, log: &Mutex<Vec<String>>) -> io::Result<()> {
    // Nothing follows the head before it is answered.
    let lines: Result<Vec<_>, _> = BufReader::new(client.try_clone()?)
        .lines()
        .take_while(|line| line.as_ref().is_ok_and(|line| !line.is_empty()))
        .collect();
    let lines = lines?;
    let mut words = lines.iter().flat_map(|line| line.split(' '));
    let (Some("CONNECT"), Some(server)) = (words.next(), words.next()) else {
        return client.write_all(b"HTTP/1.1 405 Method Not Allowed\r\n\r\n");
    };
    lock(log).push(server.to_owned());
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
    pass_on(client, server)
}

fn pass_on(client: TcpStream, server: &str) -> io::Result<()> {
    let server = TcpStream::connect(server)?;
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || {
        drop(io::copy(&mut from_client, &mut to_server));
        drop(to_server.shutdown(Shutdown::Write));
    });
    let (mut from_server, mut to_client) = (server, client);
    io::copy(&mut from_server, &mut to_client)?;
    to_client.shutdown(Shutdown::Both)
}
