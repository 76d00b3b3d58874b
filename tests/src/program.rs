//! The real object in the kernel, with maps of its own: filled by hand, and run
//! on one packet at a time.

use std::{
    collections::BTreeMap,
    env,
    fs::File,
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{
        Array, HashMap, Map, MapData, PerCpuArray, PerCpuValues,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{
        Program, ProgramError, ProgramType, SchedClassifier, TcAttachType, TestRun as _,
        TestRunOptions, Xdp, XdpMode,
    },
    sys::{BpfHelper, is_helper_supported},
};
use lb_common::{
    Addr4, Addr6, Credit, Hook, Port, Reason, Served,
    clock::Ticks,
    flow::{FlowEntry, State, Tuple},
    known::{self, Known},
    names,
    node::{CONFIG_BYPASS, Config, Device, Early, EarlyKey, FragmentKey, FragmentPorts, RARE_BITS},
    reason::counter_index,
    service::{
        Affinity, AffinityKey, BackendRef, FrontendKind, SLOT_LOCAL, ServiceEntry, ServiceKey,
        Slot, SourceRange,
    },
    trace::Trace,
    traffic::Traffic,
};

use crate::{clock, syscall, topology::Family};

/// What TC and XDP return, by what it means.
pub const TC_GO_ON: u32 = u32::MAX;
pub const TC_DROP: u32 = 2;
pub const TC_REDIRECT: u32 = 7;
pub const XDP_PASS: u32 = 2;
pub const XDP_DROP: u32 = 1;
pub const XDP_REDIRECT: u32 = 4;

/// The node's own addresses, as sources of what is masqueraded.
pub const NODE4: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
pub const NODE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x50, 0, 0, 0, 0, 0, 1);
/// Backends that a test may have.
const BACKENDS: u32 = 1024;

/// Bytes of the ring of events.
pub const EVENT_BYTES: u32 = 4096;

/// The node's ports that masquerade may use.
pub const MASQUERADE_PORTS: std::ops::Range<u16> = 50_000..50_010;

/// The object file: `KLB_BPF_OBJECT`, or where `cargo xtask build` puts it.
pub fn object_path() -> PathBuf {
    env::var_os("KLB_BPF_OBJECT").map_or_else(
        || {
            PathBuf::from(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../target/bpf/klb.bpf.o"
            ))
        },
        PathBuf::from,
    )
}

/// The object's bytes.
///
/// # Panics
/// If there is none.
pub fn object() -> Vec<u8> {
    let path = object_path();
    let mut bytes = Vec::new();
    File::open(&path)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .unwrap_or_else(|error| {
            panic!("{}: {error}; `cargo xtask build` makes it", path.display())
        });
    bytes
}

/// Loads the object with small maps that nobody else sees.
///
/// # Panics
/// If the kernel refuses it.
pub fn load() -> Ebpf {
    load_small(clock::ticks())
}

/// As [`load`], with programs that tell the time by these ticks.
fn load_small(ticks: Ticks) -> Ebpf {
    load_with(ticks, |map| {
        let fixed = [
            names::COUNTERS,
            names::CONFIG,
            names::PORT_CURSORS,
            names::ANSWERS,
            names::RARE,
            names::CREDIT,
            names::SERVED,
            names::KNOWN,
            names::ROUTES4,
            names::ROUTES6,
            names::EARLY,
            names::SCRATCH,
            names::TRACE,
            names::TRACING,
        ];
        match map {
            names::BACKENDS => Some(BACKENDS),
            // A page, the least that a ring may have.
            names::EVENTS => Some(EVENT_BYTES),
            map => (!fixed.contains(&map)).then_some(1024),
        }
    })
}

/// With what the agent tells programs of packets about the kernel, and so many
/// entries in a map, or as many as it has by itself.
fn load_with(ticks: Ticks, entries: impl Fn(&str) -> Option<u32>) -> Ebpf {
    // Before Linux 5.11 maps are charged to this limit.
    let unlimited = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the struct lives through the call, which only reads it. A
    // failure shows as a map that cannot be made.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited) };
    let has = |helper| u8::from(is_helper_supported(ProgramType::Xdp, helper).unwrap_or(false));
    let xdp_frags = has(BpfHelper::BPF_FUNC_xdp_get_buff_len);
    let mut loader = EbpfLoader::new();
    loader.override_global(names::HAS_XDP_FRAGS, &xdp_frags, true);
    loader.override_global(names::TICK, &ticks.length, true);
    loader.override_global(names::FIRST_TICK, &ticks.first, true);
    for map in names::MAPS {
        if let Some(entries) = entries(map) {
            loader.map_max_entries(map, entries);
        }
    }
    loader
        .load(&object())
        .unwrap_or_else(|error| panic!("loading the object: {error:?}"))
}

