//! What the box is and what the server takes from it, read from `/proc`; how fast the data folder syncs.
//!
//! Parsing is pure and tested at the foot; reading is Linux only, elsewhere figures are absent.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

/// Clock ticks a second in `/proc/PID/stat`: USER_HZ, 100 on every Linux architecture Rust supports.
const TICKS_PER_SECOND: u64 = 100;
/// Longest time the sync probe takes.
const PROBE_TIME: Duration = Duration::from_secs(1);
/// Most syncs of the probe.
const PROBE_SYNCS: u32 = 5_000;

/// The box a figure was measured on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// CPU model.
    pub cpu: String,
    /// Cores this process may use.
    pub cores: usize,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// Kernel release.
    pub kernel: String,
    /// Load average (1 minute) when the measurement began: what else the box was doing.
    pub load_average: f64,
    /// 4 KiB appends with fdatasync a second in the data folder; `None` when the folder is not known.
    pub fdatasyncs_per_second: Option<f64>,
}

impl Machine {
    /// Looks at this machine and, when the folder is known, at its disk.
    pub fn look(data_dir: Option<&Path>) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self {
            cpu: cpu_model(&read("/proc/cpuinfo")).unwrap_or_else(|| "unknown".into()),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_mib: field_kib(&read("/proc/meminfo"), "MemTotal:").unwrap_or(0) / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load_average: read("/proc/loadavg").split(' ').next().and_then(|t| t.parse().ok()).unwrap_or(0.0),
            fdatasyncs_per_second: data_dir.and_then(|dir| probe_sync(dir).ok()),
        }
    }
}

fn cpu_model(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The value of a `Name:   123 kB` line.
fn field_kib(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|l| l.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

/// Appends 4 KiB and syncs, over and over.
fn probe_sync(dir: &Path) -> io::Result<f64> {
    let path = dir.join(format!(".sync-probe-{}", std::process::id()));
    let mut file = File::create(&path)?;
    let result = (|| {
        let block = [0x5a; 4096];
        let begin = Instant::now();
        let mut syncs = 0;
        while syncs < PROBE_SYNCS && begin.elapsed() < PROBE_TIME {
            file.write_all(&block)?;
            file.sync_data()?;
            syncs += 1;
        }
        Ok(f64::from(syncs) / begin.elapsed().as_secs_f64().max(1e-9))
    })();
    fs::remove_file(&path)?;
    result
}

/// What some processes have used so far, summed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// User and system time, in milliseconds.
    pub cpu_ms: u64,
    /// Resident memory, in KiB.
    pub rss_kib: u64,
    /// Threads.
    pub threads: u64,
    /// Context switches of the threads alive now, voluntary and not.
    pub switches: u64,
}

/// Processes that are measured together, under one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// What they are.
    pub name: String,
    /// Their ids.
    pub pids: Vec<u32>,
}

impl Group {
    /// Puts together what has the same name, in the order of the first of each.
    pub fn all(processes: &[(String, u32)]) -> Vec<Self> {
        let mut groups: Vec<Self> = Vec::new();
        for (name, pid) in processes {
            match groups.iter_mut().find(|group| group.name == *name) {
                Some(group) => group.pids.push(*pid),
                None => groups.push(Self { name: name.clone(), pids: vec![*pid] }),
            }
        }
        groups
    }
}

/// Every process and who started it.
fn parents() -> Vec<(u32, u32)> {
    let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = all.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| Some((pid, parse_parent(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?))).collect()
}

