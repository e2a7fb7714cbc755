# syntax=docker/dockerfile:1
# Two stages: the build with its tools, and an image with the binary, certificates and nothing else to maintain.

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY benches benches
COPY config config
COPY migrations migrations
COPY src src
# Cargo wants every named target to be there; tests are not built.
RUN mkdir -p tests/it && touch tests/tidy.rs tests/it/main.rs README.md
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin sophont && cp target/release/sophont /usr/local/bin/sophont

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /data sophont && install -d -o sophont -g sophont /data
COPY --from=build /usr/local/bin/sophont /usr/local/bin/sophont
USER sophont
VOLUME /data
EXPOSE 8080 1883
# Inside a container the doors have to be open to others, and open doors need a token: give SOPHONT_TOKEN, or mount a file of
# your own over this one.
COPY <<TOML /etc/sophont/sophont.toml
[node]
data_dir = "/data"

[http]
listen = "0.0.0.0:8080"

[mqtt]
listen = "0.0.0.0:1883"

[[auth.tokens]]
token_env = "SOPHONT_TOKEN"
tenant = "default"
name = "admin"
scopes = ["read", "write", "admin"]
TOML
# The drain takes at most node.drain_seconds (20): stop the container with a longer grace, `docker stop -t 30`.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["sophont", "health"]
ENTRYPOINT ["sophont"]
CMD ["serve", "--config", "/etc/sophont/sophont.toml"]
