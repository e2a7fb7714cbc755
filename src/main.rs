//! The `sophont` binary: the command line, and the allocator it runs under.

use tikv_jemalloc_ctl::{Access as _, AsName as _};

/// It gives back what is freed, also when nothing is allocated any more: the cache keeps to its size, and gives memory back when
/// it is made smaller.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// How long pages that are free are kept for the next one who needs some, in milliseconds. Without settings it would be ten
/// seconds, in which values of all sizes that come and go leave half of a cache's size behind.
const KEPT_MS: isize = 100;

fn main() -> std::process::ExitCode {
    // The arena of this thread is there already; those of others begin with what holds for all.
    for name in ["arenas.dirty_decay_ms\0", "arenas.muzzy_decay_ms\0", "arena.0.dirty_decay_ms\0"] {
        let kept = if name.contains("muzzy") { 0 } else { KEPT_MS };
        // An allocator that keeps pages longer serves all the same.
        let _ = name.name().write(kept);
    }
    sophont::cli::main()
}
