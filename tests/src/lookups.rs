//! How many lookups a packet or a call of a socket costs: the programs of the object,
//! with every lookup in a map counted.
//!
//! Each call of `bpf_map_lookup_elem` is replaced by a call of a subprogram
//! that counts and then does it. One instruction stands for one instruction, so
//! no jump changes, and what is measured is the object that is shipped. (The
//! kernel's own functions for this cannot be probed everywhere.)

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::CStr,
    fs::File,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
};

use aya::maps::{Map, MapData};
use aya_obj::{Object, generated::bpf_insn};
use lb_common::{Hook, names};

use crate::{
    cgroup::Cgroup,
    program::{Datapath, again_if_given_up, object},
    syscall::{bpf, open, test_run},
};

/// `bpf_map_lookup_elem` (`linux/bpf.h`).
const LOOKUP: i32 = 1;

/// Operation codes (`linux/bpf_common.h`, `linux/bpf.h`).
pub(crate) const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
pub(crate) const MOVE: u8 = 0xbf;
const MOVE_NUMBER: u8 = 0xb7;
const LOAD_NUMBER: u8 = 0x18;
const ATOMIC_ADD: u8 = 0xdb;

/// What the source register of a [`LOAD_NUMBER`] or a [`CALL`] means.
const MAP: u8 = 1;
const MAP_VALUE: u8 = 2;
pub(crate) const SUBPROGRAM: u8 = 1;

/// Commands of bpf(2), and kinds of maps and programs.
const MAP_CREATE: i32 = 0;
const MAP_LOOKUP: i32 = 1;
const MAP_UPDATE: i32 = 2;
const PROG_LOAD: i32 = 5;
const PROG_ATTACH: i32 = 8;
const ARRAY: u32 = 2;
const SCHED_CLS: u32 = 3;
const XDP: u32 = 6;
const CGROUP_SOCK_ADDR: u32 = 18;

/// Ways to be attached.
const INET4_CONNECT: u32 = 10;
const INET6_CONNECT: u32 = 11;
const UDP4_SENDMSG: u32 = 14;
const UDP6_SENDMSG: u32 = 15;
const UDP4_RECVMSG: u32 = 19;
const UDP6_RECVMSG: u32 = 20;

/// More than there are maps.
const COUNTERS: usize = 64;

/// An instruction (`struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    number: i32,
}

impl Instruction {
    const fn new(code: u8, destination: u8, source: u8, number: i32) -> Self {
        Self {
            code,
            registers: destination | source << 4,
            offset: 0,
            number,
        }
    }

    const fn destination(self) -> u8 {
        self.registers & 15
    }

    const fn source(self) -> u8 {
        self.registers >> 4
    }

    const fn is_lookup(self) -> bool {
        self.code == CALL && self.source() == 0 && self.number == LOOKUP
    }
}

impl From<&bpf_insn> for Instruction {
    fn from(raw: &bpf_insn) -> Self {
        Self {
            code: raw.code,
            registers: raw.dst_reg() | raw.src_reg() << 4,
            offset: raw.off,
            number: raw.imm,
        }
    }
}

/// Programs once more, on the maps of a [`Datapath`].
pub struct Counting {
    programs: BTreeMap<&'static str, OwnedFd>,
    counters: OwnedFd,
    /// The maps that count, by the number of their counter: all but arrays,
    /// whose lookups the kernel compiles into an address.
    maps: Vec<String>,
}

/// Lookups by map.
pub type Counts<'a> = BTreeMap<&'a str, u64>;

/// Name, type and how it is to be attached.
const PROGRAMS: [(&str, u32, u32); 9] = [
    (names::XDP, XDP, 0),
    (names::TC_INGRESS, SCHED_CLS, 0),
    (names::TC_EGRESS, SCHED_CLS, 0),
    (names::CONNECT4, CGROUP_SOCK_ADDR, INET4_CONNECT),
    (names::CONNECT6, CGROUP_SOCK_ADDR, INET6_CONNECT),
    (names::SENDMSG4, CGROUP_SOCK_ADDR, UDP4_SENDMSG),
    (names::SENDMSG6, CGROUP_SOCK_ADDR, UDP6_SENDMSG),
    (names::RECVMSG4, CGROUP_SOCK_ADDR, UDP4_RECVMSG),
    (names::RECVMSG6, CGROUP_SOCK_ADDR, UDP6_RECVMSG),
];

