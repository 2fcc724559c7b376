//! The container: a header of keys and values, a directory of tensors, then their data; in one file or in several parts.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::super::Error;
use super::super::shards::{part_name, part_of};
use super::super::tensors::{Bytes, Kind};
use super::types::{Types, Unreadable};
use crate::input;

/// Most bytes of a header: what it says takes a few times as much memory.
const HEADER: usize = 256 << 20;

/// A value of the header.
#[derive(Clone, Debug)]
pub enum Value {
    /// Any integer type.
    Int(i128),
    /// Any float type.
    Float(f64),
    /// Truth.
    Bool(bool),
    /// Text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// Several numbers.
    Numbers(Numbers),
    /// Several lists.
    Lists(Vec<Value>),
}

/// A list of numbers or truths, left in the file.
#[derive(Clone, Debug)]
pub struct Numbers {
    code: u32,
    bytes: Bytes,
}

impl Numbers {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.bytes.as_slice().len() / scalar_bytes(self.code).expect("the type of a scalar")
    }

    /// Number `index`; false is 0 and true is 1.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn get(&self, index: usize) -> f64 {
        let size = scalar_bytes(self.code).expect("the type of a scalar");
        match scalar(self.code, &self.bytes.as_slice()[index * size..(index + 1) * size]) {
            Value::Int(n) => n as f64,
            Value::Float(n) => n,
            Value::Bool(b) => f64::from(u8::from(b)),
            Value::Text(_) | Value::Texts(_) | Value::Numbers(_) | Value::Lists(_) => unreachable!("a scalar"),
        }
    }
}

/// Bytes of the scalar type number `code`; `None` if it is no scalar.
fn scalar_bytes(code: u32) -> Option<usize> {
    Some(match code {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        _ => return None,
    })
}

/// A scalar of type number `code` from as many bytes as it has.
fn scalar(code: u32, bytes: &[u8]) -> Value {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let n = u64::from_le_bytes(wide);
    match code {
        1 => Value::Int((n as i8).into()),
        3 => Value::Int((n as i16).into()),
        5 => Value::Int((n as i32).into()),
        6 => Value::Float(f32::from_bits(n as u32).into()),
        7 => Value::Bool(n != 0),
        11 => Value::Int((n as i64).into()),
        12 => Value::Float(f64::from_bits(n)),
        _ => Value::Int(n.into()),
    }
}

/// A tensor of the directory.
#[derive(Clone, Debug)]
pub struct Place {
    /// Element type.
    pub kind: Kind,
    /// Its number.
    pub code: u32,
    /// Shape, outermost first (the file has the innermost first).
    pub shape: Vec<usize>,
    /// Its bytes.
    pub bytes: Bytes,
}

/// A file of a model, or its header alone.
#[derive(Debug)]
pub struct Part {
    /// The file.
    pub path: PathBuf,
    map: Arc<Mmap>,
    /// Where the data begin.
    data: usize,
    /// Where tensors lie in the file.
    pub ranges: BTreeMap<String, Range<usize>>,
}

impl Part {
    /// All bytes of the file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The bytes before the data.
    pub fn header(&self) -> &[u8] {
        &self.map[..self.data.min(self.map.len())]
    }
}

/// Mapped files, their headers and directories read and checked.
#[derive(Debug)]
pub struct Container {
    /// The file, or the first of several parts.
    pub path: PathBuf,
    /// Keys and values, of the first part if there are several.
    pub values: BTreeMap<String, Value>,
    /// Tensors of all parts, by name.
    pub tensors: BTreeMap<String, Place>,
    /// The parts.
    pub parts: Vec<Part>,
}

