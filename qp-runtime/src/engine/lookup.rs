//! Drafts without a second model: the tokens that followed, earlier in a text, what it ends with now.

/// Longest end of a text that is looked for.
const LONGEST: usize = 4;
/// Shortest.
const SHORTEST: usize = 2;

/// Up to `most` tokens that may follow `text`: those behind the latest earlier place where its last tokens stand, of as
/// many of these as possible. Empty if there is none.
pub fn draft(text: &[u32], most: usize) -> &[u32] {
    for len in (SHORTEST..=LONGEST.min(text.len().saturating_sub(1))).rev() {
        let end = &text[text.len() - len..];
        // The end itself is no earlier place.
        if let Some(at) = text[..text.len() - 1].windows(len).rposition(|w| w == end) {
            let follows = &text[at + len..];
            return &follows[..most.min(follows.len())];
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::draft;

    #[test]
    fn the_latest_place_of_the_longest_end_counts() {
        let text = [1, 2, 3, 9, 8, 2, 3, 7, 6, 1, 2, 3];
        assert_eq!(draft(&text, 2), [9, 8]);
        assert_eq!(draft(&text, 100), [9, 8, 2, 3, 7, 6, 1, 2, 3]);
        let text = [5, 2, 3, 9, 8, 2, 3, 7, 6, 1, 2, 3];
        assert_eq!(draft(&text, 3), [7, 6, 1]);
        // A place may reach into the end.
        assert_eq!(draft(&[4, 4, 4], 5), [4]);
        assert_eq!(draft(&[1, 2, 3, 4], 5), [0u32; 0]);
        assert_eq!(draft(&[1], 5), [0u32; 0]);
        assert_eq!(draft(&[], 5), [0u32; 0]);
    }
}
