//! CPU time and peak memory of a process, as Linux counts them. Owns no process.

use std::time::Duration;

use procfs::process::Process;

/// User and system time of all threads so far, also of a zombie; `None` if the process is gone.
pub fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = Process::new(pid.try_into().ok()?).ok()?.stat().ok()?;
    let per_second = procfs::ticks_per_second().max(1);
    Some(Duration::from_millis((stat.utime + stat.stime) * 1000 / per_second))
}

/// Highest resident size so far, in bytes; `None` for a zombie too.
pub fn peak_rss_bytes(pid: u32) -> Option<u64> {
    let status = Process::new(pid.try_into().ok()?).ok()?.status().ok()?;
    Some(status.vmhwm? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_used_memory_and_reads_its_time() {
        let me = std::process::id();
        assert!(peak_rss_bytes(me).expect("own status") > 1 << 20);
        assert!(cpu_time(me).is_some());
        assert_eq!(cpu_time(u32::MAX), None);
    }
}