fn load_packet_programs(mut ebpf: Ebpf) -> Ebpf {
    for name in [names::TC_INGRESS, names::TC_EGRESS, names::XDP] {
        let program = ebpf.program_mut(name);
        let program = program.unwrap_or_else(|| panic!("no program {name}"));
        load_program(program).unwrap_or_else(|error| panic!("{name}: {error:?}"));
    }
    ebpf
}

/// Loads one program.
///
/// # Errors
/// If the kernel refuses it, or gives it up twenty times.
pub fn load_program(program: &mut Program) -> Result<(), ProgramError> {
    let load = || match &mut *program {
        Program::Xdp(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    again_if_given_up(load, |error| match error {
        ProgramError::LoadError { io_error, .. } => Some(io_error),
        _ => None,
    })
}

/// What the verifier gives up (`EAGAIN`) is loaded once more, after a pause: what disturbs
/// it may go on for seconds, in which five attempts in a row failed. `cause` is the
/// kernel's own word in an error.
pub(crate) fn again_if_given_up<T, E>(
    mut load: impl FnMut() -> Result<T, E>,
    cause: impl Fn(&E) -> Option<&io::Error>,
) -> Result<T, E> {
    const ATTEMPTS: u32 = 20;
    const PAUSE: Duration = Duration::from_millis(200);
    let is_given_up = |error: &E| {
        let cause = cause(error);
        cause.is_some_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    };
    for _ in 1..ATTEMPTS {
        match load() {
            Err(error) if is_given_up(&error) => thread::sleep(PAUSE),
            loaded => return loaded,
        }
    }
    load()
}

/// A backend to put into slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    pub addr: SocketAddr,
    pub local: bool,
}

/// What one run did.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What the program returned.
    pub action: u32,
    pub reason: Reason,
    pub frame: Vec<u8>,
}

/// Objects whose programs the kernel has verified, which takes a while, and that
/// no test uses at the moment.
static LOADED: Mutex<Vec<Ebpf>> = Mutex::new(Vec::new());

/// The packet programs with maps of their own.
pub struct Datapath {
    /// `None` only while it is dropped.
    loaded: Option<Ebpf>,
    /// A device has a program, the maps are not those of tests or hold what cannot be
    /// emptied at once, or the clock has stopped; nobody else must get it.
    is_special: bool,
    next_slot: u32,
    next_service: u32,
    next_backend: u32,
    generation: u32,
}

impl Default for Datapath {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Datapath {
    fn drop(&mut self) {
        let loaded = self.loaded.take().filter(|_| !self.is_special);
        // A test that panicked with the lock held has left nothing half-done.
        let mut free = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        free.extend(loaded);
    }
}

impl Datapath {
    /// # Panics
    /// If the kernel refuses a program.
    pub fn new() -> Self {
        let free = LOADED.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Self::of(free.unwrap_or_else(|| load_packet_programs(load())), false)
    }

    /// With maps that no test has used before, and with programs for which no time
    /// goes by: what is news once in a second is so once.
    ///
    /// # Panics
    /// If the kernel refuses a program.
    pub fn without_time() -> Self {
        Self::of(load_packet_programs(load_small(clock::stopped())), true)
    }

    /// With maps of the size that they have without a flag.
    ///
    /// # Panics
    /// If the kernel refuses a program.
    pub fn of_default_size() -> Self {
        Self::of(
            load_packet_programs(load_with(clock::ticks(), |_| None)),
            true,
        )
    }

    fn of(ebpf: Ebpf, is_special: bool) -> Self {
        let mut this = Self {
            loaded: Some(ebpf),
            is_special,
            next_slot: 0,
            next_service: 1,
            next_backend: 1,
            generation: 7,
        };
        this.clear();
        this.configure(&Config {
            timeouts: State::TIMEOUTS,
            first_port: MASQUERADE_PORTS.start,
            port_count: MASQUERADE_PORTS.end - MASQUERADE_PORTS.start,
            ..Config::default()
        });
        this.set_device(
            0,
            Device {
                addr4: NODE4.into(),
                addr6: NODE6.into(),
                flags: 0,
            },
        );
        this
    }

