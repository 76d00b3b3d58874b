//! A way out of a namespace to one server.

use std::{
    io,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
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
