//! Models whose `config.json` says that their matrices are quantized (`quantization_config`): the file
//! `specs/formats/imports.toml` says which format and layout of `specs/formats` they have.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use qp_codegen::formats;
use qp_codegen::reader::{Book, Reader};
use qp_codegen::spec::Shape;
use qp_codegen::spec::format::{Cover, Format, Layout, Number};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::Value;

use super::Error;
use super::program::Program;
use super::tensors::{Kind, Piece, TensorDir};

/// An entry of `imports.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Import {
    /// The format, or several that differ in their tensors; families if there are arguments.
    format: OneOrMore,
    /// JSON pointers into `quantization_config` to the arguments of the family.
    #[serde(default)]
    arguments: Vec<String>,
    /// Its layout.
    layout: String,
    /// JSON pointers into `quantization_config`, and what must stand there. `false` may be absent too.
    when: BTreeMap<String, Value>,
    /// What may stand there.
    #[serde(default)]
    among: BTreeMap<String, Vec<Value>>,
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
    /// Tensors beside a matrix that say what is known.
    #[serde(default)]
    known: Vec<String>,
    /// What files call tensors of the layout, behind the matrix's name, where that is not the layout's name.
    #[serde(default)]
    tensors: BTreeMap<String, String>,
    /// A tensor that is a text in JSON about the matrix.
    #[serde(default)]
    state: Option<String>,
    /// What must stand in it.
    #[serde(default)]
    says: BTreeMap<String, Value>,
    /// Tensors of the layout that are a number in it.
    #[serde(default)]
    numbers: Vec<String>,
    /// A tensor of the entries of all codes, which must be the format's.
    #[serde(default)]
    book: Option<String>,
}

impl Import {
    /// What files call the layout's tensor `tensor`.
    fn in_files<'a>(&'a self, tensor: &'a str) -> &'a str {
        self.tensors.get(tensor).map_or(tensor, String::as_str)
    }

