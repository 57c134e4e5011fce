//! [`CStrings`]: a list of strings in the form that `execve` takes.

use std::io;
use std::os::raw::c_char;
use std::ptr;
use std::sync::Arc;

/// A list of pointers to strings. Each string ends with a zero byte, and the list ends with a null pointer.
#[derive(Debug)]
pub(super) struct CStrings {
    list: Vec<*const c_char>,
    _bytes: Vec<u8>,
    _before: Option<Arc<CStrings>>,
}

// SAFETY: a `CStrings` owns or shares the memory behind its pointers, and that memory is never written to.
#[expect(unsafe_code, reason = "a pointer is not known to be that harmless")]
unsafe impl Send for CStrings {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "a pointer is not known to be that harmless")]
unsafe impl Sync for CStrings {}

impl CStrings {
    /// Returns a pointer to the list, which is valid as long as `self` lives.
    pub(super) fn as_ptr(&self) -> *const *const c_char {
        self.list.as_ptr()
    }

    fn strings(&self) -> &[*const c_char] {
        self.list.split_last().map_or(&[], |(_, strings)| strings)
    }
}

/// A list of strings under construction, in one buffer.
#[derive(Debug, Default)]
pub(super) struct Strings {
    bytes: Vec<u8>,
    starts: Vec<usize>,
}

impl Strings {
    /// Returns an empty list with capacity for `strings` strings of `bytes` bytes in total, including the zero byte at the end of
    /// each.
    pub(super) fn with_capacity(strings: usize, bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), starts: Vec::with_capacity(strings) }
    }

    /// Adds the concatenation of `pieces` as one string.
    pub(super) fn push(&mut self, pieces: &[&[u8]]) {
        self.starts.push(self.bytes.len());
        pieces.iter().for_each(|piece| self.bytes.extend_from_slice(piece));
        self.bytes.push(0);
    }

    /// Returns the finished list, preceded by the strings of `before`.
    ///
    /// # Errors
    /// When a string contains a zero byte.
    pub(super) fn into_c(self, before: Option<Arc<CStrings>>) -> io::Result<CStrings> {
        let Self { bytes, starts } = self;
        if memchr::memchr_iter(0, &bytes).count() != starts.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a zero byte in an argument or a variable"));
        }
        let first: *const c_char = bytes.as_ptr().cast();
        let there = before.as_deref().map_or(&[][..], CStrings::strings);
        let mut list = Vec::with_capacity(there.len() + starts.len() + 1);
        list.extend_from_slice(there);
        list.extend(starts.iter().map(|start| first.wrapping_add(*start)));
        list.push(ptr::null());
        Ok(CStrings { list, _bytes: bytes, _before: before })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(unsafe_code, reason = "only the system reads these")]
    fn each_string_and_the_end_of_the_list_are_found() {
        let strings = {
            let (mut before, mut after) = (Strings::default(), Strings::default());
            before.push(&[b"A", b"=", b"1"]);
            before.push(&[b""]);
            after.push(&[b"B"]);
            after.into_c(Some(Arc::new(before.into_c(None).unwrap()))).unwrap()
        };
        // SAFETY: there are three strings and a null pointer.
        let (texts, end) = unsafe {
            let list = std::slice::from_raw_parts(strings.as_ptr(), 4);
            ([0, 1, 2].map(|place| std::ffi::CStr::from_ptr(list[place])), list[3])
        };
        assert_eq!(texts, [c"A=1", c"", c"B"]);
        assert!(end.is_null());
    }

    #[test]
    fn a_zero_byte_is_invalid_input_without_an_errno() {
        let mut strings = Strings::default();
        strings.push(&[b"A", b"=", b"b\0c"]);
        assert_eq!(strings.into_c(None).err().unwrap().kind(), io::ErrorKind::InvalidInput);
    }
}
