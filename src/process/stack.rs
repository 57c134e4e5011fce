//! [`Stack`]: the stack that a child runs on until `execve`. Unused stacks are kept for reuse.

use std::io;
use std::os::raw::c_void;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex};

use crate::lock::lock;

/// The size of a stack: many times what a child uses, as a test of `spawn` checks. It is a multiple of every page size of Linux.
pub(super) const SIZE: usize = 64 * 1024;

/// The size of the guard below each stack. A child that overflows its stack crashes in the guard, instead of overwriting other
/// memory.
const GUARD: usize = 64 * 1024;

/// The maximum number of unused stacks that are kept for reuse. Mapping a stack takes longer than all other steps of starting a
/// process.
const MOST_SPARE: usize = 64;

/// The maximum number of stacks with a guard. A stack with a guard uses two mappings, and the kernel's default limit is 65530
/// mappings per process.
const MOST_GUARDED: usize = 8192;

/// The unused stacks. Clones share one list.
#[derive(Debug, Clone, Default)]
pub(super) struct Stacks(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    spare: Vec<Memory>,
    /// The number of stacks with a guard, in use or spare.
    guarded: usize,
}

/// The stack of one child. It must not be dropped before the child has executed its program or ended.
#[derive(Debug)]
pub(super) struct Stack {
    memory: Option<Memory>,
    stacks: Stacks,
}

impl Stacks {
    /// Takes an unused stack, or maps a new one.
    pub(super) fn take(&self) -> io::Result<Stack> {
        let mut kept = lock(&self.0);
        let memory = match kept.spare.pop() {
            Some(memory) => memory,
            None => {
                let memory = Memory::map(kept.guarded < MOST_GUARDED)?;
                kept.guarded += usize::from(memory.is_guarded);
                memory
            }
        };
        Ok(Stack { memory: Some(memory), stacks: self.clone() })
    }
}

impl Stack {
    /// Returns the upper end of the stack, where a child begins because a stack grows downwards.
    pub(super) fn top(&self) -> *mut c_void {
        self.memory.as_ref().map_or(ptr::null_mut(), |memory| memory.start.as_ptr().wrapping_byte_add(GUARD + SIZE))
    }

    #[cfg(test)]
    pub(super) fn bottom(&self) -> *mut u8 {
        self.top().wrapping_byte_sub(SIZE).cast()
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        let mut kept = lock(&self.stacks.0);
        if kept.spare.len() < MOST_SPARE {
            kept.spare.push(memory);
        } else {
            kept.guarded -= usize::from(memory.is_guarded);
        }
    }
}

/// A mapping of a guard and a stack above it.
#[derive(Debug)]
struct Memory {
    start: NonNull<c_void>,
    is_guarded: bool,
}

// SAFETY: the mapping is valid in every thread, and no thread of this process accesses the memory behind it.
#[expect(unsafe_code, reason = "a pointer is not known to be that harmless")]
unsafe impl Send for Memory {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "a pointer is not known to be that harmless")]
unsafe impl Sync for Memory {}

#[expect(unsafe_code, reason = "safe code has no memory with a guard")]
impl Memory {
    fn map(is_guarded: bool) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses an address range that nothing else is mapped to.
        let start = unsafe { libc::mmap(ptr::null_mut(), GUARD + SIZE, access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = Self { start: NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?, is_guarded };
        // SAFETY: the range is the lower part of the mapping that has just been made.
        if is_guarded && unsafe { libc::mprotect(start, GUARD, libc::PROT_NONE) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(memory)
    }
}

#[expect(unsafe_code, reason = "see `map`")]
impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map`. A `Stack` is dropped only after its child has executed its program or ended, so
        // no process runs on the mapping.
        unsafe { libc::munmap(self.start.as_ptr(), GUARD + SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the bounds and the permissions of the mapping that contains `address`.
    fn mapping_of(address: usize) -> (usize, usize, String) {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let number = |text| usize::from_str_radix(text, 16).unwrap();
        let mut mappings = maps.lines().map(|line| {
            let (start, rest) = line.split_once('-').unwrap();
            let (end, rest) = rest.split_once(' ').unwrap();
            (number(start), number(end), rest[..4].to_owned())
        });
        mappings.find(|(start, end, _)| (*start..*end).contains(&address)).unwrap()
    }

    #[test]
    fn a_guard_below_each_stack_allows_no_access() {
        let stacks = Stacks::default();
        let taken: Vec<Stack> = (0..3).map(|_| stacks.take().unwrap()).collect();
        for stack in taken {
            let top = stack.top() as usize;
            let (start, _, access) = mapping_of(top - SIZE);
            assert_eq!((start, access.as_str()), (top - SIZE, "rw-p"));
            let (start, end, access) = mapping_of(top - SIZE - 1);
            assert!(start <= top - SIZE - GUARD && end == top - SIZE && access == "---p", "{access}");
        }
    }

    #[test]
    fn a_stack_is_reused_and_a_few_are_kept() {
        let stacks = Stacks::default();
        let top = stacks.take().unwrap().top();
        assert_eq!(stacks.take().unwrap().top(), top);
        drop((0..2 * MOST_SPARE).map(|_| stacks.take().unwrap()).collect::<Vec<_>>());
        let kept = lock(&stacks.0);
        assert_eq!((kept.spare.len(), kept.guarded), (MOST_SPARE, MOST_SPARE));
    }

    #[test]
    fn a_stack_beyond_the_limit_of_guards_has_none() {
        let stacks = Stacks::default();
        lock(&stacks.0).guarded = MOST_GUARDED;
        let stack = stacks.take().unwrap();
        assert_eq!(mapping_of(stack.top() as usize - SIZE - 1).2, "rw-p");
        assert_eq!(lock(&stacks.0).guarded, MOST_GUARDED);
    }
}
