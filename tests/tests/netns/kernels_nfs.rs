//! The kernel's own client: an NFS mount by the address of a Service, where the
//! kernel has NFS: those of the matrix do. The server is as much of NFS 3 (RFC
//! 1813) and of its mount protocol as reading a file takes.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use lb_common::{Hook, Reason};
use lb_tests::{
    agent::Hooks,
    topology::{Family, Host},
    traffic::Protocol,
    wait,
    world::{ENDPOINTS_FILE, Frontend, World, endpoints},
};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};

const PORT: u16 = 2049;
/// A client that was refused connects again after three seconds.
const LIMIT: Duration = Duration::from_secs(30);

/// What is sent, in the words of XDR (RFC 4506).
#[derive(Default)]
struct Xdr(Vec<u8>);

impl Xdr {
    fn word(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    fn words<const N: usize>(self, values: [u32; N]) -> Self {
        values.into_iter().fold(self, Self::word)
    }

    fn long(self, value: u64) -> Self {
        self.word((value >> 32) as u32).word(value as u32)
    }

    /// With its length before it, and zeros up to a whole word behind it.
    fn bytes(self, bytes: &[u8]) -> Self {
        let mut this = self.word(u32::try_from(bytes.len()).expect("short"));
        this.0.extend(bytes);
        this.0.resize(this.0.len().next_multiple_of(4), 0);
        this
    }

    /// The attributes of a file, or of the folder that it is in.
    fn attributes(self, handle: &[u8], size: usize) -> Self {
        let (kind, mode) = if handle == ROOT {
            (2, 0o755)
        } else {
            (1, 0o644)
        };
        let size = size as u64;
        let id = handle.iter().fold(7, |id, byte| id * 31 + u64::from(*byte));
        self.words([kind, mode, 1, 0, 0])
            .long(size)
            .long(size)
            .words([0, 0])
            .long(1)
            .long(id)
            .words([1; 6])
    }
}

/// What is received.
struct Call<'a>(&'a [u8]);

impl<'a> Call<'a> {
    fn word(&mut self) -> u32 {
        let (word, rest) = self.0.split_first_chunk().expect("a word");
        self.0 = rest;
        u32::from_be_bytes(*word)
    }

    fn bytes(&mut self) -> &'a [u8] {
        let length = self.word() as usize;
        let (bytes, rest) = self.0.split_at(length.next_multiple_of(4));
        self.0 = rest;
        &bytes[..length]
    }
}

/// The handle of the folder that is exported; that of a file is its name.
const ROOT: &[u8] = b"/";

/// A server whose files all hold its name. It ends all connections when it is
/// dropped.
struct Server {
    ends: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    fn new(host: &Host, name: &'static str) -> Self {
        let any = (Ipv6Addr::UNSPECIFIED, PORT);
        let netns = host.place.netns();
        let listener = netns.within(|| TcpListener::bind(any)).expect("a port");
        listener.set_nonblocking(true).expect("a setting");
        let ends = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&ends);
        let thread = thread::spawn(move || serve(&listener, name, &is_over));
        Self {
            ends,
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Serves every connection until it is over.
fn serve(listener: &TcpListener, name: &'static str, is_over: &AtomicBool) {
    thread::scope(|scope| {
        while !is_over.load(Ordering::Relaxed) {
            let Ok((stream, _)) = listener.accept() else {
                thread::sleep(Duration::from_millis(10));
                continue;
            };
            scope.spawn(move || answer_all(stream, name, is_over));
        }
    });
}

fn answer_all(mut stream: TcpStream, name: &str, is_over: &AtomicBool) {
    let brief = Some(Duration::from_millis(50));
    stream.set_nonblocking(false).expect("a setting");
    stream.set_read_timeout(brief).expect("a setting");
    let mut head = [0; 4];
    while !is_over.load(Ordering::Relaxed) {
        match stream.peek(&mut head) {
            Ok(4) => {}
            Ok(0) => return,
            _ => continue,
        }
        let Ok(answer) = answer(&mut stream, name) else {
            return;
        };
        let length = u32::try_from(answer.len()).expect("short") | 1 << 31;
        let record = [&length.to_be_bytes(), &answer[..]].concat();
        if stream.write_all(&record).is_err() {
            return;
        }
    }
}

/// Reads one call (RFC 5531) and makes its answer.
fn answer(stream: &mut TcpStream, name: &str) -> io::Result<Vec<u8>> {
    const MOUNT: u32 = 100_005;
    let mut head = [0; 4];
    stream.read_exact(&mut head)?;
    let length = u32::from_be_bytes(head) & !(1 << 31);
    let mut record = vec![0; length as usize];
    stream.read_exact(&mut record)?;
    let mut call = Call(&record);
    let [id, _, _, program, _, procedure] = [(); 6].map(|()| call.word());
    for _ in ["credentials", "verifier"] {
        call.word();
        call.bytes();
    }
    // An answer, accepted, nothing to verify, done.
    let answer = Xdr::default().words([id, 1, 0, 0, 0, 0]);
    let answer = match (program, procedure) {
        (_, 0) => answer,
        (MOUNT, 1) => answer.word(0).bytes(ROOT).words([1, 1]),
        (MOUNT, _) => answer.word(0),
        (_, procedure) => file(answer, procedure, &mut call, name),
    };
    Ok(answer.0)
}

/// A procedure of NFS itself.
fn file(answer: Xdr, procedure: u32, call: &mut Call<'_>, name: &str) -> Xdr {
    const NOT_SUPPORTED: u32 = 10_004;
    let handle = call.bytes();
    let size = name.len();
    let attributes = |answer: Xdr| answer.word(1).attributes(handle, size);
    match procedure {
        // GETATTR
        1 => answer.word(0).attributes(handle, size),
        // LOOKUP
        3 => {
            let file = call.bytes();
            let answer = answer.word(0).bytes(file);
            answer.word(1).attributes(file, size).word(0)
        }
        // ACCESS
        4 => {
            let wanted = call.word();
            attributes(answer.word(0)).word(wanted)
        }
        // READ
        6 => {
            let length = u32::try_from(size).expect("short");
            attributes(answer.word(0))
                .words([length, 1])
                .bytes(name.as_bytes())
        }
        // FSSTAT
        18 => {
            let answer = attributes(answer.word(0));
            (0..6)
                .fold(answer, |answer, _| answer.long(1 << 20))
                .word(0)
        }
        // FSINFO
        19 => attributes(answer.word(0))
            .words([4096, 4096, 1, 4096, 4096, 1, 4096])
            .long(1 << 30)
            .words([0, 1, 0x1b]),
        // PATHCONF
        20 => attributes(answer.word(0)).words([32, 255, 1, 1, 0, 1]),
        _ => answer.words([NOT_SUPPORTED, 0, 0]),
    }
}

/// Lets the Service lead to these pods.
fn put(world: &World, pods: &[(&str, u8)]) {
    let manifest = endpoints(&world.service, pods).to_string();
    let manifest = manifest.replace("port: 3000", &format!("port: {PORT}"));
    world.agent.manifests.put(ENDPOINTS_FILE, &manifest);
    world.agent.await_services("the endpoints", |services| {
        let mut frontends = services.iter().flat_map(|service| &service.frontends);
        frontends.all(|frontend| frontend.backends.len() == pods.len())
    });
}

/// A mount of the Service in the node; it ends when this is dropped.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(world: &World, at: &'a Path, service: SocketAddr) -> nix::Result<Self> {
        let (ip, port) = (service.ip(), service.port());
        let proto = if ip.is_ipv4() { "tcp" } else { "tcp6" };
        let options = format!(
            "vers=3,proto={proto},mountproto={proto},addr={ip},port={port},\
             mountport={port},nolock,noac,hard"
        );
        let source = match service {
            SocketAddr::V4(_) => format!("{ip}:/"),
            SocketAddr::V6(_) => format!("[{ip}]:/"),
        };
        let node = world.cluster.node.place.netns();
        node.within(|| {
            let (source, flags) = (Some(source.as_str()), MsFlags::empty());
            mount(source, at, Some("nfs"), flags, Some(options.as_str()))
        })?;
        Ok(Self(at))
    }

