//! Facts of the machine, for the report: ratios are comparable only on the same machine.

use std::process::Command;

use serde_json::{Value, json};

/// The facts as JSON.
pub fn facts() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let (cpus, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
    let kib = |key: &str| after(&memory, key).and_then(|v| v.trim_end_matches(" kB").parse().ok());
    let bytes = |key: &str| kib(key).map(|kib: u64| kib << 10);
    json!({
        "cpu": after(&cpus, "model name"),
        "cores": std::thread::available_parallelism().map_or(1, usize::from),
        "memory_bytes": bytes("MemTotal"),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load_average": read("/proc/loadavg").split(' ').next(),
        "root": is_root(),
        "version": env!("CARGO_PKG_VERSION"),
    })
}

/// True if this process runs as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Free memory in bytes, page cache included.
pub fn available_bytes() -> u64 {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = after(&memory, "MemAvailable").and_then(|v| v.trim_end_matches(" kB").parse().ok());
    kib.map_or(0, |kib: u64| kib << 10)
}

/// True if `program` is installed.
pub fn has(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

/// Value of the first line `key : value`.
fn after(text: &str, key: &str) -> Option<String> {
    let line = text.lines().find_map(|l| l.strip_prefix(key))?;
    Some(line.trim_start_matches([' ', '\t', ':']).trim().to_owned())
}
