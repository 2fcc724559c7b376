//! The one maker of names in printed source.

use std::collections::BTreeMap;

/// Words of the language and of CUDA's built-ins that a kernel might want as names.
const RESERVED: &str = "\
    abs alignas alignof and asm auto bitand bitor blockDim blockIdx bool break case catch char class \
    compl const constexpr continue default delete do double else enum explicit export extern fabsf false \
    float fmaxf fminf for friend goto gridDim if inline int long max min mutable namespace new not \
    operator or private protected public register return short signed sizeof smem static struct switch \
    template this threadIdx throw true try typedef typename union unsigned using virtual void volatile \
    warpSize while xor";

/// Gives each thing a name that no other thing in sight has.
#[derive(Default)]
pub(super) struct Names {
    /// Names in sight, with the depth of the scope that made each.
    taken: BTreeMap<String, usize>,
    depth: usize,
    /// Next number of each prefix.
    next: BTreeMap<String, u32>,
}

impl Names {
    /// Opens a scope.
    pub(super) fn open(&mut self) {
        self.depth += 1;
    }

    /// Closes the innermost scope: its names are free again.
    pub(super) fn close(&mut self) {
        self.depth -= 1;
        let depth = self.depth;
        self.taken.retain(|_, d| *d <= depth);
    }

    /// `wish` made an identifier, with a number where it is taken.
    pub(super) fn wish(&mut self, wish: &str) -> String {
        let mut name: String = wish.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        // Helper functions are called `qp_…`, built-ins and vector makers begin with underscores or `make_`.
        let ours = ["qp_", "_", "make_"].iter().any(|p| name.starts_with(p));
        if ours || name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            name.insert_str(0, "v_");
        }
        let mut unique = name.clone();
        let mut n = 1;
        while RESERVED.split(' ').any(|r| r == unique) || self.taken.contains_key(&unique) {
            n += 1;
            unique = format!("{name}_{n}");
        }
        self.taken.insert(unique.clone(), self.depth);
        unique
    }

    /// `prefix` with the next number.
    pub(super) fn number(&mut self, prefix: &str) -> String {
        let n = self.next.entry(prefix.into()).or_default();
        *n += 1;
        let name = format!("{prefix}{}", *n - 1);
        self.wish(&name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_in_their_scope_and_free_after_it() {
        let mut n = Names::default();
        assert_eq!(n.wish("x"), "x");
        assert_eq!(n.wish("x"), "x_2");
        assert_eq!(n.wish("int"), "int_2");
        assert_eq!(n.wish("qp_x"), "v_qp_x");
        assert_eq!(n.wish("2.5"), "v_2_5");
        n.open();
        assert_eq!(n.wish("y"), "y");
        assert_eq!(n.number("v"), "v0");
        n.close();
        assert_eq!(n.wish("y"), "y");
        assert_eq!(n.number("v"), "v1");
    }
}