    /// How many connections each CPU may open among the confirmed: these, and none
    /// because time goes by.
    pub fn set_credit(&mut self, left: u32) {
        let credit = Credit {
            left,
            given: u32::MAX,
        };
        set_per_cpu(self.map(names::CREDIT), 0, credit);
    }

    /// Removes every flow of a family.
    pub fn clear_flows(&mut self, family: Family) {
        for (v4, v6) in FLOW_TABLES {
            match family {
                Family::V4 => clear::<Tuple<Addr4>, FlowEntry<Addr4>>(self.map(v4)),
                Family::V6 => clear::<Tuple<Addr6>, FlowEntry<Addr6>>(self.map(v6)),
            }
        }
    }

    /// Empties every map of what a program or a test may find in it.
    fn clear(&mut self) {
        set(self.map(names::SERVED), 0, Served::NONE);
        self.clear_family::<Addr4>([
            names::SERVICES4,
            names::FLOWS4,
            names::YOUNG4,
            names::AFFINITY4,
            names::FRAGMENTS4,
            names::RANGES4,
        ]);
        self.clear_family::<Addr6>([
            names::SERVICES6,
            names::FLOWS6,
            names::YOUNG6,
            names::AFFINITY6,
            names::FRAGMENTS6,
            names::RANGES6,
        ]);
        clear::<EarlyKey<Addr4>, Early>(self.map(names::EARLY4));
        clear::<EarlyKey<Addr6>, Early>(self.map(names::EARLY6));
        clear::<u32, Device>(self.map(names::DEVICES));
        for id in 0..BACKENDS {
            set(self.map(names::BACKENDS), id, 0_u32);
            set_per_cpu(self.map(names::TRAFFIC), id, Traffic::default());
        }
        self.forget_what_was_rare();
        set_per_cpu(self.map(names::ANSWERS), 0, [0_u32; 2]);
        self.set_credit(Credit::MOST);
        self.listen_until(&Trace::default(), 0);
        self.told();
    }

    fn clear_family<A: FlowAddr>(
        &mut self,
        [services, flows, young, affinity, fragments, ranges]: [&str; 6],
    ) where
        ServiceKey<A>: aya::Pod,
        Tuple<A>: aya::Pod,
        FlowEntry<A>: aya::Pod,
        AffinityKey<A>: aya::Pod,
        FragmentKey<A>: aya::Pod,
        SourceRange<A>: aya::Pod,
    {
        clear::<ServiceKey<A>, ServiceEntry>(self.map(services));
        clear::<Tuple<A>, FlowEntry<A>>(self.map(flows));
        clear::<Tuple<A>, FlowEntry<A>>(self.map(young));
        clear::<AffinityKey<A>, Affinity>(self.map(affinity));
        clear::<FragmentKey<A>, FragmentPorts>(self.map(fragments));
        let mut map: LpmTrie<_, SourceRange<A>, u32> =
            self.map(ranges).try_into().expect("an LPM trie");
        let keys: Vec<_> = map.keys().map(|key| key.expect("readable")).collect();
        for key in keys {
            map.remove(&key).expect("an entry to remove");
        }
    }

    /// The maps, by name.
    pub fn maps(&self) -> impl Iterator<Item = (&str, &Map)> {
        self.ebpf().maps()
    }

    fn ebpf(&self) -> &Ebpf {
        self.loaded.as_ref().expect("there until it is dropped")
    }

    fn ebpf_mut(&mut self) -> &mut Ebpf {
        self.loaded.as_mut().expect("there until it is dropped")
    }

    /// The programs' settings.
    pub fn config(&mut self) -> Config {
        let map: Array<_, Config> = self.map(names::CONFIG).try_into().expect("an array");
        map.get(&0, 0).expect("an index within the map")
    }

    /// Puts the entry of an address, without ports.
    pub fn put_address(&mut self, addr: IpAddr, flags: u8) {
        let entry = ServiceEntry {
            kind: FrontendKind::Address as u8,
            flags,
            slot_count: 1,
            ..ServiceEntry::default()
        };
        match addr {
            IpAddr::V4(addr) => put(
                self.map(names::SERVICES4),
                ServiceKey::new(Addr4::from(addr), Port::default(), 0),
                entry,
            ),
            IpAddr::V6(addr) => put(
                self.map(names::SERVICES6),
                ServiceKey::new(Addr6::from(addr), Port::default(), 0),
                entry,
            ),
        }
    }

