//! Files that commands write.

use std::io::Write;
use std::path::Path;

use super::Error;

/// Writes a file whole or not at all.
pub(super) fn write(path: &Path, text: &str) -> Result<(), Error> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = |e: std::io::Error| format!("cannot write {}: {e}", path.display());
    std::fs::create_dir_all(folder).map_err(failed)?;
    let mut file = tempfile::Builder::new().permissions(permissions()).tempfile_in(folder).map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    file.persist(path).map_err(|e| failed(e.error))?;
    Ok(())
}

/// What a new file usually gets; the process's mask is taken off it.
#[cfg(unix)]
fn permissions() -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o666)
}
