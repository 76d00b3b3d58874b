//! How much of the 512 bytes of stack a program's calls take together, as the
//! oldest of the kernels count that klb is for: each function's share in steps of
//! 32 bytes. Linux 6.18 counts in steps of 16 and takes what 6.1 refuses, so that
//! a test on it alone would not tell.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use aya_obj::{Object, generated::bpf_insn};

use crate::lookups::{CALL, MOVE, SUBPROGRAM};

/// What the stack of a function is rounded up to (`check_max_stack_depth` in the
/// kernel's `kernel/bpf/verifier.c`).
const STEP: usize = 32;

/// The frame pointer.
const FRAME: u8 = 10;

/// Classes of instructions, and the parts of their codes.
const CLASS: u8 = 0x07;
const LOAD_FROM: u8 = 0x01;
const STORE_NUMBER: u8 = 0x02;
const STORE: u8 = 0x03;
const ADD_NUMBER: u8 = 0x07;

/// The stack of each function of the deepest chain of calls, in bytes, by program.
///
/// # Panics
/// If it is no object.
pub fn deepest(object: &[u8]) -> BTreeMap<String, Vec<usize>> {
    let mut object = Object::parse(object).expect("an object");
    let text: HashSet<_> = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    object.relocate_calls(&text).expect("calls of subprograms");
    let chain = |name: &String| {
        let program = &object.programs[name];
        let code = &object.functions[&program.function_key()].instructions;
        Functions::of(code).deepest(0)
    };
    object
        .programs
        .keys()
        .map(|name| (name.clone(), chain(name)))
        .collect()
}

/// A program and the functions behind it.
struct Functions<'a> {
    code: &'a [bpf_insn],
    starts: BTreeSet<usize>,
}

impl<'a> Functions<'a> {
    fn of(code: &'a [bpf_insn]) -> Self {
        let calls = (0..code.len()).filter_map(|at| called(code, at));
        let starts = [0].into_iter().chain(calls).collect();
        Self { code, starts }
    }

    /// Of a function and the deepest of those that it calls.
    fn deepest(&self, start: usize) -> Vec<usize> {
        let end = self.starts.range(start + 1..).next();
        let own = start..end.copied().unwrap_or(self.code.len());
        let calls: BTreeSet<_> = own.clone().filter_map(|at| called(self.code, at)).collect();
        let frame = frame(&self.code[own]).next_multiple_of(STEP);
        let chains = calls.into_iter().map(|callee| self.deepest(callee));
        let deepest = chains.max_by_key(|chain| chain.iter().sum::<usize>());
        [frame]
            .into_iter()
            .chain(deepest.unwrap_or_default())
            .collect()
    }
}

/// The function that an instruction calls.
fn called(code: &[bpf_insn], at: usize) -> Option<usize> {
    let instruction = code[at];
    let is_call = instruction.code == CALL && instruction.src_reg() == SUBPROGRAM;
    is_call.then(|| at.wrapping_add_signed(instruction.imm as isize + 1))
}

/// How far below the frame pointer a function reaches, at least one byte.
fn frame(code: &[bpf_insn]) -> usize {
    let mut lowest = -1;
    for (at, instruction) in code.iter().enumerate() {
        let (to, from) = (instruction.dst_reg(), instruction.src_reg());
        let offset = match instruction.code & CLASS {
            LOAD_FROM if from == FRAME => i32::from(instruction.off),
            STORE | STORE_NUMBER if to == FRAME => i32::from(instruction.off),
            _ if instruction.code == MOVE && from == FRAME => match code.get(at + 1) {
                Some(next) if next.code == ADD_NUMBER && next.dst_reg() == to => next.imm,
                _ => 0,
            },
            _ => 0,
        };
        lowest = lowest.min(offset);
    }
    lowest.unsigned_abs() as usize
}