fn parse_parent(stat: &str) -> Option<u32> {
    // The name may hold blanks and brackets.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Some processes and all that descend from them, each once.
fn families(pids: &[u32], parents: &[(u32, u32)]) -> Vec<u32> {
    let mut all = pids.to_vec();
    let mut at = 0;
    while let Some(&pid) = all.get(at) {
        let children = parents.iter().filter(|(child, parent)| *parent == pid && !all.contains(child));
        let children: Vec<u32> = children.map(|(child, _)| *child).collect();
        all.extend(children);
        at += 1;
    }
    all
}

impl Usage {
    /// Looks at some processes; those that are gone count nothing.
    pub fn of(pids: &[u32]) -> Self {
        pids.iter().filter_map(|&pid| Self::of_one(pid)).fold(Self::default(), Self::and)
    }

    /// Two together.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self {
            cpu_ms: self.cpu_ms + other.cpu_ms,
            rss_kib: self.rss_kib + other.rss_kib,
            threads: self.threads + other.threads,
            switches: self.switches + other.switches,
        }
    }

    /// Looks at processes and all that they started.
    pub fn of_families(pids: &[u32]) -> Self {
        Self::of(&families(pids, &parents()))
    }

    fn of_one(pid: u32) -> Option<Self> {
        let (cpu_ms, threads) = parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
        let rss_kib = field_kib(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "VmRSS:").unwrap_or(0);
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
        let statuses = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
        let switches = statuses.map(|status| parse_switches(&status)).sum();
        Some(Self { cpu_ms, rss_kib, threads, switches })
    }

    /// What was used since an earlier look. Memory and threads are those of now.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            cpu_ms: self.cpu_ms.saturating_sub(earlier.cpu_ms),
            switches: self.switches.saturating_sub(earlier.switches),
            ..self
        }
    }
}

/// CPU milliseconds and threads from a `/proc/PID/stat` line.
fn parse_stat(line: &str) -> Option<(u64, u64)> {
    // The name in parentheses may itself hold spaces and parentheses: fields are counted after the last one.
    let fields: Vec<&str> = line.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    let ticks = number(11)? + number(12)?;
    Some((ticks * 1000 / TICKS_PER_SECOND, number(17)?))
}

fn parse_switches(status: &str) -> u64 {
    let field = |name| field_kib(status, name).unwrap_or(0);
    field("voluntary_ctxt_switches:") + field("nonvoluntary_ctxt_switches:")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read_whatever_the_name() {
        let line = "7 (a (b) c) S 1 7 7 0 -1 4194560 900 0 0 0 250 50 3 4 20 0 9 0 12345 1000 200 1844";
        assert_eq!(parse_stat(line), Some((3000, 9)));
        assert_eq!(parse_stat("7 (x"), None);
    }

    #[test]
    fn fields_are_found_by_name() {
        let status = "Name:\tx\nVmRSS:\t   2048 kB\nvoluntary_ctxt_switches:\t5\nnonvoluntary_ctxt_switches:\t2\n";
        assert_eq!(field_kib(status, "VmRSS:"), Some(2048));
        assert_eq!(field_kib(status, "VmHWM:"), None);
        assert_eq!(parse_switches(status), 7);
        assert_eq!(cpu_model("processor\t: 0\nmodel name\t: AMD EPYC\n").as_deref(), Some("AMD EPYC"));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_uses_something() {
        let usage = Usage::of(&[std::process::id()]);
        assert!(usage.rss_kib > 0 && usage.threads > 0, "{usage:?}");
        assert_eq!(Usage::of(&[u32::MAX]), Usage::default());
    }

    #[test]
    fn a_family_is_everything_a_process_started() {
        assert_eq!(families(&[10], &[(11, 10), (12, 11), (13, 1), (10, 1)]), [10, 11, 12]);
        assert_eq!(parse_parent("12 (post (gres) 1) S 10 12 12 0"), Some(10));
        let named = |name: &str, pid| (name.to_owned(), pid);
        let groups = Group::all(&[named("server", 1), named("redis", 2), named("server", 3)]);
        assert_eq!(groups.iter().map(|group| group.pids.as_slice()).collect::<Vec<_>>(), [&[1, 3][..], &[2]]);
    }

    #[test]
    fn the_disk_is_probed_and_left_clean() {
        let dir = tempfile::tempdir().unwrap();
        let machine = Machine::look(Some(dir.path()));
        assert!(machine.fdatasyncs_per_second.unwrap() > 0.0);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
