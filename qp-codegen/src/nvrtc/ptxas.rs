//! What ptxas says about a compiled kernel: registers, spills, stack, shared memory.

/// Resources of a compiled kernel, from the compiler's log. With several kernels in one source, the largest of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes a thread stores because registers ran out.
    pub spill_stores: u32,
    /// Bytes a thread loads back.
    pub spill_loads: u32,
    /// Bytes of stack of a thread.
    pub stack: u32,
    /// Bytes of static shared memory of a block.
    pub shared: u32,
}

/// Reads the lines of `--ptxas-options=-v`; `None` if the log has none.
pub(super) fn parse(log: &str) -> Option<Usage> {
    let mut usage = Usage::default();
    let mut found = false;
    for line in log.lines() {
        // "ptxas info    : Used 56 registers, used 0 barriers, 160 bytes cumulative stack size, 1024 bytes smem"
        // "    160 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
        for part in line.rsplit(": ").next().unwrap_or(line).split(',') {
            let mut words = part.split_whitespace().skip_while(|w| w.parse::<u32>().is_err());
            let Some(number) = words.next().and_then(|w| w.parse::<u32>().ok()) else { continue };
            let unit: Vec<&str> = words.collect();
            let field = match unit.as_slice() {
                ["registers"] => {
                    found = true;
                    &mut usage.registers
                }
                ["bytes", "spill", "stores"] => &mut usage.spill_stores,
                ["bytes", "spill", "loads"] => &mut usage.spill_loads,
                ["bytes", "stack", "frame"] => &mut usage.stack,
                ["bytes", "smem"] => &mut usage.shared,
                _ => continue,
            };
            *field = number.max(*field);
        }
    }
    found.then_some(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_field() {
        let log = "ptxas info    : 0 bytes gmem\n\
                   ptxas info    : Compiling entry function 'k' for 'sm_80'\n\
                   ptxas info    : Function properties for k\n\
                   ptxas         .     160 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n\
                   ptxas info    : Used 56 registers, used 1 barriers, 160 bytes cumulative stack size, \
                   1024 bytes smem, 364 bytes cmem[0]\n";
        let usage = parse(log).expect("has the lines");
        assert_eq!(usage, Usage { registers: 56, spill_stores: 8, spill_loads: 12, stack: 160, shared: 1024 });
    }

    #[test]
    fn older_layout_of_the_lines() {
        let log = "ptxas info    : Function properties for k\n\
                   \u{20}   0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n\
                   ptxas info    : Used 255 registers, 400 bytes cmem[0]\n";
        let usage = parse(log).expect("has the lines");
        assert_eq!((usage.registers, usage.spill_stores, usage.spill_loads), (255, 4, 4));
    }

    #[test]
    fn a_log_without_them() {
        assert_eq!(parse(""), None);
        assert_eq!(parse("warning: 3 registers were harmed\n"), None);
    }
}
