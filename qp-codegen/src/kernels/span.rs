//! Where a token's values lie in a buffer that holds more.

use crate::ir::V;

/// Value `i` of token `t` lies at `first + t · stride + i`: a part of each row of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// Of token 0.
    pub first: u32,
    /// From one token to the next.
    pub stride: u32,
}

impl Span {
    /// Elements up to the end of the last of `tokens` rows of `values`.
    pub fn len(self, tokens: u32, values: u32) -> u64 {
        u64::from(self.first) + u64::from(self.stride) * u64::from(tokens - 1) + u64::from(values)
    }

    /// Rows of `stride` values, from the beginning.
    pub fn rows(stride: u32) -> Span {
        Span { first: 0, stride }
    }

    /// Where the values of `token` begin.
    pub(in crate::kernels) fn at<'b>(self, token: V<'b>) -> V<'b> {
        token * self.stride + self.first
    }
}
