# syntax=docker/dockerfile:1
# The images may come from any registry: --build-arg BUILD_IMAGE=… --build-arg RUN_IMAGE=…
ARG BUILD_IMAGE=rust:1-bookworm
ARG RUN_IMAGE=debian:bookworm-slim

FROM ${BUILD_IMAGE} AS build
WORKDIR /build
# The dependencies change less often than the source: built first, they stay in the cache.
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src tests/it benches && echo 'fn main() {}' > src/main.rs && touch src/lib.rs tests/it/main.rs benches/throughput.rs \
    && cargo build --release --locked && rm -r src
COPY src src

RUN touch src/main.rs src/lib.rs && cargo build --release --locked

FROM ${RUN_IMAGE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --no-create-home --shell /usr/sbin/nologin zizq
COPY --from=build /build/target/release/zizq-worker /usr/local/bin/zizq-worker
USER zizq
STOPSIGNAL SIGTERM
# tini reaps what handlers leave behind, and passes signals on.
ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/zizq-worker"]
