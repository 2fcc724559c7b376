//! Tensors of mapped files.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};
use memmap2::Mmap;
use qp_codegen::reader::Reader;
use rayon::prelude::*;
use safetensors::SafeTensors;

use super::files::Files;
use super::packing::View;
use super::{Error, halves, shards};
use crate::{codec, input};

/// Element type of a dense tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16.
    Bf16,
    /// Numbers of a format, as one of its layouts stores them.
    Format(Arc<Reader>),
}

/// How a tensor is stored in a file.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// Elements of one size.
    Plain(safetensors::Dtype),
    /// Numbers of a format, as one of its layouts stores them.
    Format(Arc<Reader>),
}

/// Part of a mapped file, or bytes in memory. Cloning shares them.
#[derive(Clone)]
pub struct Bytes {
    owner: Owner,
    range: Range<usize>,
}

#[derive(Clone)]
enum Owner {
    Map(Arc<Mmap>),
    Memory(Arc<[u8]>),
}

impl Bytes {
    /// Part of a mapped file.
    ///
    /// # Panics
    /// If the file ends before.
    pub(super) fn mapped(map: Arc<Mmap>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= map.len(), "part of the file");
        Bytes { owner: Owner::Map(map), range }
    }

    /// A part of these.
    ///
    /// # Panics
    /// If they end before.
    pub(super) fn part(&self, part: Range<usize>) -> Bytes {
        let range = self.range.start + part.start..self.range.start + part.end;
        assert!(part.start <= part.end && range.end <= self.range.end, "part of the bytes");
        Bytes { owner: self.owner.clone(), range }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        let all: &[u8] = match &self.owner {
            Owner::Map(m) => m,
            Owner::Memory(b) => b,
        };
        &all[self.range.clone()]
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(v: Vec<u8>) -> Self {
        Bytes { range: 0..v.len(), owner: Owner::Memory(v.into()) }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.range.len())
    }
}

/// A dense tensor of numbers that are read as floats, little endian, row-major. Cloning shares the data.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Elements one after another; or the tensors of a format's layout, in its order.
    parts: Vec<Bytes>,
    /// True if products are those of its floats, where a format could have exact ones.
    as_floats: bool,
}

impl Tensor {
    /// The matrix that `reader` reads from `parts`, the tensors of its layout; `None` unless these have the bytes that it
    /// needs.
    pub fn of_format(reader: &Arc<Reader>, parts: Vec<Bytes>) -> Option<Self> {
        let fit = parts.len() == reader.tensors().len()
            && parts.iter().zip(reader.tensors()).all(|(p, t)| p.as_slice().len() as u64 == t.bytes);
        let shape = vec![reader.shape().rows as usize, reader.shape().cols as usize];
        fit.then(|| Tensor { dtype: Dtype::Format(reader.clone()), shape, parts, as_floats: false })
    }

