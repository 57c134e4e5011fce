//! The completions, the man page, the commented configuration file and the table of settings match the declared settings, from
//! which they are generated. The generated files are committed, so that a package needs no extra build step.
//! `UPDATE=1 cargo test generated` regenerates them.

use std::fs;
use std::path::{Path, PathBuf};

use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, roman};
use zizq_worker::cli;
use zizq_worker::config::{Declared, Example as Written, Reload, SETTINGS};

/// Asserts that a committed file has the expected text. If `UPDATE` is set, writes the file first.
#[track_caller]
fn hold(path: &str, fresh: &[u8]) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("UPDATE").is_some() {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, fresh).unwrap();
    }
    let committed = fs::read_to_string(&file).unwrap_or_default();
    let fresh = std::str::from_utf8(fresh).unwrap();
    let differing = committed.lines().zip(fresh.lines()).enumerate().find(|(_, (old, new))| old != new);
    assert!(committed == fresh, "{path} is out of date: UPDATE=1 cargo test generated\n{differing:#?}");
}

fn completion(shell: Shell) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut cli::command(), "zizq-worker", &mut text);
    text
}

#[test]
fn the_completions_are_those_of_the_command_line() {
    hold("config/completions/zizq-worker.bash", &completion(Shell::Bash));
    hold("config/completions/_zizq-worker", &completion(Shell::Zsh));
    hold("config/completions/zizq-worker.fish", &completion(Shell::Fish));
}

#[test]
fn the_man_page_has_every_option_of_the_command_line() {
    hold("config/man/zizq-worker.1", &man_page());
}

#[test]
fn the_commented_file_has_every_setting() {
    hold("config/zizq-worker.toml", commented_file().as_bytes());
}

#[test]
fn the_table_of_settings_has_every_setting() {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md")).unwrap();
    let (before, rest) = page.split_once(TABLE_BEGIN).unwrap();
    let (_, after) = rest.split_once(TABLE_END).unwrap();
    let fresh = format!("{before}{TABLE_BEGIN}\n{}{TABLE_END}{after}", table_of_settings());
    hold("docs/configuration.md", fresh.as_bytes());
}

const TABLE_BEGIN: &str = "<!-- settings -->";
const TABLE_END: &str = "<!-- end of settings -->";

const FILE_HEAD: &str = "zizq-worker: every setting, at its default. Use it with --config, or ZIZQ_CONFIG.

A setting is taken from its flag, else from its environment variable, else from this file, else its default. The lines that are \
commented out have no fixed default. Durations are written like \"500ms\" or \"1m 30s\"; a bare number is seconds. An unknown key is \
an error.";

const ROUTE: &str = "
# Jobs of one type may have a handler of their own, with any of these settings. A setting that is not here is as in [handler].
#[handlers.send_email]
#exec = [\"cat\"]
#timeout = \"30s\"
";

/// The tables of the configuration file, each with its introduction.
const TABLES: [(&str, &str); 6] = [
    ("", ""),
    ("tls", "For an https url. The files are PEM, and are read and checked at start."),
    ("worker", ""),
    ("handler", "Settings without a flag are in the file alone, for each handler. docs/handlers.md explains them."),
    ("admin", ""),
    ("log", ""),
];

fn commented_file() -> String {
    let mut text = comment(FILE_HEAD);
    for (table, about) in TABLES {
        if !table.is_empty() {
            let gap = if about.is_empty() { "" } else { "\n" };
            text += &format!("\n[{table}]\n{}{gap}", comment(about));
        }
        let settings = SETTINGS.iter().filter(|declared| declared.table_and_key().0 == table);
        text.extend(settings.enumerate().map(|(index, declared)| commented_setting(declared, index == 0)));
        if table == "handler" {
            text += ROUTE;
        }
    }
    text
}