    /// Makes every client with affinity look as if it had last come so long ago.
    pub fn age_affinity(&mut self, seconds: u32) {
        age_affinity::<AffinityKey<Addr4>>(self.map(names::AFFINITY4), seconds);
        age_affinity::<AffinityKey<Addr6>>(self.map(names::AFFINITY6), seconds);
    }

    /// Says what a device is; 0 is the node.
    pub fn set_device(&mut self, index: u32, device: Device) {
        put(self.map(names::DEVICES), index, device);
    }

    /// Gives the programs their settings.
    pub fn configure(&mut self, config: &Config) {
        set(self.map(names::CONFIG), 0, *config);
        // Ways that its programs have been told are believed for a moment.
        self.is_special |= config.flags & CONFIG_BYPASS != 0;
    }

    /// Makes `frontend` lead to `backends`; returns the backends' names.
    pub fn serve(
        &mut self,
        protocol: u8,
        frontend: SocketAddr,
        backends: &[Backend],
    ) -> Vec<BackendRef> {
        let first_slot = self.next_slot;
        let references: Vec<_> = backends
            .iter()
            .map(|backend| self.put_backend(backend))
            .collect();
        let count = u32::try_from(backends.len()).expect("few backends");
        let entry = ServiceEntry {
            first_slot,
            slot_count: count,
            inner_first_slot: first_slot,
            inner_slot_count: count,
            service: self.next_service,
            kind: FrontendKind::ClusterIp as u8,
            ..ServiceEntry::default()
        };
        self.next_service += 1;
        let port = Port::from(frontend.port());
        self.note_served(port);
        match frontend.ip() {
            IpAddr::V4(addr) => put(
                self.map(names::SERVICES4),
                ServiceKey::new(Addr4::from(addr), port, protocol),
                entry,
            ),
            IpAddr::V6(addr) => put(
                self.map(names::SERVICES6),
                ServiceKey::new(Addr6::from(addr), port, protocol),
                entry,
            ),
        }
        references
    }

    /// Has a frontend or backend with this port looked for.
    fn note_served(&mut self, port: Port) {
        let map = self.map(names::SERVED);
        let array: Array<_, Served> = map.try_into().expect("an array");
        let mut served = array.get(&0, 0).expect("the one entry");
        if served.add(port) {
            set(self.map(names::SERVED), 0, served);
        }
    }

    /// Changes the entry of a frontend.
    ///
    /// # Panics
    /// If there is none.
    pub fn change_frontend(
        &mut self,
        protocol: u8,
        frontend: SocketAddr,
        change: impl FnOnce(&mut ServiceEntry),
    ) {
        let port = Port::from(frontend.port());
        match frontend.ip() {
            IpAddr::V4(addr) => replace(
                self.map(names::SERVICES4),
                ServiceKey::new(Addr4::from(addr), port, protocol),
                change,
            ),
            IpAddr::V6(addr) => replace(
                self.map(names::SERVICES6),
                ServiceKey::new(Addr6::from(addr), port, protocol),
                change,
            ),
        }
    }

    /// Lets the clients of a network use the Service of a frontend that names
    /// who may.
    pub fn allow(&mut self, service: u32, network: IpAddr, prefix: u32) {
        match network {
            IpAddr::V4(addr) => {
                let addr = Addr4::from(addr);
                allow(
                    self.map(names::RANGES4),
                    SourceRange { service, addr },
                    prefix,
                );
            }
            IpAddr::V6(addr) => {
                let addr = Addr6::from(addr);
                allow(
                    self.map(names::RANGES6),
                    SourceRange { service, addr },
                    prefix,
                );
            }
        }
    }

    /// Removes a frontend.
    pub fn stop_serving(&mut self, protocol: u8, frontend: SocketAddr) {
        let port = Port::from(frontend.port());
        match frontend.ip() {
            IpAddr::V4(addr) => take::<_, ServiceEntry>(
                self.map(names::SERVICES4),
                &ServiceKey::new(Addr4::from(addr), port, protocol),
            ),
            IpAddr::V6(addr) => take::<_, ServiceEntry>(
                self.map(names::SERVICES6),
                &ServiceKey::new(Addr6::from(addr), port, protocol),
            ),
        }
    }

    /// Has the backends that are served from now on get the ids of those before
    /// them, for another life.
    pub fn use_ids_again(&mut self) {
        self.next_backend = 1;
        self.generation += 2;
    }

