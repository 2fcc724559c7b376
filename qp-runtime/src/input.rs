//! Reading files that others wrote, with a bound on what is taken into memory.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Most bytes of a small file of a model: a configuration or a tokenizer.
pub const SMALL: u64 = 256 << 20;
/// Most bytes of a text.
pub const TEXT: u64 = 1 << 30;

/// The whole regular file `path`, such as one that lies in a model's directory: nobody fills a pipe there.
///
/// # Errors
/// If it cannot be read, has more than `most` bytes, or is no file.
pub fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    bounded(open(path, false)?, most)
}

/// Opens the regular file `path`, or a pipe if `pipes` are welcome.
///
/// # Errors
/// If it cannot be opened, or is something else.
pub fn open(path: &Path, pipes: bool) -> Result<File> {
    // Looked at before it is opened: opening a pipe waits for its writer.
    let kind = std::fs::metadata(path)?.file_type();
    if !(kind.is_file() || pipes && is_pipe(kind)) {
        let expected = if pipes { "a file or a pipe" } else { "a file" };
        let found = match kind {
            _ if kind.is_dir() => "a directory",
            _ if is_pipe(kind) => "a pipe",
            // A device may never end.
            _ => "a device or a socket",
        };
        return Err(Error::new(ErrorKind::InvalidInput, format!("it is {found}, expected {expected}")));
    }
    File::open(path)
}

/// The text in the file `path`, or on standard input if it is `-`, without a byte order mark.
///
/// # Errors
/// If it cannot be read, is not UTF-8 or has more than [`TEXT`] bytes; the message names it.
pub fn text(path: &Path) -> std::result::Result<String, String> {
    let bytes = match path.to_str() {
        Some("-") => bounded(std::io::stdin().lock(), TEXT),
        _ => open(path, true).and_then(|file| bounded(file, TEXT)),
    };
    let bytes = bytes.map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    let mut text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        format!("{} is not UTF-8 (byte {at}): convert it to UTF-8 first", path.display())
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// All that `source` gives.
///
/// # Errors
/// If reading fails, or there are more than `most` bytes.
pub fn bounded(source: impl Read, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(Error::new(ErrorKind::FileTooLarge, format!("it has more than the {most} bytes that are read")));
    }
    Ok(bytes)
}

#[cfg(unix)]
fn is_pipe(kind: std::fs::FileType) -> bool {
    use std::os::unix::fs::FileTypeExt;
    kind.is_fifo()
}

#[cfg(not(unix))]
fn is_pipe(_: std::fs::FileType) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        let message = |r: Result<Vec<u8>>| r.unwrap_err().to_string();
        assert_eq!(message(read(&path, 4)), "it has more than the 4 bytes that are read");
        assert_eq!(message(read(dir.path(), 4)), "it is a directory, expected a file");
        assert_eq!(message(bounded(std::io::repeat(0), 1000)), "it has more than the 1000 bytes that are read");
        std::fs::write(&path, "\u{feff}é").unwrap();
        assert_eq!(text(&path).unwrap(), "é");
        std::fs::write(&path, b"ab\xff").unwrap();
        assert!(text(&path).unwrap_err().ends_with("f is not UTF-8 (byte 2): convert it to UTF-8 first"));
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_file_is_named() {
        let message = |path: &Path, pipes| open(path, pipes).unwrap_err().to_string();
        assert_eq!(message(Path::new("/dev/zero"), true), "it is a device or a socket, expected a file or a pipe");
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        if made.is_ok_and(|s| s.success()) {
            // Without waiting for a writer.
            assert_eq!(message(&pipe, false), "it is a pipe, expected a file");
            let model = crate::model::Files::Dir(dir.path().to_owned());
            assert!(model.read("pipe").unwrap_err().to_string().contains("it is a pipe"));
        }
    }
}
