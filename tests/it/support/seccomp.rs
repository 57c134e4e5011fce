//! A sandbox for a command: a seccomp filter that refuses system calls. The command's child processes inherit the filter.

#![expect(unsafe_code, reason = "no safe wrapper installs a filter, and it has to be done between fork and exec")]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::Errno;

/// A system call that the sandbox refuses with an errno.
#[derive(Debug, Clone, Copy)]
pub struct Refused {
    pub call: libc::c_long,
    /// Bits of the first argument. The call is refused only if at least one of these bits is set. 0 means no condition.
    pub with: libc::c_int,
    /// Bits of the first argument. The call is refused only if none of these bits is set.
    pub without: libc::c_int,
    pub errno: Errno,
}

impl Refused {
    /// Returns a rule that refuses a call whatever its arguments.
    pub fn call(call: libc::c_long, errno: Errno) -> Self {
        Self { call, with: 0, without: 0, errno }
    }

    /// Returns a rule that refuses each `clone` that has one of these flags and starts a process. Threads can still be started.
    pub fn clone(flags: libc::c_int, errno: Errno) -> Self {
        Self { call: libc::SYS_clone, with: flags, without: libc::CLONE_THREAD, errno }
    }

    /// Returns the filter instructions for this rule. The instructions compare the call's number, and then its first argument.
    fn filter(self) -> Vec<libc::sock_filter> {
        let load = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
        let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        let any = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
        let answer = (libc::BPF_RET | libc::BPF_K) as u16;
        let line = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
        let (number, first_argument) = (0, 16);
        let with = if self.with == 0 { line(any, 0, 0, 0) } else { line(any, self.with.cast_unsigned(), 0, 2) };
        let errno = libc::SECCOMP_RET_ERRNO | self.errno.raw_os_error().cast_unsigned();
        vec![
            line(load, number, 0, 0),
            line(equal, self.call.try_into().unwrap(), 0, 4),
            line(load, first_argument, 0, 0),
            with,
            line(any, self.without.cast_unsigned(), 1, 0),
            line(answer, errno, 0, 0),
        ]
    }
}

/// Makes the command start in a sandbox that refuses these calls.
pub fn refuse(command: &mut Command, refused: &[Refused]) {
    let mut filter: Vec<libc::sock_filter> = refused.iter().flat_map(|refused| refused.filter()).collect();
    let code = (libc::BPF_RET | libc::BPF_K) as u16;
    filter.push(libc::sock_filter { code, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW });
    let install = move || {
        let program = libc::sock_fprog { len: filter.len().try_into().unwrap(), filter: filter.as_ptr().cast_mut() };
        let installed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
        };
        if installed { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    unsafe { command.pre_exec(install) };
}
