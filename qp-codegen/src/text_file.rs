//! Reading text files that a user names: specs, tables, plans.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// Most bytes of such a file. The largest table, of 2^20 entries of four, has half of that.
pub const MOST_BYTES: u64 = 64 << 20;

/// The text of a regular file of at most [`MOST_BYTES`]. Devices and pipes are not opened: reading one may block, or never
/// end.
///
/// # Errors
/// What the system says; a file that is no regular file, is too large, or is not UTF-8.
pub fn read(path: &Path) -> io::Result<String> {
    let refuse = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    let too_large = || refuse(&format!("it is larger than {} MiB", MOST_BYTES >> 20));
    let about = fs::metadata(path)?;
    if about.is_dir() {
        return refuse("it is a folder");
    }
    if !about.is_file() {
        return refuse("it is no regular file");
    }
    if about.len() > MOST_BYTES {
        return too_large();
    }
    // It may have changed meanwhile, and some files of the system do not tell their size.
    let mut bytes = Vec::with_capacity(about.len() as usize + 1);
    File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        return too_large();
    }
    String::from_utf8(bytes).or_else(|_| refuse("it is not UTF-8 text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_a_sane_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        fs::write(&file, "text").unwrap();
        assert_eq!(read(&file).unwrap(), "text");
        fs::write(&file, b"\xff").unwrap();
        assert!(read(&file).unwrap_err().to_string().contains("UTF-8"));
        File::create(&file).unwrap().set_len(MOST_BYTES + 1).unwrap();
        assert!(read(&file).unwrap_err().to_string().contains("64 MiB"));
        assert!(read(dir.path()).unwrap_err().to_string().contains("folder"));
        assert_eq!(read(&dir.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
        #[cfg(unix)]
        for device in ["/dev/zero", "/dev/stdin"] {
            if let Err(e) = read(Path::new(device)) {
                assert!(e.to_string().contains("regular") || e.kind() == io::ErrorKind::NotFound, "{e}");
            }
        }
    }
}
