//! Places as editors count them: lines, and in a line units of UTF-16. Paths as URIs.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use lsp_types::{Position, Uri};

/// Where the lines of a text begin.
pub struct Lines {
    starts: Vec<usize>,
}

impl Lines {
    /// The lines of `text`, which end as the protocol says: with a line feed, a return, or both.
    pub fn new(text: &str) -> Self {
        let bytes = text.as_bytes();
        let ends = |i: &usize| match bytes[*i] {
            b'\n' => true,
            b'\r' => bytes.get(i + 1) != Some(&b'\n'),
            _ => false,
        };
        Lines { starts: std::iter::once(0).chain((0..bytes.len()).filter(ends).map(|i| i + 1)).collect() }
    }

    /// Line and unit of the byte `at` of the text.
    pub fn position(&self, text: &str, at: usize) -> Position {
        let line = self.starts.partition_point(|s| *s <= at) - 1;
        let before = text.get(self.starts[line]..at.min(text.len())).unwrap_or("");
        Position { line: line as u32, character: before.encode_utf16().count() as u32 }
    }

    /// The byte of a place; of one behind the end of a line or of the text, that end.
    pub fn offset(&self, text: &str, at: Position) -> usize {
        let Some(&start) = self.starts.get(at.line as usize) else { return text.len() };
        let end = self.starts.get(at.line as usize + 1).copied().unwrap_or(text.len());
        let line = text[start..end].trim_end_matches(['\n', '\r']);
        let mut units = 0;
        for (i, c) in line.char_indices() {
            units += c.len_utf16();
            if units > at.character as usize {
                return start + i;
            }
        }
        start + line.len()
    }

    /// The lines and units of some bytes.
    pub fn range(&self, text: &str, bytes: Range<usize>) -> lsp_types::Range {
        lsp_types::Range { start: self.position(text, bytes.start), end: self.position(text, bytes.end) }
    }
}

/// The path that a URI means. What is no file on a disk (an unsaved text) has a path that no file has.
pub fn path_of(uri: &Uri) -> PathBuf {
    let text = uri.as_str();
    let Some(path) = text.strip_prefix("file://") else { return PathBuf::from(text) };
    // What stands before the path is a host, which is this one.
    let path = &path[path.find('/').unwrap_or(0)..];
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..2).and_then(|d| std::str::from_utf8(d).ok()).filter(|_| *first == b'%');
        match digits.and_then(|d| u8::from_str_radix(d, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    let path = String::from_utf8_lossy(&bytes).into_owned();
    // `/C:/folder` is `C:/folder` on Windows.
    let drive = cfg!(windows) && path.as_bytes().get(2) == Some(&b':');
    PathBuf::from(if drive { &path[1..] } else { &path[..] })
}

/// The URI of a path; nothing where it cannot be written as one.
pub fn uri_of(path: &Path) -> Option<Uri> {
    let text = path.to_str()?;
    if !path.is_absolute() {
        return Uri::from_str(text).ok().filter(|_| text.contains(':'));
    }
    let text = text.replace('\\', "/");
    let mut uri = String::from(if text.starts_with('/') { "file://" } else { "file:///" });
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' => uri.push(byte.into()),
            _ => uri.push_str(&format!("%{byte:02X}")),
        }
    }
    Uri::from_str(&uri).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_in_units_of_utf_16() {
        let text = "// größer 𝛌 x\r\nb\rc\n";
        let lines = Lines::new(text);
        let x = text.find('x').unwrap();
        // The Greek letter has two units and four bytes.
        assert_eq!(lines.position(text, x), Position { line: 0, character: 13 });
        assert_eq!(lines.offset(text, Position { line: 0, character: 13 }), x);
        assert_eq!(lines.position(text, text.find('c').unwrap()), Position { line: 2, character: 0 });
        assert_eq!(lines.offset(text, Position { line: 1, character: 7 }), text.find('\r').unwrap() + 3);
        assert_eq!(lines.offset(text, Position { line: 9, character: 0 }), text.len());
        for at in (0..=text.len()).filter(|at| text.is_char_boundary(*at) && !text[*at..].starts_with('\n')) {
            assert_eq!(lines.offset(text, lines.position(text, at)), at);
        }
    }

    #[cfg(unix)]
    #[test]
    fn paths_become_uris_and_return() {
        let path = Path::new("/tmp/größer as ever/a%b.qspec");
        let uri = uri_of(path).unwrap();
        assert_eq!(uri.as_str(), "file:///tmp/gr%C3%B6%C3%9Fer%20as%20ever/a%25b.qspec");
        assert_eq!(path_of(&uri), path);
        let unsaved = Uri::from_str("untitled:Untitled-1").unwrap();
        assert_eq!(uri_of(&path_of(&unsaved)), Some(unsaved));
    }
}