    fn put_backend(&mut self, backend: &Backend) -> BackendRef {
        let reference = BackendRef {
            id: self.next_backend,
            generation: self.generation,
        };
        let index = self.next_slot;
        self.next_backend += 1;
        self.next_slot += 1;
        self.set_generation(reference.id, reference.generation);
        let port = Port::from(backend.addr.port());
        self.note_served(port);
        let flags = if backend.local { SLOT_LOCAL } else { 0 };
        match backend.addr.ip() {
            IpAddr::V4(addr) => set(
                self.map(names::SLOTS4),
                index,
                Slot {
                    addr: Addr4::from(addr),
                    port,
                    flags,
                    backend: reference,
                },
            ),
            IpAddr::V6(addr) => set(
                self.map(names::SLOTS6),
                index,
                Slot {
                    addr: Addr6::from(addr),
                    port,
                    flags,
                    backend: reference,
                },
            ),
        }
        reference
    }

    /// Sets which life of a backend goes on; 0 for none.
    pub fn set_generation(&mut self, id: u32, generation: u32) {
        set(self.map(names::BACKENDS), id, generation);
    }

    /// Runs one packet through a hook. The reason is read from the counters,
    /// of which exactly one must have gone up by one.
    ///
    /// # Panics
    /// If the kernel refuses, or if not exactly one reason was counted.
    pub fn run(&mut self, hook: Hook, frame: &[u8]) -> Outcome {
        self.try_run(hook, frame)
            .unwrap_or_else(|| panic!("{hook:?}: the kernel refuses {} bytes", frame.len()))
    }

    /// As [`Self::run`], but `None` if the kernel refuses to make a packet of
    /// the frame: it wants an Ethernet header, and at TC newer ones want a whole
    /// IP header behind an `EtherType` of IP. A real device delivers such
    /// frames; the namespace tests send them.
    pub fn try_run(&mut self, hook: Hook, frame: &[u8]) -> Option<Outcome> {
        self.try_run_as(hook, frame, None)
    }

    /// As [`Self::run`] at TC, for a packet that the kernel will split into frames with
    /// so many bytes of payload each, or has joined of such.
    ///
    /// # Panics
    /// As [`Self::run`].
    pub fn run_joined(&mut self, hook: Hook, frame: &[u8], size: u32) -> Outcome {
        // Length and an offset of `struct __sk_buff` (linux/bpf.h).
        const SK_BUFF: usize = 192;
        const GSO_SIZE: usize = 176;
        let mut before = [0; SK_BUFF];
        before[GSO_SIZE..][..4].copy_from_slice(&size.to_ne_bytes());
        let mut after = before;
        let outcome = self.try_run_as(hook, frame, Some((&before, &mut after)));
        outcome.unwrap_or_else(|| panic!("{hook:?}: the kernel refuses {} bytes", frame.len()))
    }

    fn try_run_as(
        &self,
        hook: Hook,
        frame: &[u8],
        context: Option<(&[u8], &mut [u8])>,
    ) -> Option<Outcome> {
        let before = self.counters(hook);
        let mut out = vec![0; frame.len() + 256];
        let (action, length) = match self.test_run(hook, frame, &mut out, context) {
            Ok(result) => result,
            Err(_) if frame.len() < shortest(hook) => return None,
            Err(error) => panic!("{hook:?}: test run: {error:?}"),
        };
        out.truncate(length);
        let after = self.counters(hook);
        let counted: Vec<_> = Reason::ALL
            .iter()
            .filter(|reason| before[reason] != after[reason])
            .collect();
        let [reason] = counted[..] else {
            panic!("one reason should be counted, not {counted:?}");
        };
        assert_eq!(after[reason], before[reason] + 1, "{reason:?} counted once");
        Some(Outcome {
            action,
            reason: *reason,
            frame: out,
        })
    }

    /// One `BPF_PROG_TEST_RUN`: what was returned, and the length of the frame
    /// written to `out`. `context` is a `__sk_buff` before and after (TC only).
    pub fn test_run(
        &self,
        hook: Hook,
        frame: &[u8],
        out: &mut [u8],
        context: Option<(&[u8], &mut [u8])>,
    ) -> Result<(u32, usize), ProgramError> {
        let (ctx_in, ctx_out) = context.unzip();
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(out),
            ctx_in,
            ctx_out,
            ..TestRunOptions::default()
        };
        let program = self.program(hook);
        let result = if hook == Hook::Xdp {
            <&Xdp>::try_from(program)?.test_run(options)?
        } else {
            <&SchedClassifier>::try_from(program)?.test_run(options)?
        };
        Ok((
            result.return_value,
            usize::try_from(result.data_size_out).expect("fits"),
        ))
    }