    /// Reads a file that was not read before.
    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.0.join(file)).expect("a file")
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let force = MntFlags::MNT_FORCE | MntFlags::MNT_DETACH;
        umount2(self.0, force).expect("mounted");
    }
}

/// Whether the kernel can mount such.
fn has_nfs() -> bool {
    let kinds = fs::read_to_string("/proc/filesystems").expect("a list");
    kinds.lines().any(|line| line.ends_with("\tnfs"))
}

/// The mount works by the Service, is refused at once when the Service has no
/// endpoint, and goes on with another pod after that: a client that saw any other
/// error would be stuck, and so would one that had kept the pod's address.
#[test]
fn an_nfs_mount_by_a_service_survives_a_refusal() {
    if !has_nfs() {
        println!("skipped: the kernel has no NFS");
        return;
    }
    for family in Family::ALL {
        let mut world = crate::stopped_world(Hooks::SOCKET);
        // The kernel's sockets belong to no group but the root.
        world.agent.cgroup = Path::new("/sys/fs/cgroup").to_owned();
        world.agent.start();
        let pod = |name| &world.cluster.pod(name).host;
        let first = Server::new(pod("pod-1"), "pod-1");
        let service = world.frontend(Frontend::ClusterIp, family, Protocol::Tcp);
        let at = world.cluster.scope().new_file("mount");
        fs::create_dir(&at).expect("a folder of our own");

        put(&world, &[]);
        let asked = Instant::now();
        let refused = Mounted::new(&world, &at, service).err();
        // Older kernels let no hook choose the error, and nobody else answers for
        // the address here.
        let can_choose = world.agent.status().kernel["set_retval"] == true;
        let expected = if can_choose {
            Errno::ECONNREFUSED
        } else {
            Errno::ENETUNREACH
        };
        assert_eq!(refused, Some(expected));
        assert!(asked.elapsed() < LIMIT, "{:?}", asked.elapsed());

        put(&world, &[("pod-1", 5)]);
        let mounted = Mounted::new(&world, &at, service).expect("an answer of the pod");
        assert_eq!(mounted.read("one"), "pod-1");

        put(&world, &[]);
        drop(first);
        let _second = Server::new(pod("pod-2"), "pod-2");
        let refused = || world.agent.status().count(Hook::Socket, Reason::NoBackend);
        let before = refused();
        thread::scope(|scope| {
            let reader = scope.spawn(|| mounted.read("two"));
            let again = wait::attempt(LIMIT, || (refused() > before).then_some(()));
            put(&world, &[("pod-2", 6)]);
            assert!(again.is_some(), "the client did not connect again");
            assert_eq!(reader.join().expect("read"), "pod-2");
        });
    }
}
