//! Writing files whole: beside their place and renamed, so that a full disk or a stop leaves what was there.

use std::fs::{self, File};
use std::io::{Error, ErrorKind, Result, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// Writes the file `path`, replacing it at once or not at all; folders on the way are made. A link is followed to the
/// file that it names. What is no regular file (a pipe, `/dev/stdout`) is written to as it is.
///
/// # Errors
/// If it cannot be written, is a directory, or is a link to nothing.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut whole = match target(path)? {
        Target::File(path) => Whole::of(path)?,
        Target::Stream => return File::options().write(true).open(path)?.write_all(bytes),
    };
    whole.file().write_all(bytes)?;
    whole.keep()
}

/// A file that is written under another name in its folder, one that nothing has, and takes its place when it is kept. Dropped
/// before, it is gone.
#[derive(Debug)]
pub struct Whole {
    new: NamedTempFile,
    path: PathBuf,
}

impl Whole {
    /// Begins the file `path`; folders on the way are made. A link is followed to the file that it names.
    ///
    /// # Errors
    /// If it cannot be written, is a link to nothing, or is something else than a regular file.
    pub fn create(path: &Path) -> Result<Whole> {
        match target(path)? {
            Target::File(path) => Whole::of(path),
            Target::Stream => Err(Error::new(ErrorKind::InvalidInput, "it is no regular file")),
        }
    }

    fn of(path: PathBuf) -> Result<Whole> {
        let folder = folder(&path);
        fs::create_dir_all(folder)?;
        let mut new = tempfile::Builder::new();
        // As any file that a program makes, with the process's mask taken off; temporary ones are private by default.
        #[cfg(unix)]
        new.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let new = new.tempfile_in(folder)?;
        // Who may read what is replaced may read what replaces it, and nobody else.
        if let Ok(there) = fs::metadata(&path) {
            new.as_file().set_permissions(there.permissions())?;
        }
        Ok(Whole { new, path })
    }

    /// What is written to.
    pub fn file(&mut self) -> &mut File {
        self.new.as_file_mut()
    }

    /// Where it lies until it is kept.
    pub fn place(&self) -> &Path {
        self.new.path()
    }

    /// Gives it its name.
    ///
    /// # Errors
    /// If it cannot be; what had the name still has it.
    pub fn keep(self) -> Result<()> {
        self.new.as_file().sync_all()?;
        self.new.persist(self.path).map(drop).map_err(|e| e.error)
    }
}

/// What can be seen beforehand: whether [`write()`] is likely to succeed. To be asked before long work.
///
/// # Errors
/// As [`write()`], and if the folder cannot be written.
pub fn check(path: &Path) -> Result<()> {
    let Target::File(path) = &target(path)? else {
        // Not opened: who reads a pipe would see its end when it is closed again.
        return Ok(());
    };
    let folder = folder(path);
    fs::create_dir_all(folder)?;
    tempfile::tempfile_in(folder).map(drop)
}

/// What a path means.
enum Target {
    /// A regular file, or one to be made: what a link names, the path itself otherwise.
    File(PathBuf),
    /// A pipe or a device, which is opened by the path as it is: what its link names need not be a path (`pipe:[7]`).
    Stream,
}

/// What `path` means.
///
/// # Errors
/// If it is a link to nothing, or a directory.
fn target(path: &Path) -> Result<Target> {
    if dangles(path) {
        return Err(Error::new(ErrorKind::NotFound, "it is a link to nothing: remove it, or make what it names"));
    }
    if path.is_dir() {
        return Err(Error::new(ErrorKind::IsADirectory, "it is a directory: give the name of a file"));
    }
    if fs::metadata(path).is_ok_and(|m| !m.is_file()) {
        return Ok(Target::Stream);
    }
    Ok(Target::File(if path.is_symlink() { fs::canonicalize(path)? } else { path.to_owned() }))
}

/// True if `path` is a link whose end is not there.
pub fn dangles(path: &Path) -> bool {
    path.is_symlink() && !path.exists()
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_links_and_others() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        write(&at("new/folder/file"), b"1").unwrap();
        assert_eq!(fs::read(at("new/folder/file")).unwrap(), b"1");
        write(&at("new/folder/file"), b"2").unwrap();
        assert_eq!(fs::read_dir(at("new/folder")).unwrap().count(), 1, "nothing is left beside it");
        assert!(write(&at("new"), b"").unwrap_err().to_string().contains("is a directory"));
        let mut half = Whole::create(&at("new/folder/file")).unwrap();
        half.file().write_all(b"half").unwrap();
        assert_eq!(half.place().parent(), Some(&*at("new/folder")));
        drop(half);
        assert_eq!(fs::read(at("new/folder/file")).unwrap(), b"2");
        assert_eq!(fs::read_dir(at("new/folder")).unwrap().count(), 1);
        #[cfg(unix)]
        {
            use std::fs::Permissions;
            use std::os::unix::fs::PermissionsExt;
            std::os::unix::fs::symlink(at("new/folder/file"), at("link")).unwrap();
            write(&at("link"), b"3").unwrap();
            assert!(at("link").is_symlink() && fs::read(at("new/folder/file")).unwrap() == b"3");
            std::os::unix::fs::symlink(at("nowhere"), at("dangling")).unwrap();
            for result in [check(&at("dangling")), write(&at("dangling"), b"")] {
                assert!(result.unwrap_err().to_string().contains("link to nothing"));
            }
            // What could be read and run still can, by the same.
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
            fs::set_permissions(at("new/folder/file"), Permissions::from_mode(0o740)).unwrap();
            write(&at("link"), b"4").unwrap();
            assert_eq!(mode(&at("new/folder/file")), 0o740);
            // A device stays one.
            write(Path::new("/dev/null"), b"4").unwrap();
            assert!(!fs::metadata("/dev/null").unwrap().is_file());
        }
        // What a shell's `>(command)` and `/dev/stdout` before a `|` are: links to what has no path.
        #[cfg(target_os = "linux")]
        {
            let (mut reader, writer) = std::io::pipe().unwrap();
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&writer));
            check(Path::new(&path)).unwrap();
            write(Path::new(&path), b"5").unwrap();
            drop(writer);
            let mut read = Vec::new();
            std::io::Read::read_to_end(&mut reader, &mut read).unwrap();
            assert_eq!(read, b"5");
        }
    }
}