    /// Runs the program of a TC hook on a frame that comes with the kernel's sum of it.
    /// Returns the frame as it is then, or why the run failed:
    /// [`syscall::TEST_CHECKSUM_COMPLETE`].
    ///
    /// # Errors
    /// The kernel's.
    ///
    /// # Panics
    /// If there is no such program.
    pub fn run_with_sum(&self, hook: Hook, frame: &[u8]) -> io::Result<Vec<u8>> {
        let program: &SchedClassifier = self.program(hook).try_into().expect("at TC");
        let fd = program.fd().expect("loaded in new");
        syscall::test_run(fd, frame, syscall::TEST_CHECKSUM_COMPLETE)
    }

    /// The packet program of a hook.
    ///
    /// # Panics
    /// For the hook of sockets, which has several.
    pub fn program(&self, hook: Hook) -> &Program {
        let name = match hook {
            Hook::Xdp => names::XDP,
            Hook::TcIngress => names::TC_INGRESS,
            Hook::TcEgress => names::TC_EGRESS,
            Hook::Socket => panic!("sockets have no packets"),
        };
        self.ebpf().program(name).expect("loaded in new")
    }

    /// Any program by its name, for who loads and attaches it himself.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn program_mut(&mut self, name: &str) -> &mut Program {
        self.is_special = true;
        let program = self.ebpf_mut().program_mut(name);
        program.unwrap_or_else(|| panic!("no program {name} in the object"))
    }

    /// Attaches a packet program to a device of the current network namespace,
    /// for as long as `self` lives. XDP runs in the driver.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn attach(&mut self, hook: Hook, device: &str) {
        let (name, side) = match hook {
            Hook::Xdp => (names::XDP, None),
            Hook::TcIngress => (names::TC_INGRESS, Some(TcAttachType::Ingress)),
            Hook::TcEgress => (names::TC_EGRESS, Some(TcAttachType::Egress)),
            Hook::Socket => panic!("sockets are no devices"),
        };
        self.is_special = true;
        let program = self.ebpf_mut().program_mut(name).expect("loaded in new");
        let result = match (program, side) {
            (Program::Xdp(program), None) => {
                program.attach(device, XdpMode::Driver).map(|_link| ())
            }
            (Program::SchedClassifier(program), Some(side)) => {
                program.attach(device, side).map(|_link| ())
            }
            _ => panic!("{name} is of another type"),
        };
        result.unwrap_or_else(|error| panic!("{name} at {device}: {error:?}"));
    }

    /// How often each reason was counted at a hook.
    pub fn counters(&self, hook: Hook) -> BTreeMap<Reason, u64> {
        let map = self.ebpf().map(names::COUNTERS).expect("in the object");
        let counters: PerCpuArray<_, u64> = map.try_into().expect("a per-CPU array");
        Reason::ALL
            .iter()
            .map(|reason| {
                let values = counters
                    .get(&counter_index(hook, *reason), 0)
                    .expect("an index within the map");
                (*reason, values.iter().sum())
            })
            .collect()
    }

    /// What was counted for the backend with this id.
    pub fn traffic(&self, id: u32) -> Traffic {
        let map = self.ebpf().map(names::TRAFFIC).expect("in the object");
        let map: PerCpuArray<_, Traffic> = map.try_into().expect("a per-CPU array");
        let values = map.get(&id, 0).expect("an index within the map");
        values
            .iter()
            .fold(Traffic::default(), |sum, value| Traffic {
                generation: sum.generation.max(value.generation),
                pad: 0,
                flows: sum.flows + value.flows,
                packets_in: sum.packets_in + value.packets_in,
                bytes_in: sum.bytes_in + value.bytes_in,
                packets_out: sum.packets_out + value.packets_out,
                bytes_out: sum.bytes_out + value.bytes_out,
            })
    }

    /// The IPv4 flows, confirmed and young.
    pub fn flows4(&self) -> BTreeMap<String, FlowEntry<Addr4>> {
        self.dump([names::YOUNG4, names::FLOWS4])
    }

    /// The IPv6 flows, confirmed and young.
    pub fn flows6(&self) -> BTreeMap<String, FlowEntry<Addr6>> {
        self.dump([names::YOUNG6, names::FLOWS6])
    }

    fn dump<A: FlowAddr>(&self, tables: [&str; 2]) -> BTreeMap<String, FlowEntry<A>>
    where
        Tuple<A>: aya::Pod,
        FlowEntry<A>: aya::Pod,
    {
        let table = |name| self.ebpf().map(name).expect("in the object");
        // A connection that was just confirmed is in both; the second counts.
        tables
            .into_iter()
            .flat_map(|name| dump(table(name)))
            .collect()
    }

    /// Number of flow entries of both families.
    pub fn flow_count(&self) -> usize {
        self.flows4().len() + self.flows6().len()
    }

    /// Number of entries of both families in the tables of the young.
    pub fn young_count(&self) -> usize {
        let table = |name| self.ebpf().map(name).expect("in the object");
        dump::<Addr4>(table(names::YOUNG4)).len() + dump::<Addr6>(table(names::YOUNG6)).len()
    }

    /// Takes back that anything rare has happened.
    pub fn forget_what_was_rare(&mut self) {
        for index in 0..1 << RARE_BITS {
            set(self.map(names::RARE), index, 0_u32);
        }
    }

    /// Makes every flow entry look as if it had been silent for so long, and all that
    /// is rare as if it had not happened since.
    pub fn age_flows(&mut self, seconds: u32) {
        for (v4, v6) in FLOW_TABLES {
            age::<Addr4>(self.map(v4), seconds);
            age::<Addr6>(self.map(v6), seconds);
        }
        let mut rare: Array<_, u32> = self.map(names::RARE).try_into().expect("an array");
        for index in 0..rare.len() {
            let last = rare.get(&index, 0).expect("an index within the map");
            if last != 0 {
                // 0 is never, on a machine that has just booted as well.
                let earlier = last.wrapping_sub(seconds).max(1);
                rare.set(index, earlier, 0)
                    .expect("an index within the map");
            }
        }
    }

    /// What is known of flows to and from an address and port.
    pub fn known(&mut self, end: SocketAddr) -> Known {
        let map: Array<_, Known> = self.map(names::KNOWN).try_into().expect("an array");
        map.get(&known_place(end), 0)
            .expect("an index within the map")
    }

    /// Changes that.
    pub fn change_known(&mut self, end: SocketAddr, change: impl FnOnce(Known) -> Known) {
        let known = change(self.known(end));
        set(self.map(names::KNOWN), known_place(end), known);
    }

    /// Removes the entries of one direction, as the LRU may.
    pub fn evict(&mut self, direction: u8) {
        for (v4, v6) in FLOW_TABLES {
            evict::<Addr4>(self.map(v4), direction);
            evict::<Addr6>(self.map(v6), direction);
        }
    }

    /// A map of the object.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn map(&mut self, name: &str) -> &mut Map {
        self.ebpf_mut()
            .map_mut(name)
            .unwrap_or_else(|| panic!("no map {name} in the object"))
    }
}

