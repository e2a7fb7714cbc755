//! Integration tests: one binary, one file per capability, real servers and clients on free ports.
//!
//! Not here: pure parts, which are tested at the foot of their own files. `docs/testing.md` says how to run one test and
//! what a missing server or tool means.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

mod activation;
mod attention;
mod bus;
mod cache;
mod check_history;
mod cli;
mod cluster;
mod cluster_calls;
mod config;
mod crash;
mod delivery;
mod embeddings;
mod forward;
mod hand_off;
mod hostile;
mod http;
mod instance;
mod load;
mod mcp_servers;
mod membership;
mod memory;
mod memory_checkpoint;
mod memory_contract;
mod memory_index;
mod memory_suite;
mod mqtt;
mod mqtt_cluster;
mod mqtt_external;
mod openai;
mod overload;
mod ownership_contract;
mod panic;
mod presets;
mod roaming;
mod row_security;
mod settings;
mod settings_sizes;
mod steps;
mod store_contract;
mod store_model;
mod store_postgres;
mod store_sqlite;
mod store_steps;
mod support_works;
mod tenure;
mod thinking;
mod tokens;
mod tools;
mod transport;
mod turn;
mod unheard;
mod upgrade;
