//! What systemd, or who is in its place, is told.

use std::{os::unix::net::UnixDatagram, time::Duration};

use lb_tests::agent::Hooks;

/// The next thing that is said.
fn said(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer).expect("something is said");
    String::from_utf8_lossy(&buffer[..length]).trim().to_owned()
}

#[test]
fn the_service_manager_hears_of_readiness_and_of_the_end() {
    let mut world = crate::stopped_world(Hooks::SOCKET);
    let path = world.cluster.scope().folder().join("notify");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    let patience = Some(Duration::from_secs(20));
    socket.set_read_timeout(patience).expect("a socket");
    let variable = ("NOTIFY_SOCKET".to_owned(), path.display().to_string());
    world.agent.variables.push(variable);
    world.agent.start();
    assert_eq!(said(&socket), "READY=1");
    world.agent.terminate();
    assert_eq!(said(&socket), "STOPPING=1");
    socket.set_nonblocking(true).expect("a socket");
    assert!(socket.recv(&mut [0; 256]).is_err(), "nothing else is said");
}