    /// A tensor of `f32` values in memory; `None` unless there are `shape.product()` values.
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Option<Self> {
        (shape.iter().product::<usize>() == values.len()).then(|| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            Tensor { dtype: Dtype::F32, shape: shape.to_vec(), parts: vec![bytes.into()], as_floats: false }
        })
    }

    /// The tensor, whose products are those of its floats: where no kernel computes exact ones.
    pub fn as_floats(self) -> Self {
        Tensor { as_floats: true, ..self }
    }

    /// Of a format whose products are exact, its reader and the bytes of its tensors.
    pub fn exact(&self) -> Option<(&Arc<Reader>, Vec<&[u8]>)> {
        match &self.dtype {
            _ if self.as_floats => None,
            Dtype::Format(reader) => reader.terms().map(|_| (reader, self.parts.iter().map(Bytes::as_slice).collect())),
            Dtype::F32 | Dtype::F16 | Dtype::Bf16 => None,
        }
    }

    /// True of a format with exact products each launch of which multiplies one matrix alone.
    pub fn is_apart(&self) -> bool {
        self.exact().and_then(|(reader, _)| reader.terms()).is_some_and(|terms| terms.is_apart())
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True if there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements' bytes, as the type stores them; of a format those of its layout's first tensor.
    pub fn bytes(&self) -> &[u8] {
        self.parts[0].as_slice()
    }

    /// Copies elements `start..start + out.len()` as `f32`.
    ///
    /// # Panics
    /// If the tensor ends before.
    pub fn read(&self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        let part = |size: usize| &self.bytes()[range.start * size..range.end * size];
        match &self.dtype {
            Dtype::F32 => {
                for (o, b) in out.iter_mut().zip(part(4).as_chunks().0) {
                    *o = f32::from_le_bytes(*b);
                }
            }
            Dtype::F16 => halves::widen(part(2).as_chunks().0, out),
            Dtype::Bf16 => {
                for (o, b) in out.iter_mut().zip(part(2).as_chunks().0) {
                    *o = bf16::from_le_bytes(*b).to_f32();
                }
            }
            Dtype::Format(reader) => self.read_format(reader, start, out),
        }
    }

    /// Rows of a matrix that are best read together, from a multiple of them on.
    pub fn band(&self) -> usize {
        match &self.dtype {
            Dtype::Format(reader) => reader.band() as usize,
            Dtype::F32 | Dtype::F16 | Dtype::Bf16 => 1,
        }
    }

    /// As `read`, of a format: rows, or parts of them.
    fn read_format(&self, reader: &Reader, start: usize, out: &mut [f32]) {
        let parts: Vec<&[u8]> = self.parts.iter().map(Bytes::as_slice).collect();
        let cols = reader.shape().cols as usize;
        let (mut at, mut out) = (start, out);
        while !out.is_empty() {
            // A matrix has fewer than 2^32 rows and columns.
            let (row, col) = ((at / cols) as u32, at % cols);
            let whole = if col == 0 { out.len() / cols * cols } else { 0 };
            let len = if whole > 0 { whole } else { out.len().min(cols - col) };
            let (part, rest) = out.split_at_mut(len);
            match whole {
                0 => reader.read(&parts, row, col as u32, part),
                _ => reader.read_rows(&parts, row, part),
            }
            at += part.len();
            out = rest;
        }
    }

    /// Looks at every value, at the speed of memory.
    ///
    /// # Errors
    /// If one is infinite or not a number; `name` is for the message.
    fn check_finite(&self, name: &str) -> Result<(), Error> {
        let whole = match &self.dtype {
            Dtype::F32 => finite(self.bytes(), |b: [u8; 4]| u32::from_le_bytes(b) & 0x7F80_0000 != 0x7F80_0000),
            Dtype::F16 => finite(self.bytes(), |b: [u8; 2]| u16::from_le_bytes(b) & 0x7C00 != 0x7C00),
            Dtype::Bf16 => finite(self.bytes(), |b: [u8; 2]| u16::from_le_bytes(b) & 0x7F80 != 0x7F80),
            Dtype::Format(reader) => {
                let parts: Vec<&[u8]> = self.parts.iter().map(Bytes::as_slice).collect();
                codec::is_finite(reader, &parts)
            }
        };
        if whole {
            return Ok(());
        }
        let values = self.to_f32();
        let bad = || values.iter().enumerate().filter(|(_, v)| !v.is_finite());
        let Some((mut index, &value)) = bad().next() else { return Err(Error::Scales { name: name.to_owned() }) };
        let mut at = vec![0; self.shape.len()];
        for (at, &size) in at.iter_mut().zip(&self.shape).rev() {
            (*at, index) = (index % size, index / size);
        }
        Err(Error::NotFinite { name: name.to_owned(), count: bad().count(), value, at })
    }

    /// All elements as `f32`.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        match &self.dtype {
            Dtype::Format(reader) => {
                let cols = reader.shape().cols as usize;
                let task = (ROWS as usize).next_multiple_of(self.band()) * cols;
                out.par_chunks_mut(task).enumerate().for_each(|(i, part)| self.read(i * task, part));
            }
            Dtype::F32 | Dtype::F16 | Dtype::Bf16 => self.read(0, &mut out),
        }
        out
    }
}