/// Returns the lines of a setting with its comment. A setting without a comment follows the previous one without a blank line.
fn commented_setting(declared: &Declared, is_first: bool) -> String {
    let gap = if declared.comment.is_empty() || (is_first && declared.key != "url") { "" } else { "\n" };
    let names = declared.flag.as_ref().map(|flag| {
        let more = if flag.name == "exec" { ", or the words after --" } else { "" };
        format!("# --{}, {}{more}\n", flag.name, variable(flag.name))
    });
    let key = declared.table_and_key().1;
    let setting = match declared.example {
        Written::Default(value) => format!("{key} = {value}\n"),
        Written::Other(value) => format!("#{key} = {value}\n"),
    };
    format!("{gap}{}{}{setting}", comment(declared.comment), names.unwrap_or_default())
}

/// Wraps a text into comment lines.
fn comment(text: &str) -> String {
    let mut lines = String::new();
    for paragraph in text.lines() {
        let mut line = "#".to_owned();
        for word in paragraph.split_whitespace() {
            if line.len() + 1 + word.len() > 120 {
                lines += &format!("{line}\n");
                line = "#".to_owned();
            }
            line += &format!(" {word}");
        }
        lines += &format!("{line}\n");
    }
    lines
}

fn variable(flag: &str) -> String {
    format!("ZIZQ_{}", flag.to_uppercase().replace('-', "_"))
}

fn table_of_settings() -> String {
    let head = "| flag | variable | in the file | default | reload |\n| --- | --- | --- | --- | --- |\n";
    let command = cli::command();
    let rows = command.get_arguments().filter(|arg| arg.get_env().is_some()).map(|arg| {
        let (long, value) = (arg.get_long().unwrap(), arg.get_value_names().unwrap()[0].as_str());
        let short = arg.get_short().map_or_else(String::new, |short| format!("-{short}, "));
        let declared = SETTINGS.iter().find(|declared| declared.flag.as_ref().is_some_and(|flag| flag.name == long));
        let (flag, more) = if long == "exec" {
            ("`--exec \"CMD ARGS\"`, or `-- CMD ARGS…`".to_owned(), "")
        } else {
            (format!("`{short}--{long} {value}`"), if long == "log-level" { " (`RUST_LOG` wins)" } else { "" })
        };
        let key = declared.map_or_else(String::new, |declared| format!("`{}`", declared.key));
        let default = declared.map_or_else(|| "none".to_owned(), |declared| (declared.default)());
        let reload = declared.map_or("restart", |declared| match declared.reload {
            Reload::AtOnce => "at once",
            Reload::NewStream => "new stream",
            Reload::Restart => "restart",
        });
        format!("| {flag} | `{}`{more} | {key} | {default} | {reload} |\n", variable(long))
    });
    head.to_owned() + &rows.collect::<String>()
}