impl Counting {
    /// # Panics
    /// If the kernel refuses a program, or if it cannot be told what a lookup
    /// looks into.
    pub fn new(datapath: &Datapath) -> Self {
        let maps: Vec<_> = datapath.maps().collect();
        let counted = maps.iter().filter(|(_, map)| !is_array(map));
        let counted: Vec<_> = counted.map(|(name, map)| (*name, raw(map))).collect();
        let counters = create_counters();
        let mut object = linked_object(&maps);
        let programs = PROGRAMS.map(|(name, kind, attach)| {
            let program = object.programs.remove(name).expect("in the object");
            let function = &object.functions[&program.function_key()];
            let mut code: Vec<_> = function.instructions.iter().map(Into::into).collect();
            count_lookups(&mut code, &counted, counters.as_raw_fd());
            (name, load(name, (kind, attach), &code, &program.license))
        });
        Self {
            programs: programs.into(),
            counters,
            maps: counted.iter().map(|(name, _)| (*name).to_owned()).collect(),
        }
    }

    /// Runs a packet through a hook; returns what came out, and how often it
    /// was looked into which map.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn run(&self, hook: Hook, frame: &[u8]) -> (Vec<u8>, Counts<'_>) {
        let name = match hook {
            Hook::Xdp => names::XDP,
            Hook::TcIngress => names::TC_INGRESS,
            Hook::TcEgress => names::TC_EGRESS,
            Hook::Socket => panic!("the kernel has no test run for sockets"),
        };
        let program = &self.programs[name];
        self.count(|| test_run(program, frame, 0).expect("a test run"))
    }

    /// How often it is looked into which map meanwhile.
    pub fn count<T>(&self, work: impl FnOnce() -> T) -> (T, Counts<'_>) {
        self.transfer(MAP_UPDATE, &mut [0; COUNTERS]);
        let result = work();
        let mut counts = [0; COUNTERS];
        self.transfer(MAP_LOOKUP, &mut counts);
        let counts = self.maps.iter().map(String::as_str).zip(counts);
        (result, counts.filter(|(_, count)| *count > 0).collect())
    }

    /// Has sockets of a group's processes meet these programs, as long as the group
    /// is there.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn attach_sockets(&self, group: &Cgroup) {
        #[repr(C)]
        struct Attributes {
            target: u32,
            program: u32,
            kind: u32,
            flags: u32,
        }
        let target = File::open(group.path()).expect("the group");
        for (name, _, kind) in PROGRAMS.iter().filter(|(_, _, kind)| *kind != 0) {
            let mut attributes = Attributes {
                target: target.as_raw_fd().cast_unsigned(),
                program: self.programs[name].as_raw_fd().cast_unsigned(),
                kind: *kind,
                flags: 0,
            };
            // SAFETY: there are no addresses in it.
            unsafe { bpf(PROG_ATTACH, &mut attributes) }
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }

    /// Reads or writes all counters.
    fn transfer(&self, command: i32, counts: &mut [u64; COUNTERS]) {
        #[repr(C)]
        struct Attributes {
            map: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        let key = 0_u32;
        let mut attributes = Attributes {
            map: self.counters.as_raw_fd().cast_unsigned(),
            key: &raw const key as u64,
            value: counts.as_mut_ptr() as u64,
            flags: 0,
        };
        // SAFETY: key and value live through the call and are as large as the
        // map's.
        unsafe { bpf(command, &mut attributes) }.expect("the counters");
    }
}

fn data(map: &Map) -> &MapData {
    match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LpmTrie(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::RingBuf(data) => data,
        other => panic!("no program has a map such as {other:?}"),
    }
}

fn raw(map: &Map) -> RawFd {
    data(map).fd().as_fd().as_raw_fd()
}

const fn is_array(map: &Map) -> bool {
    matches!(map, Map::Array(_) | Map::PerCpuArray(_))
}

/// The object with the file descriptors of its maps, and with the subprograms
/// behind each program: what aya does before it loads.
fn linked_object(maps: &[(&str, &Map)]) -> Object {
    let mut object = Object::parse(&object()).expect("the object");
    let descriptors: HashMap<_, _> = maps.iter().map(|(name, map)| (*name, raw(map))).collect();
    let in_object: Vec<_> = object.maps.drain().collect();
    let text: HashSet<_> = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    let known = in_object.iter().map(|(name, map)| {
        let descriptor = descriptors.get(name.as_str());
        let descriptor = descriptor.unwrap_or_else(|| panic!("no map {name} was loaded"));
        (name.as_str(), *descriptor, map)
    });
    object
        .relocate_maps(known, &text)
        .expect("references to maps");
    object.relocate_calls(&text).expect("calls of subprograms");
    object
}

