//! [`Bench`]: the executables, the server and the handlers that all parts of the benchmark share.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use crate::Result;
use crate::contender::Contender;
use crate::plan::Plan;
use crate::server::Server;

pub(crate) struct Bench {
    /// The path of this executable, which also serves as the server, the compiled handlers, and every contender except
    /// zizq-worker and `xargs`.
    pub(crate) exe: String,
    pub(crate) server: Server,
    pub(crate) plan: Plan,
    dir: TempDir,
}

/// A command to run for each job.
#[derive(Debug, Clone)]
pub(crate) struct Handler {
    pub(crate) name: &'static str,
    pub(crate) command: Vec<String>,
    /// The number of jobs for a run of a second or two.
    pub(crate) jobs: usize,
}

impl Bench {
    pub(crate) fn prepare(plan: &Plan) -> Result<Self> {
        build_release()?;
        let exe = std::env::current_exe()?.to_string_lossy().into_owned();
        let server = Server::start(&exe)?;
        let dir = TempDir::with_prefix("zizq-worker-bench-")?;
        Ok(Self { exe, server, plan: plan.clone(), dir })
    }

    /// Returns `count`, or a tenth of it for `--quick`.
    pub(crate) fn scaled(&self, count: usize) -> usize {
        if self.plan.quick { count.div_ceil(10) } else { count }
    }

    pub(crate) fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// Returns this build of the worker, and the build that `--against` names, if any.
    pub(crate) fn workers(&self) -> Vec<Contender> {
        let this = Contender::Worker { name: "worker", path: env!("CARGO_BIN_EXE_zizq-worker").into(), options: &[] };
        let other = self.plan.against.iter().map(|path| Contender::Worker {
            name: "other build",
            path: path.into(),
            options: &[],
        });
        std::iter::once(this).chain(other).collect()
    }

    /// Returns the handlers of the throughput runs. Without Python, the Python handler is left out.
    pub(crate) fn handlers(&self) -> Result<Vec<Handler>> {
        let shell = self.script("line.sh", "#!/bin/sh\nread -r payload; echo \"${#payload} bytes\"\n")?;
        let mut handlers = vec![
            Handler { name: "/bin/true", command: vec!["/bin/true".to_owned()], jobs: self.scaled(2000) },
            Handler { name: "sh", command: vec![shell], jobs: self.scaled(1500) },
        ];
        match interpreter() {
            Some(python) => {
                // The script replaces an empty input with `0`, because xargs passes no payload.
                let text =
                    format!("#!{python}\nimport json, sys\njson.loads(sys.stdin.read() or '0')\nprint('done')\n");
                let command = vec![self.script("load.py", &text)?];
                handlers.push(Handler { name: "python", command, jobs: self.scaled(150) });
            }
            None => eprintln!("no python3 here: its runs are left out"),
        }
        Ok(handlers)
    }

    pub(crate) fn script(&self, name: &str, text: &str) -> Result<String> {
        let path: PathBuf = self.dir.path().join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path.to_string_lossy().into_owned())
    }
}

/// Builds the worker as it is shipped. The worker that `cargo bench` has built is replaced, because the dev-dependencies enable
/// additional features in dependencies of that worker.
fn build_release() -> Result<()> {
    let mut command = Command::new(std::env::var("CARGO").unwrap_or("cargo".to_owned()));
    // Remove the variables that Cargo sets for a benchmark. Otherwise the inner Cargo would rebuild some libraries.
    for name in std::env::vars().map(|(name, _)| name).filter(|name| name.starts_with("CARGO_")) {
        if name != "CARGO_HOME" && !name.starts_with("CARGO_TARGET") && !name.starts_with("CARGO_BUILD") {
            command.env_remove(name);
        }
    }
    let status = command.args(["build", "--release", "--bin", "zizq-worker"]).status()?;
    if status.success() { Ok(()) } else { Err("the worker cannot be built".into()) }
}

/// Returns the path of the real Python interpreter. The `python3` on the `PATH` may be a wrapper script, whose own cost
/// would be measured too.
pub(crate) fn interpreter() -> Option<String> {
    let output = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| path.trim().to_owned())
}
