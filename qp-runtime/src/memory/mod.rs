//! Memory of this machine.

pub mod arena;

/// Bytes of main memory that programs can still take without pushing others out; 0 where the system does not say.
pub fn available() -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else { return 0 };
    parse(&text).unwrap_or(0)
}

/// The figure of the line `MemAvailable:   N kB`, in bytes.
fn parse(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn lines_of_meminfo() {
        assert_eq!(super::parse("MemTotal:  24 kB\nMemAvailable:   12 kB\n"), Some(12 * 1024));
        assert_eq!(super::parse("MemTotal:  24 kB\n"), None);
        assert_eq!(super::parse("MemAvailable:   twelve kB\n"), None);
    }
}