fn known_place(end: SocketAddr) -> u32 {
    let port = Port::from(end.port());
    match end.ip() {
        IpAddr::V4(addr) => known::place(&Addr4::from(addr), port),
        IpAddr::V6(addr) => known::place(&Addr6::from(addr), port),
    }
}

/// Names of the flow tables of both families.
const FLOW_TABLES: [(&str, &str); 2] = [
    (names::FLOWS4, names::FLOWS6),
    (names::YOUNG4, names::YOUNG6),
];

/// The length from which on every kernel runs a frame of any kind.
const fn shortest(hook: Hook) -> usize {
    if matches!(hook, Hook::Xdp) {
        14
    } else {
        14 + 40
    }
}

/// A map type of the object that can be walked as `HashMap<Tuple, FlowEntry>`.
trait FlowAddr: lb_common::Address + std::fmt::Debug
where
    Tuple<Self>: aya::Pod,
    FlowEntry<Self>: aya::Pod,
{
}
impl FlowAddr for Addr4 {}
impl FlowAddr for Addr6 {}

fn flows<A: FlowAddr>(map: &mut Map) -> HashMap<&mut MapData, Tuple<A>, FlowEntry<A>>
where
    Tuple<A>: aya::Pod,
    FlowEntry<A>: aya::Pod,
{
    map.try_into().expect("a hash map")
}

fn dump<A: FlowAddr>(map: &Map) -> BTreeMap<String, FlowEntry<A>>
where
    Tuple<A>: aya::Pod,
    FlowEntry<A>: aya::Pod,
{
    let flows: HashMap<_, Tuple<A>, FlowEntry<A>> = map.try_into().expect("a hash map");
    flows
        .iter()
        .map(|entry| entry.expect("nobody else changes the table"))
        .map(|(key, value)| (format!("{key:?}"), value))
        .collect()
}

