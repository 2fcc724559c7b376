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
    /// Rows of `stride` values, from the beginning.
    pub fn rows(stride: u32) -> Span {
        Span { first: 0, stride }
    }

    /// Where the values of `token` begin.
    pub(super) fn at<'b>(self, token: V<'b>) -> V<'b> {
        token * self.stride + self.first
    }
}
