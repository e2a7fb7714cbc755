//! See `sophont::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sophont::fuzzing::run("cache_entries", bytes));