fn age<A: FlowAddr>(map: &mut Map, seconds: u32)
where
    Tuple<A>: aya::Pod,
    FlowEntry<A>: aya::Pod,
{
    let mut flows = flows::<A>(map);
    let entries: Vec<_> = flows.iter().map(|entry| entry.expect("readable")).collect();
    for (key, mut value) in entries {
        value.last_seen = value.last_seen.wrapping_sub(seconds);
        flows.insert(key, value, 0).expect("replacing an entry");
    }
}

fn evict<A: FlowAddr>(map: &mut Map, direction: u8)
where
    Tuple<A>: aya::Pod,
    FlowEntry<A>: aya::Pod,
{
    let mut flows = flows::<A>(map);
    let entries: Vec<_> = flows.iter().map(|entry| entry.expect("readable")).collect();
    for (key, value) in entries {
        if value.direction == direction {
            flows.remove(&key).expect("removing an entry");
        }
    }
}

fn clear<K: aya::Pod, V: aya::Pod>(map: &mut Map) {
    let mut map: HashMap<_, K, V> = map.try_into().expect("a hash map");
    let keys: Vec<_> = map.keys().map(|key| key.expect("readable")).collect();
    for key in keys {
        map.remove(&key).expect("an entry to remove");
    }
}

fn set_per_cpu<V: aya::Pod>(map: &mut Map, index: u32, value: V) {
    let mut array: PerCpuArray<_, V> = map.try_into().expect("a per-CPU array");
    let values = vec![value; aya::util::nr_cpus().expect("a number of CPUs")];
    let values = PerCpuValues::try_from(values).expect("a value for each CPU");
    array
        .set(index, values, 0)
        .expect("an index within the map");
}

fn put<K: aya::Pod, V: aya::Pod>(map: &mut Map, key: K, value: V) {
    let mut map: HashMap<_, K, V> = map.try_into().expect("a hash map");
    map.insert(key, value, 0).expect("room for an entry");
}

fn replace<K: aya::Pod>(map: &mut Map, key: K, change: impl FnOnce(&mut ServiceEntry)) {
    let mut map: HashMap<_, K, ServiceEntry> = map.try_into().expect("a hash map");
    let mut entry = map.get(&key, 0).expect("a frontend to change");
    change(&mut entry);
    map.insert(key, entry, 0).expect("replacing an entry");
}

pub(crate) fn age_affinity<K: aya::Pod>(map: &mut Map, seconds: u32) {
    let mut map: HashMap<_, K, Affinity> = map.try_into().expect("a hash map");
    let entries: Vec<_> = map.iter().map(|entry| entry.expect("readable")).collect();
    for (key, mut value) in entries {
        value.last_used = value.last_used.wrapping_sub(seconds);
        map.insert(key, value, 0).expect("replacing an entry");
    }
}

fn allow<K: aya::Pod>(map: &mut Map, range: K, prefix: u32) {
    let mut map: LpmTrie<_, K, u32> = map.try_into().expect("an LPM trie");
    let key = Key::new(u32::BITS + prefix, range);
    map.insert(&key, 1, 0).expect("room for an entry");
}

fn take<K: aya::Pod, V: aya::Pod>(map: &mut Map, key: &K) {
    let mut map: HashMap<_, K, V> = map.try_into().expect("a hash map");
    map.remove(key).expect("an entry to remove");
}

fn set<V: aya::Pod>(map: &mut Map, index: u32, value: V) {
    let mut map: Array<_, V> = map.try_into().expect("an array");
    map.set(index, value, 0).expect("an index within the map");
}

/// Size and cost of a loaded program.
#[derive(Debug, PartialEq, Eq)]
pub struct Cost {
    /// Bytes after the kernel's rewriting.
    pub translated: u32,
    /// Instructions that the verifier walked through (Linux 5.16).
    pub verified: Option<u32>,
}

/// Loads every program of the object and tells what each costs; but not the
/// second form of the XDP program, which is the same code with a flag.
///
/// # Panics
/// If the kernel refuses one.
pub fn costs() -> BTreeMap<String, Cost> {
    let mut ebpf = load();
    ebpf.programs_mut()
        .filter(|(name, _)| *name != names::XDP_FRAGS)
        .map(|(name, program)| {
            load_program(program).unwrap_or_else(|error| panic!("{name}: {error:?}"));
            let info = program.info().expect("the kernel describes its programs");
            let cost = Cost {
                translated: info.size_translated().unwrap_or(0),
                verified: info.verified_instruction_count(),
            };
            (name.to_owned(), cost)
        })
        .collect()
}