/// Rows of a format that a task looks at.
const ROWS: u32 = 64;

/// Whether `good` holds of every element of `bytes`.
fn finite<const N: usize>(bytes: &[u8], good: impl Fn([u8; N]) -> bool + Sync) -> bool {
    // Parts are looked at whole, without a branch for each element.
    let part = |part: &[u8]| part.as_chunks().0.iter().fold(true, |all, b| all & good(*b));
    bytes.par_chunks(1 << 16).all(part)
}

/// A tensor as a file has it.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Its name.
    pub name: String,
    /// Element type.
    pub dtype: safetensors::Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub bytes: Bytes,
}

/// Where a tensor lies.
#[derive(Debug)]
pub(super) struct Entry {
    pub kind: Kind,
    pub shape: Vec<usize>,
    pub bytes: Bytes,
    /// Of a format in several tensors: these; empty if `bytes` is the only one.
    pub pieces: Vec<Piece>,
    /// Heads whose halves are interleaved row by row, if they are.
    pub interleaved: Option<usize>,
    /// What the elements are in `bytes`, unless they lie there as they are.
    view: Option<View>,
    /// True once all values were found finite.
    finite: AtomicBool,
}

/// All tensors of a model's files, mapped.
///
/// A file must not be changed while it is mapped.
#[derive(Debug)]
pub struct TensorDir {
    dir: PathBuf,
    entries: BTreeMap<String, Entry>,
    /// What is to be said to the user about the choice of files.
    pub notes: Vec<String>,
    /// Tensors that say nothing that is not known otherwise.
    pub left_out: Vec<Piece>,
}

impl TensorDir {
    /// Tensors that have been found; `dir` is for messages.
    pub(super) fn new(dir: PathBuf, entries: BTreeMap<String, Entry>) -> Self {
        TensorDir { dir, entries, notes: Vec::new(), left_out: Vec::new() }
    }

