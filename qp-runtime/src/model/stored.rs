//! Models whose `config.json` says that their matrices are quantized (`quantization_config`): the file
//! `specs/formats/imports.toml` says which format and layout of `specs/formats` they have.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use qp_codegen::formats;
use qp_codegen::reader::{Book, Reader};
use qp_codegen::spec::Shape;
use qp_codegen::spec::format::{Cover, Format, Layout};
use serde::Deserialize;
use serde_json::Value;

use super::Error;
use super::program::Program;
use super::tensors::{Kind, Piece, TensorDir};

/// An entry of `imports.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Import {
    /// The format, or several that differ in their tensors.
    format: OneOrMore,
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
    /// Tensors beside a matrix that say how activations would be rounded, which they are not.
    #[serde(default)]
    beside: Vec<String>,
    /// Tensors of one number beside a matrix that tell the format, and that number.
    #[serde(default)]
    marks: BTreeMap<String, u32>,
    /// Tensors beside a matrix that tell of another format.
    #[serde(default)]
    unmarked: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl OneOrMore {
    fn names(&self) -> &[String] {
        match self {
            OneOrMore::One(name) => std::slice::from_ref(name),
            OneOrMore::More(names) => names,
        }
    }
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
    /// Of these, a matrix has the first whose tensors are there.
    ways: Vec<Way>,
}

/// A format and layout, and what lies beside.
#[derive(Clone, Debug)]
struct Way {
    format: &'static Format,
    /// Made when a matrix has it.
    book: OnceLock<Arc<Book>>,
    import: &'static Import,
}

impl Way {
    fn layout(&self) -> Option<&Layout> {
        self.format.layout(&self.import.layout)
    }

    /// Whether tensors beside the matrix `name` tell of this format.
    fn is_marked(&self, tensors: &TensorDir, name: &str) -> bool {
        let there = |mark: &String| tensors.contains(&format!("{name}.{mark}"));
        self.import.marks.keys().all(there) && !self.import.unmarked.iter().any(there)
    }

    /// The tensors that tell the format of the matrix `name`.
    ///
    /// # Errors
    /// If one of them says something else.
    fn marks(&self, tensors: &TensorDir, name: &str) -> Result<Vec<String>, String> {
        let one = |(mark, number): (&String, &u32)| {
            let mark = format!("{name}.{mark}");
            let piece = tensors.piece(&mark).map_err(|e| e.to_string())?;
            match piece.bytes.as_slice() == number.to_le_bytes() {
                true => Ok(mark),
                false => Err(format!("'{mark}' is not {number:#x}")),
            }
        };
        self.import.marks.iter().map(one).collect()
    }

    /// Names of the tensors of the matrix `name`.
    fn names(&self, name: &str) -> Vec<String> {
        self.layout().map_or_else(Vec::new, |l| l.tensors.iter().map(|t| format!("{name}.{}", t.name)).collect())
    }

    /// How a matrix of `shape` is read; its tensors `names` in order.
    ///
    /// # Errors
    /// Why the tensors are no such matrix.
    fn fit(&self, tensors: &TensorDir, names: &[String], shape: Shape) -> Result<(Arc<Reader>, Vec<Piece>), String> {
        let layout = self.layout().ok_or("there is no such layout")?;
        let book = self.book.get_or_init(|| Arc::new(Book::new(self.format.clone())));
        let reader = Reader::new(book, layout, shape).map_err(|e| e.to_string())?;
        let mut pieces = Vec::new();
        for (name, wanted) in names.iter().zip(reader.tensors()) {
            let piece = tensors.piece(name).map_err(|e| e.to_string())?;
            let sides = |dims: Vec<u64>| dims.into_iter().filter(|n| *n != 1).collect::<Vec<u64>>();
            let (found, expected) = (piece.shape.iter().map(|n| *n as u64).collect(), wanted.dims.clone());
            if sides(found) != sides(expected) || piece.bytes.as_slice().len() as u64 != wanted.bytes {
                return Err(format!("'{name}' is {:?} of {:?}, expected {:?}", piece.shape, piece.dtype, wanted.dims));
            }
            pieces.push(piece);
        }
        Ok((Arc::new(reader), pieces))
    }

    /// True if each column has the group that its place says.
    fn in_order(&self, groups: &Piece) -> bool {
        let covers = self.format.fields.iter().filter_map(|f| match f.cover {
            Cover::Rectangle(s) => Some(s.cols as usize),
            Cover::Matrix | Cover::Row | Cover::Column | Cover::Flat(_) => None,
        });
        let Some(group) = covers.max() else { return false };
        let numbers = groups.bytes.as_slice().as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b) as usize);
        numbers.enumerate().all(|(c, g)| g == c / group)
    }
}

