//! What Linux says of a process: CPU time and peak memory, out of `/proc`. Owns no process.

use std::time::Duration;

/// User and system time of every thread so far, also of a zombie; `None` where the process is gone.
pub fn cpu_time(pid: u32) -> Option<Duration> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Highest resident size so far, in bytes; `None` for a zombie too.
pub fn peak_rss_bytes(pid: u32) -> Option<u64> {
    parse_peak(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

/// Fields 14 and 15, counted after the name, which may hold anything.
fn parse_stat(stat: &str) -> Option<Duration> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Some(Duration::from_millis((user + system) * 1000 / per_second))
}

fn parse_peak(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_brackets_does_not_shift_the_fields() {
        let stat = "17 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 250 150 0 0 20 0 1";
        let ticks = 400_000 / rustix::param::clock_ticks_per_second();
        assert_eq!(parse_stat(stat), Some(Duration::from_millis(ticks)));
        assert_eq!(parse_stat("17 (a"), None);
    }

    #[test]
    fn this_process_has_used_memory_and_reads_its_time() {
        let me = std::process::id();
        assert!(peak_rss_bytes(me).expect("own status") > 1 << 20);
        assert!(cpu_time(me).is_some());
        assert_eq!(parse_peak("VmHWM:\t     512 kB\n"), Some(512 * 1024));
    }
}
