//! A handler that sends the time of its start to the benchmark. Such a time is called a stamp, and [`Stamps`] receives it. All
//! times are from the monotonic clock, which is the same for all processes.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::Result;

pub(crate) const ROLE: &str = "handler:stamp";

/// The time limit for receiving a stamp. No job takes this long to start, so a longer wait means that the job was lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// Returns the monotonic time.
pub(crate) fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

pub(crate) fn send(socket: &str, began: Duration) -> Result<()> {
    UnixDatagram::unbound()?.send_to(&began.as_nanos().to_le_bytes(), socket)?;
    Ok(())
}

/// The receiver of stamps.
pub(crate) struct Stamps {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Stamps {
    pub(crate) fn listen(dir: &Path) -> Result<Self> {
        let path = dir.join("stamps");
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket, path })
    }

    /// Returns the command of the handler that sends stamps.
    pub(crate) fn handler(&self, exe: &str) -> Vec<String> {
        vec![exe.to_owned(), ROLE.to_owned(), self.path()]
    }

    pub(crate) fn path(&self) -> String {
        self.path.to_string_lossy().into_owned()
    }

    /// Waits for the next stamp, and returns it.
    pub(crate) fn receive(&self) -> Result<Duration> {
        let mut bytes = [0; size_of::<u128>()];
        self.socket.recv(&mut bytes)?;
        Ok(Duration::from_nanos(u64::try_from(u128::from_le_bytes(bytes))?))
    }
}
