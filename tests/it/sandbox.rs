//! Systems and sandboxes that refuse the usual way to start a process.

use rustix::io::Errno;
use serde_json::json;

use crate::support::{Daemon, Finished, Refused, Server, jobs};

/// The log message of a worker that cannot start processes in the usual way.
const SLOW: &str = "processes are started in a slower way, the system refuses the usual one";

fn no_shared_memory() -> Refused {
    Refused::clone(libc::CLONE_VM, Errno::INVAL)
}

/// Runs jobs that succeed, fail, time out, have a large payload, or cannot be started, and checks each outcome.
fn run_all_kinds(server: &Server, daemon: Daemon) -> Finished {
    let handlers = "[handlers.plain]\nexec = 'true'\n[handlers.large]\nexec = '/usr/bin/wc -c'\n[handlers.slow]
exec = 'sleep 600'\ntimeout = '1s'\n[handlers.fails]\nexec = 'false'\n[handlers.broken]\nexec = '$DIR/broken.sh'";
    let broken = daemon.script("broken.sh", "true");
    let running = daemon.threads(4).handlers(handlers).start();
    running.wait_for_message("connected, listening for jobs");
    std::fs::write(broken, "#!/no/such/shell\n").unwrap();
    let enqueue = |job_type: &str, payload| server.enqueue("q", job_type, payload);
    let ends = ["slow", "fails", "broken"].map(|job_type| enqueue(job_type, json!(null)));
    let plain = (0..100).map(|_| enqueue("plain", json!(null)));
    let large = enqueue("large", json!("x".repeat(300_000)));
    plain.chain([large]).for_each(|id| server.wait_until_done(&id));
    let errors = ends.map(|id| server.wait_for_error(&id, 1));
    let types = errors.each_ref().map(|error| error["error_type"].as_str().unwrap());
    assert_eq!(types, ["Timeout", "ExitStatus", "SpawnError"]);
    assert!(errors[2]["message"].as_str().unwrap().contains("broken.sh could not be started: No such file"));
    let finished = running.stop();
    assert!(finished.events().iter().any(|event| event["line"] == "300002"));
    finished
}

#[test]
fn jobs_run_where_no_child_may_share_memory() {
    let server = Server::start();
    let finished = run_all_kinds(&server, Daemon::of(&server).in_sandbox([no_shared_memory()]));
    let warning = finished.event(SLOW);
    assert_eq!((&warning["level"], &warning["error"]), (&json!("WARN"), &json!("Invalid argument (os error 22)")));
}

#[test]
fn jobs_run_where_there_are_no_pidfds() {
    let server = Server::start();
    let refused = [
        Refused::clone(libc::CLONE_PIDFD | libc::CLONE_VM, Errno::INVAL),
        Refused::call(libc::SYS_pidfd_open, Errno::NOSYS),
    ];
    assert!(run_all_kinds(&server, Daemon::of(&server).in_sandbox(refused)).has(SLOW));
}

/// The C source of a replacement for `clone`. Like an old kernel, the replacement ignores CLONE_PIDFD.
const NO_PIDFD: &str = r#"#define _GNU_SOURCE
#include <dlfcn.h>
int clone(int (*run)(void *), void *stack, int flags, void *argument, int *pidfd) {
    int (*clone)(int (*)(void *), void *, int, void *, ...) = dlsym(RTLD_NEXT, "clone");
    return clone(run, stack, flags & ~0x1000, argument, 0);
}"#;

#[test]
#[cfg_attr(target_env = "musl", ignore = "no library is loaded before a static binary")]
fn jobs_run_where_a_start_yields_no_pidfd() {
    let server = Server::start();
    let finished = run_all_kinds(&server, Daemon::of(&server).preload(NO_PIDFD));
    assert_eq!(finished.event(SLOW)["error"], "the kernel gives no pidfd");
}

#[test]
fn a_drain_signal_is_heard_where_no_child_may_share_memory() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let script = "trap 'echo >> $DIR/told; exit 0' USR1; echo >> $DIR/started; while :; do sleep 0.01; done";
    let daemon = Daemon::of(&server).handler(script, "drain_signal = 'USR1'").in_sandbox([no_shared_memory()]);
    let running = daemon.start();
    running.wait_for_lines(1, "started");
    assert_eq!(running.stop().read("told"), "\n");
    server.wait_until_done(&id);
}

#[test]
fn a_check_says_which_way_processes_are_started() {
    let check = |refused: &[Refused]| {
        let daemon = Daemon::bare().args(["--embedded", "--check", "--", "true"]);
        match refused {
            [] => daemon.run(),
            [one, ..] => daemon.in_sandbox([*one]).run(),
        }
    };
    let finished = check(&[]).assert_exit(0);
    assert!(finished.stdout.contains("\nprocesses: can be started\n"), "{}", finished.stdout);
    let finished = check(&[no_shared_memory()]).assert_exit(0);
    let warning = format!("\nwarning: {SLOW}: Invalid argument (os error 22)\n");
    assert!(finished.stdout.contains(&warning), "{}", finished.stdout);
    let no_process = Refused { with: 0, ..Refused::clone(0, Errno::PERM) };
    let finished = check(&[no_process]).assert_exit(1);
    assert_eq!(finished.log, ["zizq-worker: no process can be started here: Operation not permitted (os error 1)"]);
}

#[test]
fn a_machine_that_starts_no_process_fails_few_jobs() {
    let server = Server::start();
    let ids = server.enqueue_all(jobs(300));
    let no_process = Refused { with: 0, ..Refused::clone(0, Errno::PERM) };
    let running = Daemon::of(&server).threads(4).args(["--", "true"]).in_sandbox([no_process]).start();
    running.wait_for_message("handler cannot be started, its jobs are slowed down");
    // The first job fails at once, the second a second later, and the third two seconds after that.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let finished = running.stop();
    assert!((1..=3).contains(&finished.all("job failed").len()), "{:?}", finished.log);
    assert!(finished.has("no process can be started here"));
    assert_eq!(server.count("ready,scheduled"), ids.len() as u64);
}

#[test]
fn no_file_is_left_open_where_close_range_is_unknown() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let daemon = Daemon::of(&server).sh("exec ls -l /proc/self/fd > $DIR/open").after("exec 9</dev/null");
    let running = daemon.in_sandbox([Refused::call(libc::SYS_close_range, Errno::NOSYS)]).start();
    server.wait_until_done(&id);
    let open = running.stop().read("open");
    assert_eq!(open.lines().filter(|line| line.contains("->")).count(), 4, "{open}");
}

/// The C source of a replacement for `epoll_ctl`. The replacement refuses pidfds.
const NO_ROOM_IN_EPOLL: &str = r#"#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>
int epoll_ctl(int set, int operation, int file, struct epoll_event *event) {
    char path[64], target[256] = {0};
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    if (readlink(path, target, sizeof target - 1) > 0 && strstr(target, "pidfd")) {
        errno = ENOSPC;
        return -1;
    }
    int (*epoll_ctl)(int, int, int, struct epoll_event *) = dlsym(RTLD_NEXT, "epoll_ctl");
    return epoll_ctl(set, operation, file, event);
}"#;

#[test]
#[cfg_attr(target_env = "musl", ignore = "no library is loaded before a static binary")]
fn a_pidfd_that_the_reactor_does_not_take_ends_no_job() {
    let server = Server::start();
    assert!(!run_all_kinds(&server, Daemon::of(&server).preload(NO_ROOM_IN_EPOLL)).has(SLOW));
}