impl PartialEq for Stored {
    fn eq(&self, other: &Self) -> bool {
        let of = |s: &Stored| s.ways.iter().map(|w| (std::ptr::from_ref(w.import), &w.format.name)).collect::<Vec<_>>();
        of(self) == of(other)
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
        let fits = |i: &&Import| i.when.iter().all(holds) && !i.unless.iter().any(stands);
        let ways = |import: &'static Import| {
            let formats = import.format.names().iter().filter_map(|name| formats::get(name));
            formats.map(move |format| Way { format, book: OnceLock::new(), import })
        };
        let ways: Vec<Way> = imports().iter().filter(fits).flat_map(ways).collect();
        (!ways.is_empty()).then_some(Stored { ways })
    }

    /// Names of the formats that are known, for messages.
    pub fn known() -> String {
        let mut names: Vec<&str> = imports().iter().flat_map(|i| i.format.names()).map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        names.join(", ")
    }

    /// Joins the tensors of each matrix of `program` that is stored so to one, `NAME.weight`.
    ///
    /// # Errors
    /// If one of them is missing or has another shape, or groups of columns are not neighbours.
    pub fn join(&self, tensors: &mut TensorDir, program: &Program) -> Result<(), Error> {
        let (mut joined, mut beside) = (Vec::new(), Vec::new());
        for id in program.ids() {
            let layer = program.layer(id);
            let name = &layer.name;
            let shape = Shape { rows: layer.rows as u32, cols: layer.cols as u32 };
            let mut fit = None;
            let mut failed = None;
            for way in &self.ways {
                let names = way.names(name);
                // Layers that the config leaves out, such as the output layer, are as they are.
                let there = names.iter().all(|n| tensors.contains(n)) && way.is_marked(tensors, name);
                if fit.is_some() || !there {
                    continue;
                }
                match (way.fit(tensors, &names, shape), way.marks(tensors, name)) {
                    (Ok((reader, pieces)), Ok(marks)) => fit = Some((way, names, marks, reader, pieces)),
                    (Ok(_), Err(why)) => failed = Some((way, why)),
                    (Err(why), _) => failed = failed.or(Some((way, why))),
                }
            }
            let wrong = |way: &Way, why: String| {
                let format = &way.format.name;
                let what = format!("layer '{name}', which config.json says to be {format}: {why}");
                Error::Unsupported { path: tensors_path(tensors), what, supported: "what the layout says".to_owned() }
            };
            let Some((way, names, marks, reader, pieces)) = fit else {
                match failed {
                    Some((way, why)) => return Err(wrong(way, why)),
                    None => continue,
                }
            };
            let groups = way.import.groups.as_ref().map(|g| format!("{name}.{g}")).filter(|g| tensors.contains(g));
            if let Some(groups) = &groups
                && !way.in_order(&tensors.piece(groups)?)
            {
                let why = format!("'{groups}' orders columns by activations (desc_act), which is not supported");
                return Err(wrong(way, why));
            }
            let of_activations = way.import.beside.iter().map(|b| format!("{name}.{b}"));
            beside.extend(of_activations.filter(|b| tensors.contains(b)));
            joined.push((name.clone(), names, marks.into_iter().chain(groups), reader, pieces));
        }
        if !beside.is_empty() {
            let (path, count) = (tensors_path(tensors), beside.len());
            let what = "scales of activations are not used: activations are not rounded to 8 bits";
            tensors.notes.push(format!("{}: {count} {what}", path.display()));
        }
        let mut leave_out = beside;
        for (name, names, told, reader, pieces) in joined {
            names.iter().for_each(|n| drop(tensors.take(n)));
            leave_out.extend(told);
            tensors.add(format!("{name}.weight"), Kind::Format(reader), pieces);
        }
        for name in leave_out {
            let piece = tensors.piece(&name)?;
            drop(tensors.take(&name));
            tensors.left_out.push(piece);
        }
        Ok(())
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
            for name in i.format.names() {
                let format = formats::get(name).unwrap_or_else(|| panic!("there is no format {name}"));
                assert!(format.layout(&i.layout).is_some(), "{name}");
            }
        }
        assert!(imports().len() > 8);
        let name = |v: Value| Stored::find(&v).map(|s| s.ways[0].format.name.clone());
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
        // How large scales are, and what they are called, the tensors say.
        let ways = |v: Value| Stored::find(&v).map_or(0, |s| s.ways.len());
        assert_eq!(ways(json!({"quant_method": "fp8", "weight_block_size": null, "activation_scheme": "static"})), 4);
        assert_eq!(ways(json!({"quant_method": "fp8", "weight_block_size": [64, 64]})), 0);
        assert_eq!(ways(json!({"quant_method": "exl3", "bits": 3.0, "head_bits": 6})), 24);
    }
}
