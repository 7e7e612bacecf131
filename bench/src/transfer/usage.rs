//! Resources that this process has used, as the kernel counts them: CPU time, page faults, memory.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

use anyhow::Context;
use rustix::time::{ClockId, clock_gettime};

use super::order::Usage;

/// User and system time of all threads so far, in nanoseconds.
pub fn cpu_ns() -> u64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Page faults of all threads so far: (minor, major).
pub fn faults() -> anyhow::Result<(u64, u64)> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    parse_faults(&stat).context("/proc/self/stat has another form")
}

/// Page faults since [`faults`] returned `before`.
pub fn faults_since(before: (u64, u64)) -> anyhow::Result<(u64, u64)> {
    let now = faults()?;
    Ok((now.0 - before.0, now.1 - before.1))
}

/// All counters.
pub fn now() -> anyhow::Result<Usage> {
    let (minor_faults, major_faults) = faults()?;
    Ok(Usage {
        cpu_ns: cpu_ns(),
        minor_faults,
        major_faults,
        private_bytes: private()?,
        memfd_bytes: memfds()?,
        sent_bytes: BTreeMap::new(),
    })
}

/// Reads fields 10 and 12, counted after the name, which may contain anything.
fn parse_faults(stat: &str) -> Option<(u64, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(7);
    let minor = fields.next()?.parse().ok()?;
    Some((minor, fields.nth(1)?.parse().ok()?))
}

fn private() -> anyhow::Result<u64> {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup")?;
    let of = |key: &str| {
        let line = rollup.lines().find_map(|l| l.strip_prefix(key));
        line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
    };
    let (all, shared) = (of("Pss:").context("smaps_rollup has no Pss")?, of("Pss_Shmem:"));
    Ok((all - shared.unwrap_or(0)) << 10)
}

/// Allocated bytes of each memory file that the process has open, each counted once.
fn memfds() -> anyhow::Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fd")?.flatten() {
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        let Some(name) = target.to_str().and_then(|t| t.strip_prefix("/memfd:")) else { continue };
        if let Ok(meta) = std::fs::metadata(entry.path()) {
            let name = name.trim_end_matches(" (deleted)");
            found.insert(format!("{name}#{}", meta.ino()), meta.blocks() * 512);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_found_behind_any_name_and_this_process_has_some() {
        let stat = "17 (a) b (c) S 1 2 3 4 5 6 70 8 90 10 250 150 0 0 20 0 1";
        assert_eq!(parse_faults(stat), Some((70, 90)));
        let usage = now().unwrap();
        assert!(usage.minor_faults > 0 && usage.cpu_ns > 0 && usage.private_bytes > 1 << 20);
    }
}
