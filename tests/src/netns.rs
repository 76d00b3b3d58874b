//! Network namespaces, by name, so that an operator sees them in `ip netns`.
//!
//! Nothing here uses `ip netns exec`: it mounts a new `/sys`, in which the BPF
//! file system and the control groups are missing.

use std::{
    fs::{self, File},
    io::Write as _,
    marker::PhantomData,
    net::{Ipv4Addr, UdpSocket},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::{fs::MetadataExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
};

use nix::sched::{CloneFlags, setns};

use crate::netlink;

/// Where `ip netns` keeps names.
pub const RUN_NETNS: &str = "/run/netns";

/// The cookie of the current network namespace, low word first, as the programs have
/// it; `None` where the kernel does not tell (before 5.14).
///
/// # Panics
/// If there can be no socket.
pub fn cookie() -> Option<[u32; 2]> {
    /// Not in the libc crate.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
    let mut cookie = 0_u64;
    let mut length = size_of_val(&cookie) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which is the size of
    // what it is given.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    (result == 0).then_some([cookie as u32, (cookie >> 32) as u32])
}

/// A network namespace; removed on drop, with the devices in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
    _not_send: PhantomData<*const ()>,
}

impl Netns {
    /// Makes a namespace with `lo` up and without the second that IPv6 waits
    /// for an address to be found unique.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new(name: String) -> Self {
        // The first `ip netns add` after boot mounts RUN_NETNS, and two at once
        // mount it over each other.
        static ADD: Mutex<()> = Mutex::new(());
        {
            let _one_at_a_time = ADD.lock().unwrap_or_else(PoisonError::into_inner);
            ip(&["netns", "add", &name]);
        }
        let file = File::open(path(&name)).unwrap_or_else(|error| panic!("netns {name}: {error}"));
        let netns = Self {
            name,
            file,
            _not_send: PhantomData,
        };
        for interface in ["all", "default"] {
            netns.sysctl(&format!("net/ipv6/conf/{interface}/accept_dad"), "0");
        }
        netns.ip("link set lo up");
        netns
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The namespace itself.
    ///
    /// # Panics
    /// If there are no more file descriptors.
    pub(crate) fn file(&self) -> File {
        self.file.try_clone().expect("a file descriptor")
    }

    /// Runs `work` in a thread of its own inside the namespace. A panic in there
    /// is one here.
    ///
    /// # Panics
    /// If the namespace cannot be entered.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = &self.file;
        let entered = move || {
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET).expect("entering a namespace");
            work()
        };
        let result = thread::scope(|scope| scope.spawn(entered).join());
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Sets a kernel parameter; `key` with slashes.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn sysctl(&self, key: &str, value: &str) {
        let path = Path::new("/proc/sys").join(key);
        self.within(|| fs::write(&path, value))
            .unwrap_or_else(|error| panic!("{}: {key} = {value}: {error}", self.name));
    }

    /// Runs `ip` commands inside the namespace, one a line.
    ///
    /// # Panics
    /// If one fails; the message has what `ip` said.
    pub fn ip(&self, commands: &str) {
        self.within(|| batch(commands))
            .unwrap_or_else(|complaint| panic!("{}: {complaint}", self.name));
    }

    /// Sets the length of the longest packet of IPv4, in bytes, that the kernel hands to
    /// a device, or makes of its frames: of such a setting `ip` knows since its 6.3 only,
    /// as the kernel does.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn set_longest_ipv4(&self, device: &str, bytes: u32) {
        self.within(|| netlink::set_longest_ipv4(device, bytes))
            .unwrap_or_else(|error| panic!("{}: {device}: {error}", self.name));
    }

    /// Runs a command inside the namespace and returns what it printed.
    ///
    /// # Panics
    /// If it fails.
    pub fn output(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.within(|| tool(program).args(arguments).output());
        let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{}: {program} {}: {complaint}",
            self.name,
            arguments.join(" ")
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        delete(&self.name);
    }
}

/// Removes a namespace's name; the kernel removes the namespace when its last
/// process has ended.
pub(crate) fn delete(name: &str) {
    let deleted = tool("ip").args(["netns", "del", name]).status();
    if !deleted
        .as_ref()
        .is_ok_and(std::process::ExitStatus::success)
    {
        eprintln!("ip netns del {name}: {deleted:?}");
    }
}

/// The number by which the kernel knows a named namespace.
pub(crate) fn inode(name: &str) -> Option<u64> {
    fs::metadata(path(name)).ok().map(|file| file.ino())
}

/// The number of the namespace that a process is in.
pub(crate) fn inode_of_process(pid: i32) -> Option<u64> {
    let file = fs::metadata(format!("/proc/{pid}/ns/net")).ok()?;
    Some(file.ino())
}

fn path(name: &str) -> PathBuf {
    Path::new(RUN_NETNS).join(name)
}

/// A program that Ctrl-C does not reach: it is needed to clean up.
pub(crate) fn tool(program: &str) -> Command {
    let mut command = Command::new(program);
    command.process_group(0);
    command
}

fn ip(arguments: &[&str]) {
    let output = tool("ip")
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("ip (package iproute2): {error}"));
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "ip {}: {complaint}",
        arguments.join(" ")
    );
}

/// `ip -batch`: one process for many commands, where each would take 2 ms.
fn batch(commands: &str) -> Result<(), String> {
    let mut child = tool("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("ip (package iproute2): {error}"))?;
    let mut stdin = child.stdin.take().expect("piped");
    // A failure to write is that of `ip`, which says more.
    drop(stdin.write_all(commands.as_bytes()));
    drop(stdin);
    let output = child
        .wait_with_output()
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(())
    } else {
        let complaint = String::from_utf8_lossy(&output.stderr);
        Err(format!("{complaint}{commands}"))
    }
}