impl Container {
    /// Maps the file `path` and reads its header. If it is a part of a model, all parts are read, which lie beside it.
    /// No file must be changed while it is mapped.
    ///
    /// # Errors
    /// If it cannot be read, is no GGUF file of version 2 or 3, is cut short, or has a tensor of an unsupported type; or
    /// if another part is missing.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let one = Self::open_part(path, false)?;
        let whole = |key: &str| match one.values.get(key) {
            Some(Value::Int(n)) => usize::try_from(*n).ok(),
            _ => None,
        };
        let count = whole("split.count").unwrap_or(1);
        if count <= 1 {
            return Ok(one);
        }
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let stem = match part_of(name, "gguf") {
            Some((stem, _, n)) if n == count => stem,
            _ => {
                let part = whole("split.no").map_or(0, |n| n + 1);
                let ending = part_name("", part, count, "gguf");
                let what =
                    format!("is part {part} of {count}, but its name does not end in {ending}: give its name back");
                return Err(Error::file(path, what));
            }
        };
        let mut all: Option<Container> = None;
        for part in 1..=count {
            let path = path.with_file_name(part_name(stem, part, count, "gguf"));
            if !path.exists() {
                return Err(Error::file(&path, format!("part {part} of {count} is missing: get it again")));
            }
            let next = Self::open_part(&path, false)?;
            let found = match next.values.get("split.no") {
                Some(Value::Int(n)) => *n + 1,
                _ => 0,
            };
            if found != part as i128 {
                return Err(Error::file(&path, format!("says that it is part {found}, not {part}: get it again")));
            }
            let Some(all) = &mut all else {
                all = Some(next);
                continue;
            };
            all.parts.extend(next.parts);
            for (name, place) in next.tensors {
                if all.tensors.insert(name.clone(), place).is_some() {
                    return Err(Error::file(&path, format!("tensor '{name}' is in another part too: get them again")));
                }
            }
        }
        Ok(all.expect("several parts"))
    }

    /// Maps the headers of a model's files, without their data: tensors have no bytes.
    ///
    /// # Errors
    /// As [`Container::open`].
    pub fn open_headers(paths: impl Iterator<Item = PathBuf>) -> Result<Self, Error> {
        let mut all: Option<Container> = None;
        for path in paths {
            let next = Self::open_part(&path, true)?;
            match &mut all {
                None => all = Some(next),
                Some(all) => {
                    all.tensors.extend(next.tensors);
                    all.parts.extend(next.parts);
                }
            }
        }
        all.ok_or_else(|| Error::file(Path::new("qp.json"), "names no header"))
    }

    fn open_part(path: &Path, header: bool) -> Result<Self, Error> {
        let file = input::open(path, false).map_err(|e| Error::io(path, e))?;
        // SAFETY: the map is read-only; the documentation asks that the file stay unchanged.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        let map = Arc::new(map);
        let (values, tensors, data, ranges) = read(path, &map, header)?;
        let part = Part { path: path.to_owned(), map, data, ranges };
        Ok(Container { path: path.to_owned(), values, tensors, parts: vec![part] })
    }
}

/// Values, tensors, where the data begin, and where tensors lie.
type Contents = (BTreeMap<String, Value>, BTreeMap<String, Place>, usize, BTreeMap<String, Range<usize>>);

