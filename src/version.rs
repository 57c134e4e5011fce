//! The check that the server's version is compatible with the worker's. A worker is compatible with servers of the same major
//! version and an equal or higher minor version.

/// The version of this worker.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Returns a message that says why a server's version is incompatible, or `None` if the version is compatible or cannot be
/// parsed.
pub(crate) fn misfit(server: &str) -> Option<String> {
    misfit_between(VERSION, server)
}

fn misfit_between(worker: &str, server: &str) -> Option<String> {
    let ((major, minor), (server_major, server_minor)) = (major_minor(worker)?, major_minor(server)?);
    let problem = match server_major {
        _ if server_major != major => "its major version is another",
        _ if server_minor < minor => "it is older",
        _ => return None,
    };
    Some(format!(
        "the server is {server}, this worker is {worker}: {problem}; use a worker {server_major}.{server_minor}"
    ))
}

fn major_minor(version: &str) -> Option<(u64, u64)> {
    let mut numbers = version.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_of_the_same_major_and_no_older_minor_fits() {
        for server in ["0.6.0", "0.6.9", "0.7.0-rc.1", "0.10.2"] {
            assert_eq!(misfit_between("0.6.1", server), None, "{server}");
        }
    }

    #[test]
    fn a_server_of_another_major_or_an_older_minor_does_not_fit() {
        for (server, problem) in [("1.6.0", "another"), ("0.5.9", "older")] {
            let misfit = misfit_between("0.6.1", server).unwrap();
            assert!(misfit.contains(problem) && misfit.contains(server), "{misfit}");
        }
    }

    #[test]
    fn an_unparsable_version_is_not_judged() {
        for server in ["", "dev", "0", "v0.6"] {
            assert_eq!(misfit_between("0.6.1", server), None, "{server}");
        }
    }
}
