//! A file system that hangs, like a network file system whose server is unreachable.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A file system on which every access blocks until the accessing process is killed. Unmounted on drop.
pub struct HungFileSystem {
    mount_point: PathBuf,
    /// The FUSE device. The test never reads the kernel's requests from the device, so that they are never answered.
    _device: File,
}

impl HungFileSystem {
    /// Mounts the file system over a directory. Prints a message and returns `None` if this process may not mount file systems.
    pub fn mount(at: &Path) -> Option<Self> {
        let mounted = File::options().read(true).write(true).open("/dev/fuse").and_then(|device| {
            let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
            mount("hung", at, "fuse", MountFlags::empty(), &*CString::new(options).unwrap())?;
            Ok(Self { mount_point: at.to_owned(), _device: device })
        });
        mounted.inspect_err(|error| println!("skipped: no file system can be mounted here: {error}")).ok()
    }
}

impl Drop for HungFileSystem {
    fn drop(&mut self) {
        let _ = unmount(&self.mount_point, UnmountFlags::DETACH);
    }
}
