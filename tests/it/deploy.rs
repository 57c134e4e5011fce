//! The files for systemd, containers and releases are consistent with each other and with the worker.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;
use zizq_worker::Config;
use zizq_worker::cli::Args;
use zizq_worker::config::DEFAULT_SHUTDOWN_DEADLINE;
use zizq_worker::handler::{DEFAULT_KILL_GRACE, Handler};

use crate::support::{Daemon, Server, unused_address};

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn text(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap()
}

/// Returns the documents of a YAML file.
fn yaml(name: &str) -> Vec<Value> {
    serde_yaml_ng::Deserializer::from_str(&text(name)).map(|document| Value::deserialize(document).unwrap()).collect()
}

/// Resolves a configuration, with `/bin/true` in place of `/handler`, which exists only in the image.
fn load(toml: &str) -> Config {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("zizq-worker.toml");
    assert!(toml.contains(r#"exec = ["/handler"]"#), "{toml}");
    fs::write(&file, toml.replace("/handler", "/bin/true")).unwrap();
    let argv = ["zizq-worker", "--config", file.to_str().unwrap()].map(OsString::from);
    Config::resolve(&Args::try_parse_from(argv).unwrap()).unwrap()
}

/// The systemd unit for one worker, and the template unit for several.
const UNITS: [&str; 2] = ["config/zizq-worker.service", "config/zizq-worker@.service"];

/// Returns the keys and the values of a unit's `key=value` lines, except those that are commented out.
fn settings_of(unit: &str) -> Vec<(String, String)> {
    let text = text(unit);
    let settings = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('='));
    settings.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

fn unit_settings() -> Vec<(String, String)> {
    settings_of(UNITS[0])
}

#[track_caller]
fn unit_setting(key: &str) -> String {
    let mut found = unit_settings().into_iter().filter(|(name, _)| name == key);
    let (_, value) = found.next().unwrap_or_else(|| panic!("no {key}= in the unit"));
    assert_eq!(found.next(), None, "{key}= twice in the unit");
    value
}

#[test]
fn systemd_accepts_the_units() {
    for (unit, name) in UNITS.into_iter().zip(["zizq-worker.service", "zizq-worker@mail.service"]) {
        let dir = TempDir::new().unwrap();
        // systemd-analyze also checks that the program exists, so use the one that is built here. --man=no skips the check of the
        // manual page.
        let installed = text(unit).replace("=/usr/bin/zizq-worker", concat!("=", env!("CARGO_BIN_EXE_zizq-worker")));
        assert!(installed.contains(env!("CARGO_BIN_EXE_zizq-worker")));
        let path = dir.path().join(name);
        fs::write(&path, installed).unwrap();
        let verify = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output();
        let Ok(verdict) = verify else {
            assert!(std::env::var_os("CI").is_none(), "systemd-analyze is needed: apt-get install systemd");
            eprintln!("left out: it needs systemd-analyze");
            return;
        };
        let complaints = String::from_utf8_lossy(&verdict.stderr);
        let ours: Vec<&str> = complaints.lines().filter(|line| line.contains("zizq-worker")).collect();
        assert!(verdict.status.success() && ours.is_empty(), "{unit}: {}\n{complaints}", verdict.status);
    }
}

#[test]
fn the_unit_for_several_workers_differs_in_its_files_alone() {
    let [one, several] = UNITS.map(settings_of);
    let file = |(key, value): (String, String)| {
        (key, value.replace("/etc/zizq-worker/%i.toml", "/etc/zizq-worker.toml").replace("worker %i:", "worker:"))
    };
    let (environment, rest): (Vec<_>, Vec<_>) = several.into_iter().partition(|(key, _)| key == "EnvironmentFile");
    assert_eq!(environment, [("EnvironmentFile".to_owned(), "-/etc/zizq-worker/%i.env".to_owned())]);
    assert_eq!(rest.into_iter().map(file).collect::<Vec<_>>(), one);
}

/// Runs the first `ExecReload` command of the unit, with `file` in place of `/etc/zizq-worker.toml`. Returns the exit status,
/// stdout and stderr.
fn check_before_reload(file: &Path, admin: &str) -> (i32, String, String) {
    let commands: Vec<String> =
        unit_settings().into_iter().filter(|(key, _)| key == "ExecReload").map(|(_, value)| value).collect();
    let [check, signal] = &commands[..] else { panic!("{commands:?}") };
    assert_eq!(signal, "/bin/kill -HUP $MAINPID");
    let words = shlex::split(check).unwrap();
    let script = words[2].replace("/usr/bin/zizq-worker", env!("CARGO_BIN_EXE_zizq-worker"));
    let script = script.replace("/etc/zizq-worker.toml", file.to_str().unwrap());
    let ended = Command::new(&words[0]).args([&words[1], &script]).env("ZIZQ_ADMIN_LISTEN", admin).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (ended.status.code().unwrap(), text(ended.stdout), text(ended.stderr))
}

#[test]
fn a_reload_with_a_mistake_fails_before_the_signal() {
    let server = Server::start();
    let address = unused_address().to_string();
    let running = Daemon::of(&server).args(["--admin-listen", &address]).config("[handler]\nexec = ['true']").start();
    running.wait_for_message("admin server listening");
    let file = running.dir().join("zizq-worker.toml");
    // The check passes although the running worker occupies the port of the admin server.
    assert_eq!(check_before_reload(&file, &address), (0, String::new(), String::new()));
    fs::write(&file, "[handler]\nexec = ['true']\nthreads = 3").unwrap();
    let (status, stdout, stderr) = check_before_reload(&file, &address);
    assert_eq!((status, stdout.as_str()), (78, ""));
    assert!(stderr.contains("zizq-worker.toml:3: unknown key `threads`"), "{stderr}");
    running.stop();
}

/// Runs a Debian maintainer script with `/etc/` moved below `root`, and with stubs of the programs that change the system.
/// Returns the log of the stubs, which record their arguments. The stub of `dpkg-statoverride` reports an override only for the
/// path `overridden`.
fn maintain(script: &str, root: &Path, args: &[&str], overridden: &str) -> String {
    let bin = root.join("bin");
    fs::create_dir_all(&bin).unwrap();
    let log = root.join("log");
    for name in ["adduser", "deluser", "chown", "chmod", "deb-systemd-invoke", "dpkg-statoverride"] {
        let status = if name == "dpkg-statoverride" { "[ \"$2\" = \"$OVERRIDDEN\" ]" } else { ":" };
        let path = bin.join(name);
        fs::write(&path, format!("#!/bin/sh\necho {name} \"$@\" >> {}\n{status}\n", log.display())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let etc = root.join("etc").display().to_string();
    let text = text(&format!("config/debian/{script}")).replace("/etc/", &format!("{etc}/"));
    let path = std::env::var("PATH").unwrap();
    let ended = Command::new("sh")
        .args(["-c", &text, script])
        .args(args)
        .env("PATH", format!("{}:{path}", bin.display()))
        .env("OVERRIDDEN", overridden.replace("/etc/", &format!("{etc}/")))
        .output()
        .unwrap();
    assert!(ended.status.success(), "{script}: {}", String::from_utf8_lossy(&ended.stderr));
    fs::read_to_string(log).unwrap_or_default().replace(&etc, "/etc")
}

#[test]
fn the_package_keeps_its_settings_from_other_users() {
    let dir = TempDir::new().unwrap();
    fs::create_dir(dir.path().join("etc")).unwrap();
    fs::write(dir.path().join("etc/zizq-worker.toml"), "").unwrap();
    let done = maintain("postinst", dir.path(), &["configure", ""], "/etc/zizq-worker");
    assert!(done.contains("adduser --quiet --system --group"), "{done}");
    assert!(
        done.contains("chown root:zizq-worker /etc/zizq-worker.toml\nchmod 0640 /etc/zizq-worker.toml\n"),
        "{done}"
    );
    assert!(!done.contains("0750"), "the administrator has decided: {done}");
    assert!(dir.path().join("etc/zizq-worker").is_dir());
}

#[test]
fn a_purge_leaves_the_user_and_foreign_files() {
    let dir = TempDir::new().unwrap();
    let etc = dir.path().join("etc/zizq-worker");
    fs::create_dir_all(&etc).unwrap();
    fs::write(etc.join("mail.toml"), "").unwrap();
    assert_eq!(maintain("postrm", dir.path(), &["purge"], ""), "");
    assert!(etc.join("mail.toml").exists());
    fs::remove_file(etc.join("mail.toml")).unwrap();
    maintain("postrm", dir.path(), &["purge"], "");
    assert!(!etc.exists());
}

#[test]
fn signals_by_systemctl_are_shown_for_the_worker_alone() {
    for file in
        [UNITS[0], UNITS[1], "config/man/zizq-worker.1", "docs/operations.md", "docs/deployment.md", "README.md"]
    {
        let text = text(file).replace("\\-", "-");
        let commands = text.lines().filter(|line| line.contains("systemctl kill")).collect::<Vec<_>>();
        assert!(!commands.is_empty(), "{file}");
        assert!(commands.iter().all(|line| line.contains("--kill-whom=main")), "{file}: {commands:?}");
    }
}

#[test]
fn the_image_has_labels_and_the_right_version() {
    let dockerfile = text("Dockerfile");
    assert!(dockerfile.contains(concat!("ARG VERSION=", env!("CARGO_PKG_VERSION"), "\n")));
    for label in ["title", "description", "version", "revision", "licenses"] {
        assert!(dockerfile.contains(&format!("org.opencontainers.image.{label}=")), "{label}");
    }
}

#[test]
fn systemd_waits_longer_than_the_worker_takes_to_stop() {
    let wait = Duration::from_secs(unit_setting("TimeoutStopSec").parse().unwrap());
    assert!(wait > DEFAULT_SHUTDOWN_DEADLINE + DEFAULT_KILL_GRACE, "{wait:?}");
}

#[test]
fn the_unit_leaves_the_jobs_to_the_worker_and_watches_it() {
    for (key, value) in [
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("KillMode", "mixed"),
        ("OOMPolicy", "continue"),
        ("Restart", "on-failure"),
        ("RestartPreventExitStatus", "78 2"),
    ] {
        assert_eq!(unit_setting(key), value, "{key}");
    }
    assert!(unit_setting("WatchdogSec").parse::<u32>().unwrap() > 0);
}

/// In a service with `User=`, each of these settings implies `NoNewPrivileges=yes` (systemd.exec(5)). Then a handler could not
/// use a setuid program.
#[test]
fn handlers_under_systemd_may_become_another_user() {
    let without_privileges = [
        "DynamicUser",
        "LockPersonality",
        "MemoryDenyWriteExecute",
        "NoNewPrivileges",
        "PrivateDevices",
        "ProtectClock",
        "ProtectHostname",
        "ProtectKernelLogs",
        "ProtectKernelModules",
        "ProtectKernelTunables",
        "RestrictAddressFamilies",
        "RestrictFileSystems",
        "RestrictNamespaces",
        "RestrictRealtime",
        "RestrictSUIDSGID",
        "SystemCallArchitectures",
        "SystemCallFilter",
        "SystemCallLog",
    ];
    for (key, _) in unit_settings() {
        assert!(!without_privileges.contains(&&*key), "{key}");
        assert_ne!(key, "CapabilityBoundingSet");
    }
}

#[test]
fn compose_waits_longer_than_the_worker_takes_to_stop() {
    let compose = &yaml("config/compose.yaml")[0];
    let worker = &compose["services"]["worker"];
    let duration = |value: &Value| humantime::parse_duration(value.as_str().unwrap()).unwrap();
    let deadline = duration(&worker["environment"]["ZIZQ_SHUTDOWN_DEADLINE"]);
    assert!(duration(&worker["stop_grace_period"]) > deadline + DEFAULT_KILL_GRACE);
    assert_eq!(worker["restart"], "unless-stopped");
    // With a read-only root file system, result files need a writable directory.
    assert_eq!((&worker["read_only"], &worker["tmpfs"][0]), (&Value::Bool(true), &Value::from("/tmp")));
    let mounted = worker["volumes"][0].as_str().unwrap().split(':').next().unwrap();
    assert!(path("config").join(mounted).exists(), "{mounted}");
}

#[test]
fn the_deadlines_in_kubernetes_are_in_order() {
    let documents = yaml("config/kubernetes.yaml");
    let [map, deployment] = &documents[..] else { panic!("{} documents", documents.len()) };
    let Config { worker, handlers, .. } = load(map["data"]["zizq-worker.toml"].as_str().unwrap());
    let Handler { timeout, kill_grace, .. } = handlers.default.unwrap();
    let pod = &deployment["spec"]["template"]["spec"];
    let end = Duration::from_secs(pod["terminationGracePeriodSeconds"].as_u64().unwrap());
    let deadline = worker.shutdown_deadline;
    assert!(timeout.unwrap() + kill_grace < deadline + kill_grace, "{timeout:?} {deadline:?}");
    assert!(deadline + kill_grace < end, "{deadline:?} {kill_grace:?} {end:?}");
}

#[test]
fn kubernetes_probes_a_worker_that_is_not_root() {
    let documents = yaml("config/kubernetes.yaml");
    let (map, template) = (&documents[0], &documents[1]["spec"]["template"]);
    let (pod, container) = (&template["spec"], &template["spec"]["containers"][0]);
    assert_eq!(container["livenessProbe"]["httpGet"]["path"], "/live");
    assert_eq!(container["readinessProbe"]["httpGet"]["path"], "/ready");
    let port = container["ports"][0]["containerPort"].as_u64().unwrap();
    let value = |name: &str| {
        let variables = container["env"].as_array().unwrap();
        variables.iter().find(|variable| variable["name"] == name).unwrap()["value"].as_str().unwrap()
    };
    assert_eq!(value("ZIZQ_ADMIN_LISTEN"), format!("0.0.0.0:{port}"));
    let annotations = &template["metadata"]["annotations"];
    assert_eq!(annotations["prometheus.io/scrape"], "true");
    assert_eq!(annotations["prometheus.io/path"], "/metrics");
    assert_eq!(annotations["prometheus.io/port"], port.to_string());
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    let user = pod["securityContext"]["runAsUser"].as_u64().unwrap();
    assert!(text("Dockerfile").contains(&format!("USER {user}:{user}\n")));
    // Every mount names a declared volume, and the configuration file is mounted where the worker looks for it.
    let mounts = container["volumeMounts"].as_array().unwrap();
    let volumes: Vec<&Value> = pod["volumes"].as_array().unwrap().iter().map(|volume| &volume["name"]).collect();
    assert!(mounts.iter().all(|mount| volumes.contains(&&mount["name"])), "{mounts:?}");
    assert!(mounts.iter().any(|mount| mount["mountPath"] == "/tmp" && mount["readOnly"].is_null()));
    assert_eq!(pod["volumes"][0]["configMap"]["name"], map["metadata"]["name"]);
    assert_eq!(value("ZIZQ_CONFIG"), format!("{}/zizq-worker.toml", mounts[0]["mountPath"].as_str().unwrap()));
    let labels = &template["metadata"]["labels"];
    assert_eq!(&documents[1]["spec"]["selector"]["matchLabels"], labels);
}

#[test]
fn one_copy_gives_the_image_its_handler() {
    let handler = load(&text("config/image.toml")).handlers.default.unwrap();
    assert_eq!(handler.program.file_name(), "true");
    let dockerfile = text("Dockerfile");
    assert!(dockerfile.contains("COPY config/image.toml /etc/zizq-worker.toml\n"));
    assert!(dockerfile.contains("ENV ZIZQ_CONFIG=/etc/zizq-worker.toml "));
}

/// The Dockerfile first builds the dependencies without the worker's source. For this build, it creates a stand-in for the source
/// file of each target, because Cargo rejects a manifest that names missing files.
#[test]
fn the_dockerfile_has_a_stand_in_for_every_target() {
    let manifest: toml::Table = text("Cargo.toml").parse().unwrap();
    let named = ["bin", "test", "bench", "example"].map(|kind| (kind, manifest.get(kind)));
    let dockerfile = text("Dockerfile");
    for (kind, targets) in named {
        for target in targets.and_then(|targets| targets.as_array()).into_iter().flatten() {
            let implied = || format!("{kind}es/{}.rs", target["name"].as_str().unwrap());
            let path = target.get("path").map_or_else(implied, |path| path.as_str().unwrap().to_owned());
            assert!(dockerfile.contains(&format!(" {path} ")), "{path}");
        }
    }
}

#[test]
fn the_package_is_of_this_version_and_its_files_are_there() {
    let manifest: toml::Table = text("Cargo.toml").parse().unwrap();
    let deb = &manifest["package"]["metadata"]["deb"];
    for asset in deb["assets"].as_array().unwrap() {
        let source = asset[0].as_str().unwrap();
        assert!(source.starts_with("target/") || path(source.trim_end_matches("/*")).exists(), "{source}");
    }
    let changelog = text(deb["changelog"].as_str().unwrap());
    assert!(changelog.starts_with(concat!("zizq-worker (", env!("CARGO_PKG_VERSION"), "-1) ")), "{changelog}");
    // The unit and the package use the same program path and the same user.
    assert!(unit_setting("ExecStart").starts_with("/usr/bin/zizq-worker "));
    assert!(text("config/debian/postinst").contains(&format!(" {}\n", unit_setting("User"))));
}

/// Returns the shell script of the Dockerfile's `HEALTHCHECK`, with single spaces between its words.
fn probe() -> String {
    let dockerfile = text("Dockerfile").replace("\\\n", "");
    let line = dockerfile.lines().find_map(|line| line.strip_prefix("HEALTHCHECK ")).unwrap();
    let (_, words) = line.split_once(" CMD ").unwrap();
    let words: Vec<String> = serde_json::from_str(words).unwrap();
    let [bash, flag, script] = &words[..] else { panic!("{words:?}") };
    assert_eq!((bash.as_str(), flag.as_str()), ("/bin/bash", "-c"));
    script.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn the_probe_of_compose_is_that_of_the_image() {
    let compose = &yaml("config/compose.yaml")[0];
    let test = compose["services"]["worker"]["healthcheck"]["test"].as_array().unwrap();
    // Compose turns `$$` into `$`.
    assert_eq!(test[3].as_str().unwrap().replace("$$", "$"), probe());
}

/// Runs the script of the health check against a server that answers with `status`. Returns the request and the exit status of the
/// script.
fn ask(status: &str) -> (String, i32) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("0.0.0.0:{}", listener.local_addr().unwrap().port());
    let script = probe();
    let probing = std::thread::spawn(move || {
        Command::new("/bin/bash").args(["-c", &script]).env("ZIZQ_ADMIN_LISTEN", address).output().unwrap()
    });
    let (mut stream, _) = listener.accept().unwrap();
    let lines = BufReader::new(&stream).lines().map_while(Result::ok);
    let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    write!(stream, "HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").unwrap();
    drop(stream);
    (head.join("\n"), probing.join().unwrap().status.code().unwrap())
}

#[test]
fn the_probe_of_the_image_tells_a_worker_that_lives() {
    let (asked, status) = ask("200 OK");
    assert!(asked.starts_with("GET /live HTTP/1.1\nhost: "), "{asked}");
    assert_eq!(status, 0);
    assert_eq!(ask("503 Service Unavailable").1, 1);
    // No server listens on this port.
    let refused = Command::new("/bin/bash").args(["-c", &probe()]).env("ZIZQ_ADMIN_LISTEN", "127.0.0.1:1").output();
    assert_eq!(refused.unwrap().status.code(), Some(1));
}

#[test]
fn the_probe_of_the_image_is_for_the_admin_server() {
    let server = Server::start();
    let address = unused_address().to_string();
    let daemon = Daemon::of(&server).args(["--admin-listen", &address]).sh("true").start();
    daemon.wait_for_message("admin server listening");
    let probed = Command::new("/bin/bash").args(["-c", &probe()]).env("ZIZQ_ADMIN_LISTEN", address).status();
    assert!(probed.unwrap().success());
    daemon.stop();
}

#[test]
fn the_workflow_runs_ci_and_releases_for_every_platform() {
    let workflow = &yaml(".github/workflows/ci.yml")[0];
    let steps = |job: &str| workflow["jobs"][job]["steps"].as_array().unwrap().clone();
    assert!(steps("check").iter().any(|step| step["run"] == ".ci/run"));
    assert!(workflow["on"].get("pull_request").is_some() && workflow["on"].get("push").is_some());
    let matrix = workflow["jobs"]["binary"]["strategy"]["matrix"]["include"].as_array().unwrap();
    let targets: Vec<String> = matrix.iter().map(|row| row["target"].as_str().unwrap().to_owned()).collect();
    for target in ["x86_64", "aarch64"].iter().flat_map(|cpu| ["gnu", "musl"].map(|libc| (cpu, libc))) {
        assert!(targets.contains(&format!("{}-unknown-linux-{}", target.0, target.1)), "{target:?}");
    }
    let actions = ["check", "binary", "release"].iter().flat_map(|job| steps(job));
    for action in actions.filter_map(|step| Some(step["uses"].as_str()?.to_owned())) {
        let major = action.split_once("@v").map(|(_, version)| version.parse::<u32>());
        assert!(matches!(major, Some(Ok(_))), "{action} is not at a major version");
    }
}