/// Reads a file; of its header alone (`header`), tensors have no bytes.
fn read(path: &Path, map: &Arc<Mmap>, header: bool) -> Result<Contents, Error> {
    let wrong = |what: String| Error::file(path, what);
    let mut r = Reader { path, map, at: 0, what: "the header".to_owned() };
    if r.take(4)? != b"GGUF" {
        return Err(wrong("not a GGUF file: it does not begin with 'GGUF'; download it again".to_owned()));
    }
    let version = r.u32()?;
    if !matches!(version, 2 | 3) {
        let what = if matches!(version.swap_bytes(), 2 | 3) {
            "big-endian GGUF".to_owned()
        } else {
            format!("GGUF version {version}")
        };
        let supported = "versions 2 and 3, little-endian".to_owned();
        return Err(Error::Unsupported { path: path.to_owned(), what, supported });
    }
    let (tensor_count, value_count) = (r.u64()?, r.u64()?);
    let mut values = BTreeMap::new();
    for i in 0..value_count {
        r.what = format!("key {} of {value_count}", i + 1);
        let key = r.text()?;
        r.what = format!("the value of '{key}'");
        let code = r.u32()?;
        let value = r.value(code, 0)?;
        if values.insert(key.clone(), value).is_some() {
            return Err(wrong(format!("key '{key}' is in it twice: convert the model again")));
        }
    }
    let mut types = Types::default();
    let mut places = Vec::new();
    for i in 0..tensor_count {
        r.what = format!("the entry of tensor {} of {tensor_count}", i + 1);
        let name = r.text()?;
        r.what = format!("the entry of tensor '{name}'");
        let dimensions = r.u32()?;
        if !(1..=4).contains(&dimensions) {
            return Err(wrong(format!("tensor '{name}' has {dimensions} dimensions, expected 1 to 4")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(usize::try_from(r.u64()?).unwrap_or(usize::MAX));
        }
        shape.reverse();
        if shape.contains(&0) {
            return Err(wrong(format!("tensor '{name}' of shape {shape:?} has no elements: convert the model again")));
        }
        let code = r.u32()?;
        let kind = types.kind(code, &shape).map_err(|e| match e {
            Unreadable::Type(found, supported) => Error::Unsupported {
                path: path.to_owned(),
                what: format!("tensor '{name}' holds {found}, which"),
                supported,
            },
            Unreadable::Rows => wrong(rows_are_no_blocks(&name, &shape)),
        })?;
        places.push((name, (code, kind), shape, r.u64()?));
    }
    let alignment = match values.get("general.alignment") {
        None => 32,
        Some(Value::Int(n)) if (1..=1 << 20).contains(n) => *n as usize,
        Some(other) => return Err(wrong(format!("general.alignment is {other:?}: expected a small number"))),
    };
    let data = r.at.next_multiple_of(alignment);
    let (mut tensors, mut ranges) = (BTreeMap::new(), BTreeMap::new());
    for (name, (code, kind), shape, offset) in places {
        let size = size(&kind, &shape).ok_or_else(|| wrong(rows_are_no_blocks(&name, &shape)))?;
        let range = usize::try_from(offset).ok().and_then(|o| {
            let start = data.checked_add(o)?;
            Some(start..start.checked_add(size)?)
        });
        let range = range.filter(|r| header || r.end <= map.len()).ok_or_else(|| {
            wrong(format!("tensor '{name}' ends behind the end of the file, which is cut short: download it again"))
        })?;
        let bytes = if header { Bytes::from(Vec::new()) } else { Bytes::mapped(map.clone(), range.clone()) };
        ranges.insert(name.clone(), range);
        if tensors.insert(name.clone(), Place { kind, code, shape, bytes }).is_some() {
            return Err(wrong(format!("tensor '{name}' is in it twice: convert the model again")));
        }
    }
    Ok((values, tensors, data, ranges))
}

fn rows_are_no_blocks(name: &str, shape: &[usize]) -> String {
    format!("tensor '{name}' of shape {shape:?} has rows that are not whole blocks: convert the model again")
}

/// Bytes of a tensor; `None` if the number is out of range.
fn size(kind: &Kind, shape: &[usize]) -> Option<usize> {
    match kind {
        Kind::Plain(d) => {
            let count = shape.iter().try_fold(1usize, |a, &n| a.checked_mul(n))?;
            count.checked_mul(d.bitsize() / 8)
        }
        Kind::Format(reader) => usize::try_from(reader.tensors()[0].bytes).ok(),
    }
}

struct Reader<'a> {
    path: &'a Path,
    map: &'a Arc<Mmap>,
    at: usize,
    /// What is being read, for messages.
    what: String,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], Error> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.map.len()).ok_or_else(|| self.short())?;
        if end > HEADER {
            let what = format!("its header is longer than the {HEADER} bytes that are read, at {}", self.what);
            return Err(Error::file(self.path, what));
        }
        let taken = &self.map[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn short(&self) -> Error {
        Error::file(self.path, format!("not a whole GGUF file: it ends within {}; download it again", self.what))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        Ok(self.take(N)?.try_into().expect("so many were taken"))
    }

    fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things of at least `size` bytes, all of which must be in the file.
    fn count(&mut self, size: usize) -> Result<usize, Error> {
        let n = self.u64()?;
        let room = (self.map.len() - self.at) / size;
        usize::try_from(n).ok().filter(|&n| n <= room).ok_or_else(|| self.short())
    }

    fn text(&mut self) -> Result<String, Error> {
        let n = self.count(1)?;
        let text = std::str::from_utf8(self.take(n)?);
        text.map(str::to_owned).map_err(|_| {
            Error::file(self.path, format!("{} holds text that is not UTF-8: download it again", self.what))
        })
    }

    fn value(&mut self, code: u32, depth: u32) -> Result<Value, Error> {
        if let Some(size) = scalar_bytes(code) {
            return Ok(scalar(code, self.take(size)?));
        }
        Ok(match code {
            8 => Value::Text(self.text()?),
            9 if depth < 4 => {
                let code = self.u32()?;
                match scalar_bytes(code) {
                    Some(size) => {
                        let n = self.count(size)?;
                        let start = self.at;
                        self.take(n * size)?;
                        Value::Numbers(Numbers { code, bytes: Bytes::mapped(self.map.clone(), start..self.at) })
                    }
                    // The length of a text alone takes 8 bytes, that of a list with its type 12.
                    None if code == 8 => {
                        let n = self.count(8)?;
                        Value::Texts((0..n).map(|_| self.text()).collect::<Result<_, _>>()?)
                    }
                    None => {
                        let n = self.count(12)?;
                        Value::Lists((0..n).map(|_| self.value(code, depth + 1)).collect::<Result<_, _>>()?)
                    }
                }
            }
            _ => {
                let what =
                    format!("{} is of type number {code}, which GGUF does not have: download it again", self.what);
                return Err(Error::file(self.path, what));
            }
        })
    }
}
