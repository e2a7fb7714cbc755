//! The recorder behind the `metrics` macros, and the page Prometheus reads.
//!
//! Owns: buckets, descriptions, process figures. Not here: a listener; the HTTP door serves [`render`] on `/metrics`.
//! Invariant: one recorder a process, however many nodes it runs (tests run several).
//! Tests: at the foot.

use std::sync::OnceLock;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use super::metric::{self, Form};

/// Buckets of `_seconds`: 100 microseconds to a minute, fine around the targets (5 to 50 ms).
const SECONDS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];
/// Buckets of `_units`: powers of two up to the largest group commit anybody configures in earnest.
const UNITS: [f64; 12] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0];
/// Buckets of `_bytes`: 256 B to 16 MiB.
const BYTES: [f64; 9] = [256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262_144.0, 1_048_576.0, 4_194_304.0, 16_777_216.0];

/// How often [`upkeep`] wants to be called, in seconds.
pub const UPKEEP_SECONDS: u64 = 5;

static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();

fn builder() -> Result<PrometheusBuilder, BuildError> {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix(String::from("_seconds")), &SECONDS)?
        .set_buckets_for_metric(Matcher::Suffix(String::from("_units")), &UNITS)?
        .set_buckets_for_metric(Matcher::Suffix(String::from("_bytes")), &BYTES)
}

fn describe() {
    for metric in metric::ALL {
        match metric.form {
            Form::Counter => metrics::describe_counter!(metric.name, metric.help),
            Form::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            Form::Histogram => metrics::describe_histogram!(metric.name, metric.help),
        }
    }
    metrics_process::Collector::default().describe();
}

/// Installs the recorder, once; later calls yield the same. `None` when another recorder is in the way, which leaves the
/// node without figures and otherwise well.
pub fn install() -> Option<PrometheusHandle> {
    let handle = HANDLE.get_or_init(|| {
        let handle = builder().and_then(PrometheusBuilder::install_recorder);
        match handle {
            Ok(handle) => {
                describe();
                Some(handle)
            }
            Err(error) => {
                tracing::warn!(%error, "no metrics: the recorder could not be installed");
                None
            }
        }
    });
    handle.clone()
}

/// The page in Prometheus' text format, process figures included; empty before [`install`].
pub fn render() -> String {
    match HANDLE.get() {
        Some(Some(handle)) => {
            metrics_process::Collector::default().collect();
            handle.render()
        }
        _ => String::new(),
    }
}

/// Takes samples of histograms out of their buffers. Without it a node nobody scrapes would keep them all.
pub fn upkeep() {
    if let Some(Some(handle)) = HANDLE.get() {
        handle.run_upkeep();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_help_buckets_and_process_figures() {
        assert!(install().is_some() && install().is_some());
        metrics::histogram!(metric::COMMIT_SECONDS).record(0.003);
        metrics::histogram!(metric::COMMIT_BATCH).record(3.0);
        metrics::counter!(metric::FENCED).increment(1);
        upkeep();
        let page = render();
        for line in [
            "# HELP sophont_store_commit_seconds Time of one group commit in seconds, fsync included.",
            "# TYPE sophont_store_commit_seconds histogram",
            "sophont_store_commit_seconds_bucket{le=\"0.005\"} 1",
            "sophont_store_commit_batch_units_bucket{le=\"4\"} 1",
            "# TYPE sophont_store_fenced_total counter",
        ] {
            assert!(page.contains(line), "{line} is not in\n{page}");
        }
        assert!(page.contains("\nprocess_cpu_seconds_total "), "{page}");
    }
}
