# An image whose entrypoint is the worker. It has no handler of its own; an image with one is two lines more:
#
#     FROM zizq-worker
#     COPY handler /handler
#
# /handler has to be executable (COPY keeps the mode), and is run for every job of every queue: ZIZQ_URL, ZIZQ_QUEUES,
# ZIZQ_THREADS and the other variables say the rest. Handlers of their own for some types need a configuration file; one
# that is copied or mounted to /etc/zizq-worker.toml takes the place of config/image.toml.
#
# The images may come from any registry: --build-arg BUILD_IMAGE=… --build-arg RUN_IMAGE=…
# The first needs Cargo and a C compiler, the second apt-get. What is built in the one must run in the other: with the
# same Debian release in both, their glibc is the same.
ARG BUILD_IMAGE=rust:1-bookworm
ARG RUN_IMAGE=debian:bookworm-slim

FROM ${BUILD_IMAGE} AS build
WORKDIR /build
# The dependencies change less often than the source: built first, with an empty program, they stay in the cache. Cargo
# reads no manifest whose tests and benches are missing, so these are there, and empty too.
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src tests/it benches/throughput \
    && echo 'fn main() {}' | tee src/main.rs tests/it/main.rs benches/throughput/main.rs > /dev/null \
    && touch src/lib.rs \
    && cargo build --release --locked \
    && rm -r src
COPY src src
# Cargo goes by the time of the files, and a checkout may be older than the empty program.
RUN touch src/main.rs src/lib.rs && cargo build --release --locked

FROM ${RUN_IMAGE}
# A build says what it was made of: --build-arg VERSION=… --build-arg REVISION=$(git rev-parse HEAD)
ARG VERSION=0.6.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="zizq-worker" \
    org.opencontainers.image.description="Runs a command for each job of a Zizq queue server and reports how it ended" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.licenses="MIT"
# The user has a number of its own, and is named by it below: with a name, Kubernetes' runAsNonRoot cannot tell that it
# is not root.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/log/* \
    && groupadd --gid 10001 zizq-worker \
    && useradd --uid 10001 --gid zizq-worker --home-dir /nonexistent --shell /usr/sbin/nologin zizq-worker
COPY --from=build /build/target/release/zizq-worker /usr/local/bin/zizq-worker
COPY config/image.toml /etc/zizq-worker.toml
# A file, not ZIZQ_EXEC, says what /handler is: a variable would win over the [handler] of a file that is mounted there.
# The admin server is what the probe below asks, and the one of Kubernetes. An address of loopback is out of reach for
# the latter; nothing of the worker can be changed through it.
ENV ZIZQ_CONFIG=/etc/zizq-worker.toml ZIZQ_ADMIN_LISTEN=0.0.0.0:9290
EXPOSE 9290
USER 10001:10001
# The worker drains. A second one would kill, and so does the end of the grace period: 10s with `docker stop`, which is
# less than the shutdown deadline. Use `docker stop --time 45`, or stop_grace_period as in config/compose.yaml.
STOPSIGNAL SIGTERM
# Whether the worker answers, not whether its server does: a container is not mended by being started again because the
# server is away. There is no curl here, but bash can open a connection. Without an admin server, switch it off
# (--no-healthcheck).
HEALTHCHECK --interval=10s --timeout=5s --start-period=5s CMD ["/bin/bash", "-c", "\
    exec 3<> \"/dev/tcp/127.0.0.1/${ZIZQ_ADMIN_LISTEN##*:}\" \
    && printf 'GET /live HTTP/1.1\\r\\nhost: localhost\\r\\nconnection: close\\r\\n\\r\\n' >&3 \
    && read -r _ status _ <&3 \
    && [ \"$status\" = 200 ]"]
# tini reaps what handlers leave behind, and passes signals on.
ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/zizq-worker"]