/// A part of a section of the man page: a paragraph, a term with its explanation, or an example.
enum Part {
    Text(&'static str),
    Item(&'static str, &'static str),
    Example(&'static str),
}

use Part::{Example, Item, Text};

fn man_page() -> Vec<u8> {
    let source = format!("zizq-worker {}", env!("CARGO_PKG_VERSION"));
    // A space in place of the date keeps the page from changing daily. An empty date fails, because troff skips empty arguments.
    let man = Man::new(cli::command()).date(" ").source(source).manual("User Commands");
    let mut page = Vec::new();
    man.render_title(&mut page).unwrap();
    man.render_name_section(&mut page).unwrap();
    man.render_synopsis_section(&mut page).unwrap();
    section("DESCRIPTION", DESCRIPTION, &mut page);
    man.render_options_section(&mut page).unwrap();
    for (title, parts) in SECTIONS {
        section(title, parts, &mut page);
    }
    page
}

fn section(title: &str, parts: &[Part], page: &mut Vec<u8>) {
    let mut roff = Roff::new();
    roff.control("SH", [title]);
    for part in parts {
        match part {
            Text(text) => roff.control("PP", []).text([roman(*text)]),
            Item(word, text) => roff.control("TP", []).text([bold(*word)]).text([roman(*text)]),
            Example(lines) => {
                roff.control("PP", []).control("RS", ["4"]).control("nf", []);
                roff.text(lines.lines().flat_map(|line| [roman(line), Inline::LineBreak]).collect::<Vec<_>>());
                roff.control("fi", []).control("RE", [])
            }
        };
    }
    roff.to_writer(page).unwrap();
}

const DESCRIPTION: &[Part] = &[
    Text(
        "zizq-worker takes jobs from a Zizq queue server, runs a command for each job, and reports how the command ended. \
         The job's payload is JSON on the command's standard input. Exit status 0 acknowledges the job. Any other end of the \
         command reports a failure, with the end of the command's standard error. The server schedules the retry.",
    ),
    Text(
        "Each setting is taken from its option, else its environment variable, else the configuration file, else its \
         default. Durations are written like 500ms or \"1m 30s\"; a number without a unit is seconds. Only the configuration \
         file can set a handler's limits, its environment and the meaning of its exit statuses, and give a job type a handler \
         of its own.",
    ),
];

const SECTIONS: &[(&str, &[Part])] = &[
    ("HANDLERS", HANDLERS),
    ("SIGNALS", SIGNALS),
    ("CONFIGURATION FILE", CONFIGURATION_FILE),
    ("ADMIN SERVER", ADMIN_SERVER),
    ("EXIT STATUS", EXIT_STATUS),
    ("ENVIRONMENT", ENVIRONMENT),
    ("FILES", FILES),
    ("EXAMPLES", EXAMPLES),
    ("SEE ALSO", SEE_ALSO),
];

const HANDLERS: &[Part] = &[
    Text(
        "A handler is started once for each job, without a shell, in a process group of its own. Its environment is the \
         worker's, without the variables that begin with ZIZQ_ and those for messages to systemd. These variables are added:",
    ),
    Item("ZIZQ_JOB_ID, ZIZQ_JOB_TYPE, ZIZQ_JOB_QUEUE, ZIZQ_JOB_PRIORITY", "The fields of the job."),
    Item("ZIZQ_JOB_ATTEMPTS", "The number of attempts that have failed before this one."),
    Item("ZIZQ_JOB_READY_AT", "The time since which the job is ready, in Unix milliseconds."),
    Item("ZIZQ_JOB_RETRY_LIMIT", "The retry limit of the job, if it has one of its own."),
    Item("ZIZQ_JOB_TIMEOUT", "The timeout of the handler in seconds, if it has one."),
    Item(
        "ZIZQ_RESULT_FILE",
        "The path at which a handler that fails can write JSON: message, error_type, backtrace, retry_in (seconds, or like \"5m\"), \
         retry_at (Unix milliseconds, or RFC 3339), kill (true: no retry).",
    ),
    Item("ZIZQ_WORKER_ID", "The name of the worker."),
    Text(
        "With --mode warm, or mode = \"warm\" in the configuration file, a handler is started once for many jobs. Of the \
         variables above, it has only ZIZQ_WORKER_ID. One more is added:",
    ),
    Item(
        "ZIZQ_SOCKET",
        "The Unix socket to connect to. Each job is a line of JSON with id, type, queue, priority, payload, ready_at, \
         attempts and more. The handler replies with one line of JSON: the job's id, \"ok\": true or false, and after a failure the \
         fields of the result file. \"last\": true in a reply says that the handler exits after this job. At the end of file, the \
         handler must exit.",
    ),
];

const SIGNALS: &[Part] = &[
    Item(
        "SIGTERM, SIGINT",
        "The first signal drains the worker: it takes no more jobs, and finishes and reports the jobs that it has. A second \
         signal, or the end of --shutdown-deadline, stops the running jobs: their process groups get SIGTERM, and SIGKILL \
         after kill_grace (5 seconds by default). Stopped jobs are not reported. The server redelivers them, and counts no \
         attempt. A third signal skips the grace.",
    ),
    Item(
        "SIGHUP",
        "Reloads the configuration file: the handlers, the queues, the server and its certificates, the prefetch and the log level. \
         Each process of a warm handler is replaced once it is idle. The log names the changed settings that need a restart. A file \
         with a mistake changes nothing. A SIGHUP because the terminal is closed drains the worker like SIGTERM, unless nohup or \
         setsid started the worker.",
    ),
    Item("SIGUSR1", "Logs the worker's status and each running job."),
    Item(
        "SIGUSR2",
        "Pauses the worker: it takes no more jobs, and finishes and reports the jobs that it has. Then the stream closes, and the \
         worker waits for SIGCONT.",
    ),
    Item("SIGCONT", "Ends a pause: the worker takes jobs again."),
    Text(
        "Under systemd, send a signal to the worker alone, with --kill-whom=main (--kill-who=main before systemd 252). Otherwise the \
         signal also reaches every handler, and kills it.",
    ),
    Example(
        "systemctl kill --kill-whom=main --signal=USR2 zizq-worker\nsystemctl kill --kill-whom=main --signal=CONT zizq-worker\nsystemctl reload zizq-worker",
    ),
    Text("While the worker stops, it ignores SIGHUP, SIGUSR2 and SIGCONT."),
];

const EXIT_STATUS: &[Part] = &[
    Item(
        "0",
        "The worker was stopped by a signal or by --max-jobs, --max-time or --exit-when-idle, and all started jobs are finished \
         and reported. A report that the server refused for good is only in the log.",
    ),
    Item(
        "1",
        "Running jobs had to be stopped, a report was dropped by a run that ended by itself, the server refused the worker's first request, or the \
         address of the admin server or of the embedded server is in use or does not exist yet. With --check, the server does not \
         answer, or a warm handler does not connect.",
    ),
    Item("2", "A mistake on the command line or in a variable."),
    Item("78", "A mistake in the configuration file, or a handler or certificate that cannot be used."),
];

const ENVIRONMENT: &[Part] = &[
    Text("Nearly every option that takes a value has a variable, named above. An empty variable counts as not set."),
    Item("RUST_LOG", "The log's filter: a level, or targets like zizq_worker=debug. Overrides --log-level."),
    Item("NO_COLOR", "Any value turns the colours of the log off."),
    Item("PATH", "The directories in which a handler without a slash in its name is looked up."),
    Item(
        "TMPDIR",
        "The directory for result files and sockets, instead of /tmp. At most 107 bytes are left for the path of a socket.",
    ),
    Item("SSL_CERT_FILE, SSL_CERT_DIR", "The certificates that are trusted without --tls-ca, instead of the system's."),
    Item(
        "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY",
        "Have no effect on the worker, which connects to its --url directly. Handlers inherit them.",
    ),
    Item(
        "NOTIFY_SOCKET, WATCHDOG_USEC",
        "Set by systemd. The worker then reports that it is ready, reloads, drains, and is alive.",
    ),
    Item(
        "JOURNAL_STREAM",
        "Set by systemd if the journal reads stderr. Each line of the log then begins with its priority, as in <4>.",
    ),
];

const ADMIN_SERVER: &[Part] = &[
    Text("With --admin-listen, the worker answers these HTTP requests. No request changes the state of the worker."),
    Item("GET /", "A page for people: loops, jobs, failures, handlers and settings."),
    Item("GET /live", "200 as long as the worker itself works, whether or not it reaches the queue server."),
    Item(
        "GET /ready",
        "200 as long as the worker can take jobs and start handlers, else 503 with the reasons. A paused worker takes no jobs, so \
         it is not ready.",
    ),
    Item("GET /status", "The worker's status, as JSON."),
    Item("GET /metrics", "The worker's metrics, in the text format of Prometheus."),
];

const CONFIGURATION_FILE: &[Part] = &[
    Text("The file that --config names is TOML. --check shows the table and the key of each option. For example:"),
    Example(
        "url = \"http://queue.example.org:7890\"\n[worker]\nqueues = [\"mail\", \"billing\"]\nthreads = 4\n[handler]\n\
         exec = [\"/usr/local/bin/handle\"]\ntimeout = \"30s\"\n[handlers.send_email]\nexec = [\"python3\", \"/srv/email.py\"]\n\
         mode = \"warm\"",
    ),
    Text(
        "A table [handlers.TYPE] is for the jobs of exactly that type, and [handler] for all others. A setting that is missing in \
         [handlers.TYPE] is taken from [handler]. These keys of handlers have no option: stdin, output, env_clear, pass_env, env, cwd, \
         success_exit_codes, kill_exit_codes, timeout, kill_grace and drain_signal; for warm handlers also min_processes, \
         max_processes, start_timeout, max_jobs, max_age, max_memory and idle_timeout.",
    ),
];

const FILES: &[Part] = &[
    Item(
        "/etc/zizq-worker.toml",
        "The configuration file of zizq-worker.service. Without --config or ZIZQ_CONFIG, the worker reads no file.",
    ),
    Item(
        "/etc/zizq-worker/NAME.toml, /etc/zizq-worker/NAME.env",
        "The configuration file and the optional variables of zizq-worker@NAME.service, one of several workers on a host. A \
         changed NAME.env needs a restart.",
    ),
    Item(
        "$TMPDIR/zizq-worker-*",
        "The result files of running handlers, in a directory that only the worker's user can enter. The worker removes the directory \
         when it ends, unless it is killed by SIGKILL.",
    ),
];

const EXAMPLES: &[Part] = &[
    Text("Take the jobs of two queues, and run at most four handlers at once:"),
    Example("zizq-worker --url http://queue.example.org:7890 --queues mail,billing --threads 4 --exec ./handle.sh"),
    Text("Show every setting and its source, and check that a start would succeed:"),
    Example("zizq-worker --config /etc/zizq-worker.toml --check"),
    Text("Check the settings without a server, as systemctl reload does before the reload:"),
    Example("zizq-worker --config /etc/zizq-worker.toml --check --offline"),
    Text("Try a handler without a server:"),
    Example("zizq-worker --embedded --jobs jobs.ndjson --exec ./handle.sh --exit-when-idle 1s"),
];

const SEE_ALSO: &[Part] =
    &[Text("systemd.service(5), signal(7)"), Text("The comments in the configuration file explain every setting.")];

/// The manifest lists the files of the Debian package one by one, so a generated file could be missing from the list.
#[test]
fn every_generated_file_is_in_the_package() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest: toml::Table = fs::read_to_string(root.join("Cargo.toml")).unwrap().parse().unwrap();
    let assets = manifest["package"]["metadata"]["deb"]["assets"].as_array().unwrap();
    let sources: Vec<&str> = assets.iter().map(|asset| asset[0].as_str().unwrap()).collect();
    for dir in ["config/completions", "config/man"] {
        let files = fs::read_dir(root.join(dir)).unwrap().map(|entry| entry.unwrap().path());
        for file in files.collect::<Vec<PathBuf>>() {
            let path = file.strip_prefix(root).unwrap().to_str().unwrap();
            assert!(sources.contains(&path), "{path} in {sources:?}");
        }
    }
}

#[test]
fn the_completions_have_the_words_of_a_setting() {
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let text = String::from_utf8(completion(shell)).unwrap();
        let lists = |words: [&str; 3]| {
            text.contains(&words.join(" ")) || words.iter().all(|word| text.contains(&format!("{word}\\t''")))
        };
        assert!(lists(["error", "warn", "info"]) && lists(["pretty", "compact", "json"]), "{shell}");
    }
}
