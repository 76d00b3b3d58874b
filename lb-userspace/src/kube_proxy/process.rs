//! Whether a kube-proxy works in this network namespace.

use std::{
    fs, io,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    time::Duration,
};

const NAME: &str = "kube-proxy";

/// Where kube-proxy tells its health, as klb does.
const HEALTH: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10256);

/// How a kube-proxy shows, in a sentence; `None` if none does.
pub fn find() -> Option<String> {
    if let Some(pid) = process() {
        return Some(format!("{NAME} runs, with process id {pid}"));
    }
    // k3s and others have it in a process of another name.
    is_its_health_port().then(|| format!("at port {} answers a kube-proxy", HEALTH.port()))
}

/// The first process of that name in this network namespace.
fn process() -> Option<String> {
    let own = fs::read_link("/proc/self/ns/net").ok()?;
    let processes = fs::read_dir("/proc").ok()?.filter_map(Result::ok);
    let mut named = processes.filter(|entry| is_named(&entry.path()));
    let here = named.find(|entry| {
        match fs::read_link(entry.path().join("ns/net")) {
            Ok(other) => other == own,
            // Whose namespace is not told may be here, but not who has gone meanwhile.
            Err(error) => !is_gone(&error),
        }
    });
    here.map(|entry| entry.file_name().to_string_lossy().into_owned())
}

/// Whether it is of a process that has ended.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

fn is_named(process: &Path) -> bool {
    let name = fs::read_to_string(process.join("comm"));
    name.is_ok_and(|name| name.trim_end() == NAME)
}

/// klb's agent answers there, too, and also to `/readyz`, which kube-proxy has
/// not.
fn is_its_health_port() -> bool {
    let is_there = |path| status(path).is_ok_and(|status| status != 404);
    is_there("/healthz") && !is_there("/readyz")
}

/// The status of an answer on the port where kube-proxy and klb tell their
/// health.
pub fn status(path: &str) -> io::Result<u16> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let mut stream = TcpStream::connect_timeout(&HEALTH, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    let head = std::str::from_utf8(&head).map_err(io::Error::other)?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    status.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, process::Command};

    use nix::{
        sys::wait::{Id, WaitPidFlag, waitid},
        unistd::Pid,
    };

    use super::*;

    /// Until its parent asks how it ended, it has a name, and no namespace any more.
    #[test]
    fn one_that_has_ended_does_not_run() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let program = folder.path().join(NAME);
        symlink("/bin/true", &program).expect("linked");
        let mut child = Command::new(&program).spawn().expect("it starts");
        let pid = Pid::from_raw(child.id().cast_signed());
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        waitid(Id::Pid(pid), flags).expect("it ends");
        assert!(is_named(&Path::new("/proc").join(pid.to_string())));
        assert_eq!(process(), None);
        child.wait().expect("it has ended");
    }
}