    /// Its formats for a model whose `quantization_config` is `config`.
    fn formats<'a>(&'a self, config: &'a Value) -> impl Iterator<Item = &'static Format> + 'a {
        let arguments: Option<Vec<u64>> = self.arguments.iter().map(|a| config.pointer(a)?.as_u64()).collect();
        self.format.names().iter().filter_map(move |name| match arguments.as_deref()? {
            [] => formats::get(name),
            arguments => formats::instance(name, arguments),
        })
    }

    /// Tensors beside a matrix that hold nothing of its weights, but say something of them.
    fn about(&self) -> impl Iterator<Item = &String> {
        self.state.iter().chain(&self.book)
    }
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

    /// Names that the tensors of the matrix `name` have in files.
    fn names(&self, name: &str) -> Vec<String> {
        let stored =
            self.layout().into_iter().flat_map(|l| &l.tensors).filter(|t| !self.import.numbers.contains(&t.name));
        stored.map(|t| format!("{name}.{}", self.import.in_files(&t.name))).collect()
    }

    /// How the matrix `name` of `shape` is read; its tensors in the layout's order, called `NAME.TENSOR` as the layout does.
    ///
    /// # Errors
    /// Why the tensors are no such matrix.
    fn fit(&self, tensors: &TensorDir, name: &str, shape: Shape) -> Result<(Arc<Reader>, Vec<Piece>), String> {
        let layout = self.layout().ok_or("there is no such layout")?;
        let book = self.book.get_or_init(|| Arc::new(Book::new(self.format.clone())));
        let reader = Reader::new(book, layout, shape).map_err(|e| e.to_string())?;
        let piece = |tensor: &str| tensors.piece(&format!("{name}.{tensor}")).map_err(|e| e.to_string());
        let state = match &self.import.state {
            Some(state) => self.state(&piece(state)?, shape)?,
            None => Value::Null,
        };
        if let Some(book) = &self.import.book {
            self.same_book(&piece(book)?)?;
        }
        let mut pieces = Vec::new();
        for wanted in reader.tensors() {
            let called = format!("{name}.{}", wanted.name);
            if self.import.numbers.contains(&wanted.name) {
                let number =
                    state.get(&wanted.name).and_then(Value::as_f64).map(|n| n as f32).filter(|n| n.is_finite());
                let number = number.ok_or_else(|| format!("its state has no number `{}`", wanted.name))?;
                let bytes = number.to_le_bytes().to_vec().into();
                pieces.push(Piece { name: called, dtype: Dtype::F32, shape: vec![1], bytes });
                continue;
            }
            let piece = piece(self.import.in_files(&wanted.name))?;
            let name = &piece.name;
            let sides = |dims: Vec<u64>| dims.into_iter().filter(|n| *n != 1).collect::<Vec<u64>>();
            let (found, expected) = (piece.shape.iter().map(|n| *n as u64).collect(), wanted.dims.clone());
            if sides(found) != sides(expected) || piece.bytes.as_slice().len() as u64 != wanted.bytes {
                return Err(format!("'{name}' is {:?} of {:?}, expected {:?}", piece.shape, piece.dtype, wanted.dims));
            }
            // Floats of 16 bits are of two kinds.
            let float = match wanted.ty {
                Some(Number::F16) => Some(Dtype::F16),
                Some(Number::Bf16) => Some(Dtype::BF16),
                Some(Number::F32) => Some(Dtype::F32),
                _ => None,
            };
            if let Some(float) = float.filter(|f| *f != piece.dtype) {
                return Err(format!("'{name}' holds {:?}, expected {float:?}", piece.dtype));
            }
            pieces.push(Piece { name: called, ..piece });
        }
        Ok((Arc::new(reader), pieces))
    }

    /// What the text beside a matrix of `shape` says.
    ///
    /// # Errors
    /// If it is no such text, or says something else than it must.
    fn state(&self, piece: &Piece, shape: Shape) -> Result<Value, String> {
        let name = &piece.name;
        let state: Value =
            serde_json::from_slice(piece.bytes.as_slice()).map_err(|e| format!("'{name}' is no JSON: {e}"))?;
        let sides = Value::from(vec![shape.rows, shape.cols]);
        let all = self.import.says.iter().map(|(key, value)| (key.as_str(), value)).chain([("shape", &sides)]);
        for (key, wanted) in all {
            let found = state.get(key).unwrap_or(&Value::Null);
            if found != wanted {
                return Err(format!("'{name}' says that its {key} is {found}, not {wanted}"));
            }
        }
        Ok(state)
    }

    /// Looks whether a tensor holds the entries of all codes.
    ///
    /// # Errors
    /// If it does not.
    fn same_book(&self, piece: &Piece) -> Result<(), String> {
        let found = piece.bytes.as_slice().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
        if piece.dtype == Dtype::F32 && found.eq(self.format.book()) {
            return Ok(());
        }
        Err(format!("'{}' holds other numbers than the codes of {} stand for", piece.name, self.format.name))
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
        let may =
            |(pointer, values): (&String, &Vec<Value>)| config.pointer(pointer).is_some_and(|v| values.contains(v));
        let fits = |i: &&Import| i.when.iter().all(holds) && i.among.iter().all(may) && !i.unless.iter().any(stands);
        let ways = |import: &'static Import| {
            import.formats(config).map(move |format| Way { format, book: OnceLock::new(), import })
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
                let about = way.import.about().map(|t| format!("{name}.{t}"));
                let there =
                    names.iter().cloned().chain(about).all(|n| tensors.contains(&n)) && way.is_marked(tensors, name);
                if fit.is_some() || !there {
                    continue;
                }
                match (way.fit(tensors, name, shape), way.marks(tensors, name)) {
                    (Ok((reader, pieces)), Ok(marks)) => fit = Some((way, names, marks, reader, pieces)),
                    (Ok(_), Err(why)) => failed = Some((way, why)),
                    (Err(why), _) => failed = failed.or(Some((way, why))),
                }
            }
            let wrong = |way: &Way, why: String| {
                let format = &way.format.name;
                let what = format!("layer '{name}', which config.json says to be {format}: {why}");
                Error::file(&tensors_path(tensors), what)
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
                let why = format!(
                    "'{groups}' orders columns by activations (desc_act), which is not supported: make it without"
                );
                return Err(wrong(way, why));
            }
            let of_activations = way.import.beside.iter().map(|b| format!("{name}.{b}"));
            beside.extend(of_activations.filter(|b| tensors.contains(b)));
            let known = way.import.known.iter().map(|k| format!("{name}.{k}")).filter(|k| tensors.contains(k));
            let known: Vec<String> =
                known.chain(way.import.about().map(|t| format!("{name}.{t}"))).chain(marks).chain(groups).collect();
            joined.push((name.clone(), names, known, reader, pieces));
        }
        if !beside.is_empty() {
            let (path, count) = (tensors_path(tensors), beside.len());
            let what = "scales of activations are not used: activations are not rounded to 8 bits";
            tensors.notes.push(format!("{}: {count} {what}", path.display()));
        }
        let mut leave_out = beside;
        for (name, names, known, reader, pieces) in joined {
            names.iter().for_each(|n| drop(tensors.take(n)));
            leave_out.extend(known);
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

/// For the matrix `name` of a format and layout, the tensors that files call otherwise than a checkpoint: the name in files, and
/// in the checkpoint.
pub fn renamed(name: &str, format: &str, layout: Option<&str>) -> Vec<(String, String)> {
    let import =
        imports().iter().find(|i| i.format.names().iter().any(|f| f == format) && Some(i.layout.as_str()) == layout);
    let tensors = import.into_iter().flat_map(|i| &i.tensors);
    tensors.map(|(ours, theirs)| (format!("{name}.{theirs}"), format!("{name}.{ours}"))).collect()
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
                let format = match &i.arguments[..] {
                    [] => formats::get(name),
                    more => formats::instance(name, &[8, 8][..more.len()]),
                };
                let format = format.unwrap_or_else(|| panic!("there is no format {name}"));
                assert!(format.layout(&i.layout).is_some(), "{name}");
            }
        }
        assert!(imports().len() > 8);
        let name = |v: Value| Stored::find(&v).map(|s| s.ways[0].format.name.clone());
        let gptq = |bits: u32, group: i32, act: bool| json!({"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act, "sym": true});
        assert_eq!(name(gptq(4, 128, false)).as_deref(), Some("gptq_int4_g128"));
        assert_eq!(name(gptq(3, 128, false)).as_deref(), Some("gptq_int3_g128"));
        assert_eq!(name(gptq(8, 96, false)).as_deref(), Some("gptq_8_96"), "a family has more members than have names");
        assert_eq!(name(gptq(4, -1, false)).as_deref(), Some("gptq_int4_channel"));
        assert_eq!((name(gptq(5, 128, false)), name(gptq(4, 0, false))), (None, None));
        assert_eq!(
            name(json!({"quant_method": "gptq", "bits": 4, "group_size": 128})).as_deref(),
            Some("gptq_int4_g128")
        );
        let two = json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2"});
        let two = Stored::find(&two).unwrap();
        assert_eq!((two.ways.len(), two.ways[0].import.layout.as_str()), (1, "gptq_v2"));
        assert_eq!(name(json!({"quant_method": "fp8", "weight_block_size": [128, 128]})).as_deref(), Some("fp8_128"));
        // How large scales are, and what they are called, the tensors say.
        let ways = |v: Value| Stored::find(&v).map_or(0, |s| s.ways.len());
        assert_eq!(ways(json!({"quant_method": "fp8", "weight_block_size": null, "activation_scheme": "static"})), 4);
        assert_eq!(ways(json!({"quant_method": "fp8", "weight_block_size": [64, 64]})), 2);
        assert_eq!(ways(json!({"quant_method": "fp8", "weight_block_size": [64, 0]})), 0);
        assert_eq!(ways(json!({"quant_method": "exl3", "bits": 3.0, "head_bits": 6})), 24);
    }
}
