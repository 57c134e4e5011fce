//! [`Stack`]: memory that a child runs on until it has become the program.

use std::io;
use std::os::raw::c_void;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, PoisonError};

/// Many times the memory that a child uses: see the test of `spawn`. A multiple of every page size of Linux.
pub(super) const SIZE: usize = 64 * 1024;

/// Memory below each stack that no process may touch: a child that needed more stack would end there, and change nothing.
const GUARD: usize = 64 * 1024;

/// How many stacks are kept for the next children. To map one takes longer than all else that this process does for a start.
const MOST_SPARE: usize = 64;

/// The stacks that no child uses; clones are of one list.
#[derive(Debug, Clone, Default)]
pub(super) struct Stacks(Arc<Mutex<Vec<Memory>>>);

/// A stack that no other child runs on. It must not be dropped before its child has left it.
#[derive(Debug)]
pub(super) struct Stack {
    memory: Option<Memory>,
    spare: Stacks,
}

impl Stacks {
    /// # Errors
    /// When the system has no memory for another one.
    pub(super) fn take(&self) -> io::Result<Stack> {
        let spare = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let memory = spare.map_or_else(Memory::map, Ok)?;
        Ok(Stack { memory: Some(memory), spare: self.clone() })
    }
}

impl Stack {
    /// The end of the memory: a stack grows downwards.
    pub(super) fn top(&self) -> *mut c_void {
        self.memory.as_ref().map_or(ptr::null_mut(), |memory| memory.0.as_ptr().wrapping_byte_add(GUARD + SIZE))
    }

    #[cfg(test)]
    pub(super) fn bottom(&self) -> *mut u8 {
        self.top().wrapping_byte_sub(SIZE).cast()
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        let mut spare = self.spare.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < MOST_SPARE {
            spare.extend(self.memory.take());
        }
    }
}

/// A mapping of a guard and a stack above it.
#[derive(Debug)]
struct Memory(NonNull<c_void>);

// SAFETY: the mapping is memory of the whole process, and this process does not touch it.
#[expect(unsafe_code, reason = "a pointer is not known to be that harmless")]
unsafe impl Send for Memory {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "a pointer is not known to be that harmless")]
unsafe impl Sync for Memory {}

#[expect(unsafe_code, reason = "safe code has no memory with a guard")]
impl Memory {
    fn map() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK;
        // SAFETY: the kernel chooses an address range that nothing else is mapped to.
        let start = unsafe { libc::mmap(ptr::null_mut(), GUARD + SIZE, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = Self(NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the range is the upper part of the mapping that has just been made.
        match unsafe { libc::mprotect(start.wrapping_byte_add(GUARD), SIZE, access) } {
            0 => Ok(memory),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[expect(unsafe_code, reason = "see `map`")]
impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map`, and its last user is gone: see `Stack`. Since a child that shares this memory
        // leaves it before it is the program or has ended, the kernel unmaps nothing that a process runs on.
        unsafe { libc::munmap(self.0.as_ptr(), GUARD + SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The permissions of the mapping that has this address, and its bounds, as the kernel shows them.
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
    fn below_each_stack_is_memory_that_no_process_may_touch() {
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
    fn a_stack_is_used_again_and_a_few_are_kept() {
        let stacks = Stacks::default();
        let top = stacks.take().unwrap().top();
        assert_eq!(stacks.take().unwrap().top(), top);
        drop((0..2 * MOST_SPARE).map(|_| stacks.take().unwrap()).collect::<Vec<_>>());
        assert_eq!(stacks.0.lock().unwrap().len(), MOST_SPARE);
    }
}