    /// Maps the safetensors files of the directory `dir` (see [`shards`]), or the GGUF file `dir`.
    ///
    /// # Errors
    /// If a file is missing, malformed or truncated.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        Self::of(&Files::open(dir)?)
    }

    /// As [`TensorDir::open`], of a model that is open.
    ///
    /// # Errors
    /// As [`TensorDir::open`].
    pub fn of(files: &Files) -> Result<Self, Error> {
        match files {
            Files::Gguf(file) => file.tensors(),
            Files::Dir(dir) => {
                let found = shards::find(dir)?;
                Ok(TensorDir { notes: found.notes, ..Self::from_files(dir, &found.paths)? })
            }
        }
    }

    /// Maps the given files; `dir` is for messages.
    ///
    /// # Errors
    /// If a file is missing, malformed or truncated, or two hold the same tensor.
    pub fn from_files(dir: &Path, paths: &[PathBuf]) -> Result<Self, Error> {
        let mut entries = BTreeMap::new();
        for path in paths {
            let file = input::open(path, false).map_err(|e| Error::io(path, e))?;
            // SAFETY: the map is read-only; the documentation asks that the file stay unchanged.
            let map = Arc::new(unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?);
            let (header, meta) = SafeTensors::read_metadata(&map).map_err(|e| {
                Error::file(path, format!("not a whole safetensors file: {e}; copy or download it again"))
            })?;
            let data = header + 8;
            for (name, info) in meta.tensors() {
                let range = data + info.data_offsets.0..data + info.data_offsets.1;
                let bytes = Bytes { owner: Owner::Map(map.clone()), range };
                let entry = Entry::new(Kind::Plain(info.dtype), info.shape.clone(), bytes);
                if entries.insert(name.clone(), entry).is_some() {
                    return Err(Error::file(path, format!("tensor '{name}' is in another file of the model too")));
                }
            }
        }
        Ok(TensorDir::new(dir.to_owned(), entries))
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Forgets all tensors but those that `keep` keeps.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.entries.retain(|name, _| keep(name));
    }

    /// Of a model of several parts, keeps the text's, under the names that a model of text has: `model.…`, `lm_head.…`.
    /// Gives the number of tensors of other parts.
    pub(super) fn keep_text(&mut self) -> usize {
        const OTHERS: [&str; 2] = ["vision_tower.", "multi_modal_projector."];
        let all = std::mem::take(&mut self.entries);
        let count = all.len();
        for (name, entry) in all {
            // transformers named them one way before 4.52, and another way since.
            let inner = name.strip_prefix("model.").unwrap_or(&name);
            if OTHERS.iter().any(|other| inner.starts_with(other)) {
                continue;
            }
            let text = match (name.strip_prefix("language_model."), name.strip_prefix("model.language_model.")) {
                (Some(text), _) => text.to_owned(),
                (_, Some(text)) => format!("model.{text}"),
                _ => name,
            };
            self.entries.insert(text, entry);
        }
        count - self.entries.len()
    }

    /// The directory or file, for messages.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Takes a tensor out.
    pub(super) fn take(&mut self, name: &str) -> Option<Entry> {
        self.entries.remove(name)
    }

    /// Puts a tensor in.
    pub(super) fn put(&mut self, name: String, entry: Entry) {
        self.entries.insert(name, entry);
    }

    /// True if there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    fn entry(&self, name: &str) -> Result<&Entry, Error> {
        self.entries.get(name).ok_or_else(|| Error::MissingTensor { name: name.to_owned(), path: self.dir.clone() })
    }

    /// Element type and shape of a tensor as [`TensorDir::raw`] gives it.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn layout(&self, name: &str) -> Result<(safetensors::Dtype, &[usize]), Error> {
        let e = self.entry(name)?;
        let dtype = match &e.kind {
            Kind::Plain(dtype) => *dtype,
            Kind::Format(_) => safetensors::Dtype::F16,
        };
        Ok((dtype, &e.shape))
    }

    /// A tensor of whatever type: element type, shape and bytes. Formats become the nearest `F16`, whose rounding is far
    /// below their own.
    ///
    /// # Errors
    /// If there is none of that name, it holds floats that are not finite, or a block holds a weight that is too large
    /// for `F16`.
    pub fn raw(&self, name: &str) -> Result<(safetensors::Dtype, &[usize], Bytes), Error> {
        let (dtype, shape) = self.layout(name)?;
        let e = self.entry(name)?;
        let bytes = match &e.kind {
            Kind::Plain(safetensors::Dtype::F32 | safetensors::Dtype::F16 | safetensors::Dtype::BF16) => {
                // All values are looked at.
                self.tensor(name)?;
                e.in_order()
            }
            Kind::Plain(_) => e.in_order(),
            Kind::Format(_) => {
                let weights = self.tensor(name)?.to_f32();
                let halves: Vec<f16> = weights.iter().map(|w| f16::from_f32(*w)).collect();
                if let Some(i) = halves.iter().zip(&weights).position(|(h, w)| h.is_infinite() && w.is_finite()) {
                    return Err(Error::TooLarge { name: name.to_owned(), value: weights[i] });
                }
                halves.iter().flat_map(|h| h.to_le_bytes()).collect::<Vec<u8>>().into()
            }
        };
        Ok((dtype, shape, bytes))
    }

    /// A tensor as its file stores it, rows in the order in which the model computes them; of a format that lies in
    /// several tensors, these.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn stored(&self, name: &str) -> Result<(&Kind, Vec<Piece>), Error> {
        let e = self.entry(name)?;
        if !e.pieces.is_empty() {
            return Ok((&e.kind, e.pieces.clone()));
        }
        if let (Some(view), Kind::Format(_)) = (&e.view, &e.kind) {
            let (layer, groups) = (name.strip_suffix(".weight").unwrap_or(name), e.shape[1] / 32);
            let packed = view.packed(&e.bytes).into_iter().flat_map(|(_, parts)| parts);
            let pieces = packed.zip([("blocks", vec![e.shape[0], groups, 16]), ("scales", vec![e.shape[0], groups])]);
            let piece = |(bytes, (of, shape)): (Bytes, (&str, Vec<usize>))| {
                let dtype = safetensors::Dtype::U8;
                Piece { name: format!("{layer}.{of}"), dtype, shape, bytes }
            };
            return Ok((&e.kind, pieces.map(piece).collect()));
        }
        let bytes = e.in_order();
        Ok(match &e.kind {
            Kind::Plain(dtype) => {
                (&e.kind, vec![Piece { name: name.to_owned(), dtype: *dtype, shape: e.shape.clone(), bytes }])
            }
            Kind::Format(reader) => {
                let layer = name.strip_suffix(".weight").unwrap_or(name);
                let (name, rows) = (format!("{layer}.{}", reader.tensors()[0].name), e.shape[0]);
                let shape = vec![rows, bytes.as_slice().len() / rows];
                (&e.kind, vec![Piece { name, dtype: safetensors::Dtype::U8, shape, bytes }])
            }
        })
    }

    /// Has [`TensorDir::stored`] give matrices of MXFP4 as they are stored, in place of decoded numbers.
    /// Gives how many there are.
    pub(crate) fn keep_packed(&mut self) -> usize {
        let mut count = 0;
        for e in self.entries.values_mut() {
            if let Some(View::Mxfp4 { reader, .. }) = &e.view {
                e.kind = Kind::Format(reader.clone());
                count += 1;
            }
        }
        count
    }

    /// The tensor `name`, which is no format's.
    pub(super) fn piece(&self, name: &str) -> Result<Piece, Error> {
        Ok(self.stored(name)?.1.swap_remove(0))
    }

    /// Adds the matrix `name` of a format that lies in `pieces`.
    pub(super) fn add(&mut self, name: String, kind: Kind, pieces: Vec<Piece>) {
        let Kind::Format(reader) = &kind else { unreachable!("a format's matrix") };
        let shape = vec![reader.shape().rows as usize, reader.shape().cols as usize];
        let mut entry = Entry::new(kind, shape, pieces[0].bytes.clone());
        entry.pieces = pieces;
        self.entries.insert(name, entry);
    }

    /// A tensor of floats, or of a format, as which matrices of MXFP4 are given. When it is asked for first, all its values are looked at.
    ///
    /// # Errors
    /// If there is none of that name, it has another element type, or a value is infinite or not a number.
    pub fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        let e = self.entry(name)?;
        let dtype = match &e.kind {
            Kind::Plain(safetensors::Dtype::F32) => Dtype::F32,
            Kind::Plain(safetensors::Dtype::F16) => Dtype::F16,
            Kind::Plain(safetensors::Dtype::BF16) => Dtype::Bf16,
            Kind::Format(reader) => Dtype::Format(reader.clone()),
            Kind::Plain(other) => return Err(Error::Dtype { name: name.to_owned(), found: format!("{other:?}") }),
        };
        let (dtype, parts) = match e.view.as_ref().and_then(|view| view.packed(&e.bytes)) {
            Some((reader, parts)) => (Dtype::Format(reader.clone()), parts.into()),
            None if e.pieces.is_empty() => (dtype, vec![e.in_order()]),
            None => (dtype, e.pieces.iter().map(|p| p.bytes.clone()).collect()),
        };
        let tensor = Tensor { dtype, shape: e.shape.clone(), parts, as_floats: false };
        if !e.finite.load(Ordering::Relaxed) {
            tensor.check_finite(name)?;
            e.finite.store(true, Ordering::Relaxed);
        }
        Ok(tensor)
    }
}

