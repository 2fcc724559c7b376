//! Texts that end an answer.

/// Finds the first of several texts in a text that comes in parts.
#[derive(Debug)]
pub struct StopTexts {
    stop: Vec<String>,
    /// Text that may be the beginning of one of them.
    held: String,
}

impl StopTexts {
    /// Looks for these texts; empty ones are never found.
    pub fn new(stop: Vec<String>) -> Self {
        StopTexts { stop: stop.into_iter().filter(|s| !s.is_empty()).collect(), held: String::new() }
    }

    /// Adds text; what is certain now, and whether one of the texts was found, before which the certain text ends.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let found = self.stop.iter().filter_map(|s| self.held.find(s.as_str())).min();
        if let Some(at) = found {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        // The longest end of the text with which one of them may begin.
        let begins = |tail: &str| self.stop.iter().any(|s| s.starts_with(tail));
        let keep = self.held.char_indices().map(|(i, _)| i).find(|&i| begins(&self.held[i..]));
        let rest = self.held.split_off(keep.unwrap_or(self.held.len()));
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, once nothing follows.
    pub fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stop: &[&str], parts: &[&str]) -> (Vec<String>, bool) {
        let mut texts = StopTexts::new(stop.iter().map(|s| (*s).to_owned()).collect());
        let mut out = Vec::new();
        for part in parts {
            let (text, found) = texts.push(part);
            out.push(text);
            if found {
                return (out, true);
            }
        }
        out.push(texts.rest());
        (out, false)
    }

    #[test]
    fn texts_end_before_the_first_stop_text() {
        let strings = |v: &[&str]| v.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        assert_eq!(run(&[], &["ab", "c"]), (strings(&["ab", "c", ""]), false));
        assert_eq!(run(&["", "END"], &["aE", "N", "x EN", "D b"]), (strings(&["a", "", "ENx ", ""]), true));
        assert_eq!(run(&["bcd", "b"], &["abcd"]), (strings(&["a"]), true));
        assert_eq!(run(&["cd", "bcde"], &["abcd"]), (strings(&["ab"]), true));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]), (strings(&["", "", "a", ""]), true));
        assert_eq!(run(&["äö"], &["xä", "ä", "ö"]), (strings(&["x", "ä", ""]), true));
        assert_eq!(run(&["\n\n"], &["a\n"]), (strings(&["a", "\n"]), false));
    }
}
