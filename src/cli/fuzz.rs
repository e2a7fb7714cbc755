//! What the fuzzer throws at the command line: logs that `check-history` reads, and streams of a node that `chat` reads.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.

use super::check_history::{
    check::{Stored, Verdict},
    log::{Event, Log},
};

pub use super::chat::fuzz::streams;

/// A log: what is read is judged, and its lines read back as they were written.
pub fn logs(bytes: &[u8]) {
    let mut log = Log::default();
    if log.read("a", bytes).is_ok() {
        let mut verdict = Verdict::default();
        for instance in log.instances() {
            verdict.check_instance(instance, log.sent(instance), &Stored::default());
        }
        let _ = (verdict.is_clean(), verdict.violations(), super::check_history::table(&verdict));
    }
    for line in bytes.split(|byte| *byte == b'\n').take(16) {
        let read = |bytes: &[u8]| serde_json::from_slice::<Event>(bytes).ok();
        let write = |event: &Event| {
            let mut out = Vec::new();
            event.write(&mut out).unwrap_or_default();
            out
        };
        crate::types::fuzz::settles(read(line), write, read);
    }
}
