complete -c zizq-worker -l url -d 'The server\'s url; a path prefix is kept [default: http://localhost:7890]' -r
complete -c zizq-worker -l tls-ca -d 'Trust the certificates in this file (PEM) [default: those that the system trusts]' -r
complete -c zizq-worker -l tls-client-cert -d 'Show this certificate chain (PEM) to the server; needs its key [default: none]' -r
complete -c zizq-worker -l tls-client-key -d 'The private key of that certificate (PEM) [default: none]' -r
complete -c zizq-worker -l stream-idle-timeout -d 'Reconnect after this time without a byte, heartbeats included [default: 30s]' -r
complete -c zizq-worker -l max-job-size -d 'The largest job that is accepted, like 64MiB [default: 64.0 MiB]' -r
complete -c zizq-worker -l worker-id -d 'The name of this worker in the server\'s log [default: HOSTNAME-PID]' -r
complete -c zizq-worker -l exec -d 'The command to run for each job, split into words as a shell would, but run without one [required, here or elsewhere]' -r
complete -c zizq-worker -l mode -d 'spawn: start the command for each job; warm: keep it running, and send it one job after another over a socket [default: spawn]' -r -f -a "spawn\t''
warm\t''"
complete -c zizq-worker -s q -l queues -l queue -d 'The queues to take jobs from; may be repeated [default: all queues]' -r
complete -c zizq-worker -s t -l threads -d 'The number of jobs at once [default: 1]' -r
complete -c zizq-worker -s f -l fibers -d 'Multiplies threads: threads x fibers jobs run at once [default: 1]' -r
complete -c zizq-worker -s p -l prefetch -d 'Unreported jobs that the server may hand to this worker [default: 2 x threads x fibers]' -r
complete -c zizq-worker -l shutdown-deadline -l shutdown-timeout -d 'The time that running jobs have to finish after a signal [default: 30s]' -r
complete -c zizq-worker -l max-jobs -d 'Exit after exactly N started jobs [default: no limit]' -r
complete -c zizq-worker -l max-time -d 'Take no more jobs after this time, and exit when running jobs have finished [default: no limit]' -r
complete -c zizq-worker -l exit-when-idle -d 'Exit after this time without a job, once connected [default: never]' -r
complete -c zizq-worker -s c -l config -d 'The configuration file (TOML) [default: none]' -r
complete -c zizq-worker -l retry-min-wait -d 'The first wait before reconnecting or reporting again [default: 1s]' -r
complete -c zizq-worker -l retry-max-wait -d 'The longest wait before reconnecting or reporting again [default: 30s]' -r
complete -c zizq-worker -l retry-multiplier -d 'The factor by which each wait is longer than the last [default: 2]' -r
complete -c zizq-worker -l admin-listen -d 'Serve a page, /live, /ready, /status and /metrics at this address, like 127.0.0.1:9290 [default: off]' -r
complete -c zizq-worker -l log-level -d 'error, warn, info, debug or trace; more per target, like info,zizq_worker::jobs=warn; RUST_LOG wins [default: info]' -r -f -a "error\t''
warn\t''
info\t''
debug\t''
trace\t''"
complete -c zizq-worker -l log-format -d 'pretty, compact or json, on stderr [default: pretty on a terminal, else compact]' -r -f -a "pretty\t''
compact\t''
json\t''"
complete -c zizq-worker -l jobs -d 'Enqueue the lines of FILE (- for stdin) in the embedded server: one JSON object with queue, type and payload each' -r
complete -c zizq-worker -s V -s v -l version -d 'Print version'
complete -c zizq-worker -l check -d 'Check and print every setting with its origin, ask the server for its version, and exit without taking a job'
complete -c zizq-worker -l offline -d 'With --check: ask no server and start no handler, as before a reload or in a build'
complete -c zizq-worker -l embedded -d 'Start an in-memory server in this process, at --url; nothing in it outlives the process'
complete -c zizq-worker -s h -l help -d 'Print help'
