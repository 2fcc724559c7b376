//! Models whose `config.json` says that their matrices are quantized (`quantization_config`): the file
//! `specs/formats/imports.toml` says which format and layout of `specs/formats` they have.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use qp_codegen::formats;
use qp_codegen::reader::{Book, Reader};
use qp_codegen::spec::Shape;
use qp_codegen::spec::format::Cover;
use serde::Deserialize;
use serde_json::Value;

use super::Error;
use super::program::Program;
use super::tensors::{Kind, Piece, TensorDir};

/// An entry of `imports.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Import {
    /// The format.
    format: String,
    /// Its layout.
    layout: String,
    /// JSON pointers into `quantization_config`, and what must stand there. `false` may be absent too.
    when: BTreeMap<String, Value>,
    /// What must not stand there.
    #[serde(default)]
    unless: BTreeMap<String, Value>,
    /// A tensor that gives each column the number of its group, if there is one: groups must be neighbours in order.
    #[serde(default)]
    groups: Option<String>,
}

#[derive(Deserialize)]
struct Imports {
    import: Vec<Import>,
}

fn imports() -> &'static [Import] {
    static ALL: OnceLock<Vec<Import>> = OnceLock::new();
    // A test holds the file, which is part of the program, to being sound.
    ALL.get_or_init(|| toml::from_str::<Imports>(formats::imports()).map(|i| i.import).unwrap_or_default())
}

/// How a model's matrices are stored.
#[derive(Clone, Debug)]
pub struct Stored {
    book: Arc<Book>,
    layout: String,
    groups: Option<String>,
}

impl PartialEq for Stored {
    fn eq(&self, other: &Self) -> bool {
        (&self.book.format, &self.layout, &self.groups) == (&other.book.format, &other.layout, &other.groups)
    }
}

impl Stored {
    /// What the value of `quantization_config` says; nothing if no entry of `imports.toml` fits it.
    pub fn find(config: &Value) -> Option<Stored> {
        let holds = |(pointer, wanted): (&String, &Value)| match config.pointer(pointer) {
            None | Some(Value::Null) => *wanted == Value::Bool(false),
            Some(found) => found == wanted,
        };
        let stands = |(pointer, refused): (&String, &Value)| config.pointer(pointer) == Some(refused);
        let import = imports().iter().find(|i| i.when.iter().all(holds) && !i.unless.iter().any(stands))?;
        let format = formats::get(&import.format)?;
        let book = Arc::new(Book::new(format.clone()));
        Some(Stored { book, layout: import.layout.clone(), groups: import.groups.clone() })
    }

    /// Names of the formats that are known, for messages.
    pub fn known() -> String {
        imports().iter().map(|i| i.format.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// Joins the tensors of each matrix of `program` that is stored so to one, `NAME.weight`.
    ///
    /// # Errors
    /// If one of them is missing or has another shape, or groups of columns are not neighbours.
    pub fn join(&self, tensors: &mut TensorDir, program: &Program) -> Result<(), Error> {
        let format = &self.book.format;
        let wrong = |name: &str, why: String| {
            let what = format!("layer '{name}', which config.json says to be {}: {why}", format.name);
            Error::Unsupported { path: tensors_path(tensors), what, supported: "what the layout says".to_owned() }
        };
        let Some(layout) = format.layout(&self.layout) else { return Ok(()) };
        let mut joined = Vec::new();
        for id in program.ids() {
            let layer = program.layer(id);
            let name = &layer.name;
            let names: Vec<String> = layout.tensors.iter().map(|t| format!("{name}.{}", t.name)).collect();
            // Layers that the config leaves out, such as the output layer, are as they are.
            if !names.iter().all(|n| tensors.contains(n)) {
                continue;
            }
            let shape = Shape { rows: layer.rows as u32, cols: layer.cols as u32 };
            let reader = Reader::new(&self.book, layout, shape).map_err(|e| wrong(name, e.to_string()))?;
            let mut pieces = Vec::new();
            for (name, wanted) in names.iter().zip(reader.tensors()) {
                let piece = tensors.piece(name)?;
                let sides = |dims: Vec<u64>| dims.into_iter().filter(|n| *n != 1).collect::<Vec<u64>>();
                let (found, expected) = (piece.shape.iter().map(|n| *n as u64).collect(), wanted.dims.clone());
                if sides(found) != sides(expected) || piece.bytes.as_slice().len() as u64 != wanted.bytes {
                    let why = format!("'{name}' is {:?}, expected {:?}", piece.shape, wanted.dims);
                    return Err(wrong(&layer.name, why));
                }
                pieces.push(piece);
            }
            let groups = self.groups.as_ref().map(|g| format!("{name}.{g}")).filter(|g| tensors.contains(g));
            if let Some(groups) = &groups
                && !self.in_order(&tensors.piece(groups)?)
            {
                let why = format!("'{groups}' orders columns by activations (desc_act), which is not supported");
                return Err(wrong(name, why));
            }
            joined.push((name.clone(), names, groups, Arc::new(reader), pieces));
        }
        for (name, names, groups, reader, pieces) in joined {
            names.iter().for_each(|n| drop(tensors.take(n)));
            if let Some(groups) = groups {
                let piece = tensors.piece(&groups)?;
                drop(tensors.take(&groups));
                tensors.left_out.push(piece);
            }
            tensors.add(format!("{name}.weight"), Kind::Format(reader), pieces);
        }
        Ok(())
    }

    /// True if each column has the group that its place says.
    fn in_order(&self, groups: &Piece) -> bool {
        let covers = self.book.format.fields.iter().filter_map(|f| match f.cover {
            Cover::Rectangle(s) => Some(s.cols as usize),
            Cover::Matrix | Cover::Row | Cover::Column | Cover::Flat(_) => None,
        });
        let Some(group) = covers.max() else { return false };
        let numbers = groups.bytes.as_slice().as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b) as usize);
        numbers.enumerate().all(|(c, g)| g == c / group)
    }
}

fn tensors_path(tensors: &TensorDir) -> std::path::PathBuf {
    tensors.path().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_config_json_says_is_found() {
        for i in imports() {
            let format = formats::get(&i.format).unwrap_or_else(|| panic!("there is no format {}", i.format));
            assert!(format.layout(&i.layout).is_some(), "{}", i.format);
        }
        assert!(imports().len() > 8);
        let name = |v: Value| Stored::find(&v).map(|s| s.book.format.name.clone());
        let gptq = |bits: u32, group: i32, act: bool| json!({"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act, "sym": true});
        assert_eq!(name(gptq(4, 128, false)).as_deref(), Some("gptq_int4_g128"));
        assert_eq!(name(gptq(3, 128, false)).as_deref(), Some("gptq_int3_g128"));
        assert_eq!(name(gptq(4, 7, false)), None);
        assert_eq!(
            name(json!({"quant_method": "gptq", "bits": 4, "group_size": 128})).as_deref(),
            Some("gptq_int4_g128")
        );
        let two = json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2"});
        assert_eq!(name(two), None);
        assert_eq!(name(json!({"quant_method": "fp8", "weight_block_size": [128, 128]})).as_deref(), Some("fp8_128"));
    }
}
