//! Opening the model that a command is given.

use std::path::Path;

use super::{Error, output};
use crate::model::Model;

/// Opens the model `path` and says what should be known of it.
///
/// # Errors
/// As [`Model::open`].
pub fn open(path: &Path) -> Result<Model, Error> {
    let model = Model::open(path)?;
    model.notes.iter().for_each(output::note);
    Ok(model)
}