impl Entry {
    /// A tensor whose rows are in order.
    pub fn new(kind: Kind, shape: Vec<usize>, bytes: Bytes) -> Self {
        let (pieces, finite) = (Vec::new(), AtomicBool::new(false));
        Entry { kind, shape, bytes, pieces, interleaved: None, view: None, finite }
    }

    /// A tensor whose elements are found in `bytes` as `view` says.
    pub fn of_view(kind: Kind, shape: Vec<usize>, bytes: Bytes, view: View) -> Self {
        Entry { view: Some(view), ..Entry::new(kind, shape, bytes) }
    }

    /// The bytes, rows in the order in which the model computes them: a copy if the file has another.
    fn in_order(&self) -> Bytes {
        if let (Some(view), Kind::Plain(dtype)) = (&self.view, &self.kind) {
            return view.bytes(&self.bytes, &self.shape, dtype.bitsize() / 8).into();
        }
        let Some(heads) = self.interleaved else { return self.bytes.clone() };
        let (stored, rows) = (self.bytes.as_slice(), self.shape[0]);
        let row = stored.len() / rows;
        let mut out = Vec::with_capacity(stored.len());
        for i in 0..rows {
            let from = interleaved_row(i, rows, heads);
            out.extend_from_slice(&stored[from * row..(from + 1) * row]);
        }
        out.into()
    }
}

