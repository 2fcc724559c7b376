//! Where a model's files are: in a directory, or inside a GGUF file that stands for one.

use std::path::{Path, PathBuf};

use super::Error;
use super::gguf::Gguf;
use crate::input;

/// A model's small files by name.
#[derive(Debug)]
pub enum Files {
    /// Hugging Face's layout, or a quantized checkpoint.
    Dir(PathBuf),
    /// One file with everything in it.
    Gguf(Box<Gguf>),
}

impl Files {
    /// Opens the directory or GGUF file `path`.
    ///
    /// # Errors
    /// If there is nothing there, or it is neither, or the GGUF file is damaged or of an unsupported kind.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if meta.is_dir() {
            return Ok(Files::Dir(path.to_owned()));
        }
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            return Ok(Files::Gguf(Box::new(Gguf::open(path)?)));
        }
        Err(Error::NotADirectory { path: path.to_owned() })
    }

    /// The path of the small file `name`, for messages.
    pub fn path(&self, name: &str) -> PathBuf {
        match self {
            Files::Dir(dir) => dir.join(name),
            Files::Gguf(file) => file.path().to_owned(),
        }
    }

    /// The small file `name`; `None` if there is none.
    ///
    /// # Errors
    /// If it cannot be read, or not be made from what a GGUF file says.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        match self {
            Files::Dir(dir) => {
                let path = dir.join(name);
                match input::read(&path, input::SMALL) {
                    Ok(bytes) => Ok(Some(bytes)),
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    Err(e) => Err(Error::io(&path, e)),
                }
            }
            Files::Gguf(file) => file.read(name),
        }
    }

    /// As [`Files::read`], as text.
    ///
    /// # Errors
    /// If it cannot be read, or is not UTF-8.
    pub fn text(&self, name: &str) -> Result<Option<String>, Error> {
        let text = |bytes| String::from_utf8(bytes).map_err(|e| Error::file(&self.path(name), e.to_string()));
        self.read(name)?.map(text).transpose()
    }
}