/// Lets every lookup in one of the maps count, in the counter of its number.
fn count_lookups(code: &mut Vec<Instruction>, maps: &[(&str, RawFd)], counters: RawFd) {
    let calls: Vec<_> = (0..code.len()).filter(|&at| code[at].is_lookup()).collect();
    let looked_into = calls.iter().map(|&at| (at, map_of(code, at)));
    let mut calls_of = BTreeMap::<usize, Vec<usize>>::new();
    for (at, descriptor) in looked_into {
        if let Some(number) = maps.iter().position(|(_, known)| *known == descriptor) {
            calls_of.entry(number).or_default().push(at);
        }
    }
    for (number, calls) in calls_of {
        let begin = code.len();
        code.extend(subprogram(counters, number));
        for at in calls {
            // Relative to the instruction behind the call.
            let distance = i32::try_from(begin - at - 1).expect("a short program");
            code[at] = Instruction::new(CALL, 0, SUBPROGRAM, distance);
        }
    }
}

/// Which map the lookup at `call` looks into: what was last put into its first
/// argument.
fn map_of(code: &[Instruction], call: usize) -> RawFd {
    let mut register = 1;
    for at in (0..call).rev() {
        let instruction = code[at];
        if instruction.code == EXIT {
            break;
        }
        if instruction.destination() != register {
            continue;
        }
        match instruction.code {
            LOAD_NUMBER if instruction.source() == MAP => return instruction.number,
            MOVE => register = instruction.source(),
            _ => {}
        }
    }
    panic!("instruction {call} looks into an unknown map");
}

/// Counts, then looks up.
fn subprogram(counters: RawFd, number: usize) -> [Instruction; 10] {
    let offset = i32::try_from(number * size_of::<u64>()).expect("few maps");
    [
        Instruction::new(MOVE, 6, 1, 0),
        Instruction::new(MOVE, 7, 2, 0),
        Instruction::new(LOAD_NUMBER, 1, MAP_VALUE, counters),
        Instruction::new(0, 0, 0, offset),
        Instruction::new(MOVE_NUMBER, 2, 0, 1),
        Instruction::new(ATOMIC_ADD, 1, 2, 0),
        Instruction::new(MOVE, 1, 6, 0),
        Instruction::new(MOVE, 2, 7, 0),
        Instruction::new(CALL, 0, 0, LOOKUP),
        Instruction::new(EXIT, 0, 0, 0),
    ]
}

/// An array with one entry that holds all counters: that is the form whose
/// address may stand in a program.
fn create_counters() -> OwnedFd {
    #[repr(C)]
    struct Attributes {
        kind: u32,
        key_size: u32,
        value_size: u32,
        entries: u32,
    }
    let mut attributes = Attributes {
        kind: ARRAY,
        key_size: 4,
        value_size: size_of::<[u64; COUNTERS]>() as u32,
        entries: 1,
    };
    // SAFETY: there are no addresses in it.
    unsafe { open(MAP_CREATE, &mut attributes) }.expect("a map of counters")
}

fn load(name: &str, (kind, attach): (u32, u32), code: &[Instruction], license: &CStr) -> OwnedFd {
    #[repr(C)]
    struct Attributes {
        kind: u32,
        count: u32,
        code: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel: u32,
        flags: u32,
        name: [u8; 16],
        device: u32,
        attach: u32,
    }
    let mut log = vec![0_u8; 1 << 20];
    let mut attributes = Attributes {
        kind,
        count: u32::try_from(code.len()).expect("a short program"),
        code: code.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel: 0,
        flags: 0,
        name: [0; 16],
        device: 0,
        attach,
    };
    // SAFETY: code and license live through the call.
    let load = || unsafe { open(PROG_LOAD, &mut attributes) };
    if let Ok(program) = again_if_given_up(load, |error| Some(error)) {
        return program;
    }
    (attributes.log_level, attributes.log_size) = (1, 1 << 20);
    attributes.log = log.as_mut_ptr() as u64;
    // SAFETY: as above, and so does the log, which is as long as it says.
    let error = match unsafe { open(PROG_LOAD, &mut attributes) } {
        Ok(program) => return program,
        Err(error) => error,
    };
    let text = CStr::from_bytes_until_nul(&log)
        .unwrap_or_default()
        .to_string_lossy();
    let end: Vec<_> = text.lines().rev().take(30).collect();
    panic!("{name}, counting: {error}; the verifier's last lines first: {end:#?}");
}
