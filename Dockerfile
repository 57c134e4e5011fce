# An image with the worker as its entrypoint, and no handler. An image with a handler needs two lines:
#
#     FROM zizq-worker
#     COPY handler /handler
#
# /handler must be executable (COPY keeps the mode). It runs for every job of every queue. ZIZQ_URL, ZIZQ_QUEUES,
# ZIZQ_THREADS and the other variables configure the rest. Separate handlers for some types need a configuration file:
# copy or mount it to /etc/zizq-worker.toml, where it replaces config/image.toml.
#
# The base images can come from any registry: --build-arg BUILD_IMAGE=… --build-arg RUN_IMAGE=…
# BUILD_IMAGE needs Cargo and a C compiler, RUN_IMAGE needs apt-get. Both should have the same Debian release, because
# the binary needs the glibc that it was built with.
ARG BUILD_IMAGE=rust:1-bookworm
ARG RUN_IMAGE=debian:bookworm-slim

FROM ${BUILD_IMAGE} AS build
WORKDIR /build
# Build the dependencies first, with an empty program, so that a change of the source does not rebuild them. Cargo
# rejects a manifest whose tests and benches are missing, so these are empty files, too.
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src tests/it benches/throughput \
    && echo 'fn main() {}' | tee src/main.rs tests/it/main.rs benches/throughput/main.rs > /dev/null \
    && touch src/lib.rs \
    && cargo build --release --locked \
    && rm -r src
COPY src src
# Cargo compares modification times, and the checkout may be older than the empty program.
RUN touch src/main.rs src/lib.rs && cargo build --release --locked

FROM ${RUN_IMAGE}
# The labels name the version and revision of the build: --build-arg VERSION=… --build-arg REVISION=$(git rev-parse HEAD)
ARG VERSION=0.6.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="zizq-worker" \
    org.opencontainers.image.description="Runs a command for each job of a Zizq queue server and reports how it ended" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.licenses="MIT"
# The user has a fixed number, and USER names it by this number. From a name, Kubernetes' runAsNonRoot cannot tell that
# the user is not root.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/log/* \
    && groupadd --gid 10001 zizq-worker \
    && useradd --uid 10001 --gid zizq-worker --home-dir /nonexistent --shell /usr/sbin/nologin zizq-worker
COPY --from=build /build/target/release/zizq-worker /usr/local/bin/zizq-worker
COPY config/image.toml /etc/zizq-worker.toml
# The handler is set in the file, not by ZIZQ_EXEC, because a variable would override the [handler] of a mounted file.
# The probe below and those of Kubernetes ask the admin server. It listens on all addresses, because Kubernetes cannot
# reach a loopback address. The admin server is read-only.
ENV ZIZQ_CONFIG=/etc/zizq-worker.toml ZIZQ_ADMIN_LISTEN=0.0.0.0:9290
EXPOSE 9290
USER 10001:10001
# The first SIGTERM starts a drain. A second one kills the jobs. `docker stop` kills the worker after 10s, which is less
# than the shutdown deadline. Use `docker stop --time 45`, or stop_grace_period as in config/compose.yaml.
STOPSIGNAL SIGTERM
# Checks only the worker, not its server, because a restart does not help when the server is unreachable. The image has
# no curl, but bash can open a connection. Without an admin server, disable the check (--no-healthcheck).
HEALTHCHECK --interval=10s --timeout=5s --start-period=5s CMD ["/bin/bash", "-c", "\
    exec 3<> \"/dev/tcp/127.0.0.1/${ZIZQ_ADMIN_LISTEN##*:}\" \
    && printf 'GET /live HTTP/1.1\\r\\nhost: localhost\\r\\nconnection: close\\r\\n\\r\\n' >&3 \
    && read -r _ status _ <&3 \
    && [ \"$status\" = 200 ]"]
# tini reaps the processes that handlers leave behind, and forwards signals.
ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/zizq-worker"]