/// Where a file that interleaves the halves of `heads` heads has row `i` of `rows`.
fn interleaved_row(i: usize, rows: usize, heads: usize) -> usize {
    let half = rows / heads / 2;
    let (head, side, j) = (i / (2 * half), i / half % 2, i % half);
    (head * half + j) * 2 + side
}

/// The bytes of `rows` rows as a file has them that interleaves the halves of `heads` heads.
pub(crate) fn interleaved(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let mut out = vec![0; bytes.len()];
    let row = bytes.len() / rows;
    for (i, from) in bytes.chunks_exact(row.max(1)).enumerate() {
        let to = interleaved_row(i, rows, heads);
        out[to * row..(to + 1) * row].copy_from_slice(from);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::{TensorView, serialize_to_file};

    fn write(path: &Path, tensors: &[(&str, safetensors::Dtype, &[usize], &[u8])]) {
        let views = tensors.iter().map(|(n, d, s, b)| (*n, TensorView::new(*d, s.to_vec(), b).unwrap()));
        serialize_to_file(views, None, path).unwrap();
    }

    fn message<T>(r: Result<T, Error>) -> String {
        r.err().expect("an error").to_string()
    }

    #[test]
    fn element_types_and_odd_alignment() {
        let dir = tempfile::tempdir().unwrap();
        let values = [1.0f32, -0.5, 3.25, 1e-3];
        let f16s: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let bf16s: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        write(
            &dir.path().join("model.safetensors"),
            &[
                ("i", safetensors::Dtype::I64, &[1], &[0; 8]),
                ("f", safetensors::Dtype::F32, &[4], &f32s),
                ("h", safetensors::Dtype::F16, &[2, 2], &f16s),
                ("b", safetensors::Dtype::BF16, &[2, 2], &bf16s),
            ],
        );
        let t = TensorDir::open(dir.path()).unwrap();
        assert_eq!(t.tensor("f").unwrap().to_f32(), values);
        assert_eq!(t.tensor("h").unwrap().to_f32()[..3], values[..3]);
        assert_eq!(t.tensor("b").unwrap().to_f32()[..3], values[..3]);
        let mut row = [0.0; 2];
        t.tensor("h").unwrap().read(1, &mut row);
        assert_eq!(row, values[1..3]);
        assert_eq!(message(t.tensor("i")), "tensor 'i' holds I64: expected F32, F16 or BF16");
        assert!(message(t.tensor("x")).starts_with("tensor 'x' is missing from "));
        // The same halves at an odd address.
        let mut shifted = vec![0u8];
        shifted.extend(&f16s);
        let bytes = Bytes { range: 1..9, owner: Owner::Memory(shifted.into()) };
        let odd = Tensor { dtype: Dtype::F16, shape: vec![4], parts: vec![bytes], as_floats: false };
        assert_eq!(odd.to_f32(), t.tensor("h").unwrap().to_f32());
    }

    #[test]
    fn shards() {
        let dir = tempfile::tempdir().unwrap();
        let one = 1f32.to_le_bytes();
        write(&dir.path().join("a.safetensors"), &[("x", safetensors::Dtype::F32, &[1], &one)]);
        write(&dir.path().join("b.safetensors"), &[("y", safetensors::Dtype::F32, &[1], &one)]);
        let index = |text: &str| std::fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
        index(r#"{"metadata":{},"weight_map":{"x":"a.safetensors","y":"b.safetensors"}}"#);
        assert_eq!(TensorDir::open(dir.path()).unwrap().names().collect::<Vec<_>>(), ["x", "y"]);
        // What the index says of a tensor that is not there counts when somebody needs it.
        index(r#"{"weight_map":{"x":"a.safetensors","z":"b.safetensors"}}"#);
        assert_eq!(TensorDir::open(dir.path()).unwrap().names().collect::<Vec<_>>(), ["x", "y"]);
        write(&dir.path().join("b.safetensors"), &[("x", safetensors::Dtype::F32, &[1], &one)]);
        assert!(message(TensorDir::open(dir.path())).contains("'x' is in another file of the model too"));
    }

    #[test]
    fn values_that_are_not_finite() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let (rows, cols) = (700, 100);
        for (dtype, size, one, inf) in [
            (safetensors::Dtype::F32, 4, 0x3F80_0000u32, 0x7F80_0000u32),
            (safetensors::Dtype::F16, 2, 0x3C00, 0xFC00),
            (safetensors::Dtype::BF16, 2, 0x3F80, 0x7FC0),
        ] {
            let mut bytes: Vec<u8> = (0..rows * cols).flat_map(|_| one.to_le_bytes()[..size].to_vec()).collect();
            write(&path, &[("x", dtype, &[rows, cols], &bytes)]);
            TensorDir::open(dir.path()).unwrap().tensor("x").unwrap();
            for index in [0, 57 * cols + 3, rows * cols - 1] {
                let place = index * size..(index + 1) * size;
                bytes[place.clone()].copy_from_slice(&inf.to_le_bytes()[..size]);
                write(&path, &[("x", dtype, &[rows, cols], &bytes)]);
                let read = TensorDir::open(dir.path()).unwrap();
                let error = message(read.tensor("x"));
                assert!(error.contains(&format!("at [{}, {}]", index / cols, index % cols)), "{error}");
                assert!(error.starts_with("tensor 'x' has 1 values that are not finite"), "{error}");
                assert_eq!(message(read.raw("x")), error);
                bytes[place].copy_from_slice(&one.to_le_bytes()[..size]);
            }
        }
    }

    #[test]
    fn truncated_and_missing_files() {
        let dir = tempfile::tempdir().unwrap();
        assert!(message(TensorDir::open(dir.path())).contains("holds neither"));
        std::fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
        assert!(message(TensorDir::open(dir.path())).ends_with("convert pytorch_model.bin to safetensors first"));
        let path = dir.path().join("model.safetensors");
        write(&path, &[("x", safetensors::Dtype::F32, &[16], &[0; 64])]);
        let whole = std::fs::read(&path).unwrap();
        for keep in [0, 4, 8, 20, whole.len() - 1] {
            std::fs::write(&path, &whole[..keep]).unwrap();
            assert!(message(TensorDir::open(dir.path())).contains("not a whole safetensors file"), "{keep} bytes");
        }
    }
}
