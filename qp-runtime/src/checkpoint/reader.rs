//! Opening a checkpoint and reading from it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use half::bf16;
use qp_codegen::layout::Packed;
use qp_codegen::reader::{Book, Reader};
use qp_codegen::spec::{Definition, Format, Quantizer, Shape, load_alone};
use qp_codegen::syntax::diag::nearest;
use qp_codegen::text_file;
use rayon::prelude::*;
use safetensors::Dtype;

use super::manifest::{LayerEntry, Manifest, SpecEntry, TensorEntry};
use super::{Error, MANIFEST, blake3, hash_file, sha256};
use crate::codec::{PackedMatrix, Words, scale_count};
use crate::input;
use crate::model::tensors::Bytes;
use crate::model::weights::shaped;
use crate::model::{self, Source, Tensor, TensorDir, Weight};

/// An opened checkpoint: its weight files are mapped, everything but tensor data has been checked.
///
/// A tensor's checksum is checked when it is first read. The files must not be changed while it is open.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: Manifest,
    specs: BTreeMap<String, Arc<Quantizer>>,
    formats: BTreeMap<String, Arc<Book>>,
    layers: BTreeMap<String, usize>,
    tensors: BTreeMap<String, usize>,
    shards: BTreeMap<String, TensorDir>,
    /// Tensors whose checksum was found right.
    checked: Mutex<BTreeSet<usize>>,
}

/// Names of the two tensors of a quantized layer.
pub fn tensor_names(layer: &str) -> [String; 2] {
    [format!("{layer}.packed"), format!("{layer}.scales")]
}

impl Checkpoint {
    /// Opens `dir`: reads the manifest and the specs, maps the weight files, and checks the checksums of all small
    /// files, the sizes of all files and the headers of the weight files.
    ///
    /// # Errors
    /// If anything is missing, damaged or of an unknown version; the message names it and the cure.
    pub fn open(dir: &Path) -> Result<Checkpoint, Error> {
        let path = dir.join(MANIFEST);
        let text = match input::read(&path, input::SMALL) {
            Ok(bytes) => String::from_utf8(bytes)
                .map_err(|_| Error::Manifest { path: path.clone(), message: "it is not UTF-8 text".to_owned() })?,
            Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
                return Err(Error::NoManifest { dir: dir.to_owned() });
            }
            Err(e) => return Err(Error::io("read", path)(e)),
        };
        let manifest = Manifest::from_text(&path, &text)?;
        let weights: BTreeSet<&str> = manifest.tensors.iter().map(|t| t.file.as_str()).collect();
        for f in &manifest.files {
            let path = inside(dir, &f.name)?;
            let found = match fs::metadata(&path) {
                Ok(m) => m.len(),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(Error::MissingFile { path }),
                Err(e) => return Err(Error::io("read", path)(e)),
            };
            if found != f.bytes {
                return Err(Error::Size { path, expected: f.bytes, found });
            }
            if !weights.contains(f.name.as_str()) && hash_file(&path)?.1 != f.sha256 {
                return Err(Error::FileChanged { path });
            }
        }
        let (mut specs, mut formats) = (BTreeMap::new(), BTreeMap::new());
        for s in &manifest.specs {
            match read_spec(dir, s)? {
                Definition::Quantizer(q) => drop(specs.insert(s.name.clone(), Arc::new(q))),
                Definition::Format(f) => drop(formats.insert(s.name.clone(), Arc::new(Book::new(f)))),
            }
        }
        let shards: BTreeMap<String, TensorDir> = weights
            .into_iter()
            .map(|name| {
                let path = inside(dir, name)?;
                let shard = TensorDir::from_files(dir, std::slice::from_ref(&path))
                    .map_err(|e| Error::Header { path, message: header_message(e) })?;
                Ok((name.to_owned(), shard))
            })
            .collect::<Result<_, Error>>()?;
        for t in &manifest.tensors {
            let header = |message| Error::Header { path: dir.join(&t.file), message };
            let (dtype, shape) =
                shards[&t.file].layout(&t.name).map_err(|_| header(format!("no tensor `{}` in it", t.name)))?;
            if (dtype, shape) != (t.dtype, t.shape.as_slice()) {
                return Err(header(format!(
                    "`{}` is {dtype:?} {shape:?}, expected {:?} {:?}",
                    t.name, t.dtype, t.shape
                )));
            }
        }
        let layers = manifest.layers.iter().enumerate().map(|(i, l)| (l.name.clone(), i)).collect();
        let tensors = manifest.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let checked = Mutex::default();
        Ok(Checkpoint { dir: dir.to_owned(), manifest, specs, formats, layers, tensors, shards, checked })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the checkpoint holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The quantized layer `name` (without `.weight`), if it is quantized.
    pub fn layer(&self, name: &str) -> Option<&LayerEntry> {
        self.layers.get(name).map(|&i| &self.manifest.layers[i])
    }

    /// The quantizer called `name`.
    pub fn quantizer(&self, name: &str) -> Option<&Arc<Quantizer>> {
        self.specs.get(name)
    }

    /// The format called `name`.
    pub fn format(&self, name: &str) -> Option<&Format> {
        self.formats.get(name).map(|b| &b.format)
    }

    /// The checked bytes of the tensor `name`, as they are stored.
    ///
    /// # Errors
    /// If there is none of that name, or it is damaged.
    pub fn bytes(&self, name: &str) -> Result<Bytes, Error> {
        Ok(self.raw(name)?.2)
    }

    /// The matrix of the layer `name` (without `.weight`), if a format has it.
    ///
    /// # Errors
    /// If its tensors are damaged or do not fit its format.
    pub fn of_format(&self, name: &str) -> Result<Option<Tensor>, Error> {
        let Some((layer, book)) = self.layer(name).and_then(|l| Some((l, self.formats.get(&l.spec)?))) else {
            return Ok(None);
        };
        let wrong = |message| Error::Layer { dir: self.dir.clone(), layer: name.to_owned(), message };
        let layout = layer.layout.as_deref().and_then(|l| book.format.layout(l));
        let layout = layout.ok_or_else(|| wrong(format!("`{}` has not its layout", layer.spec)))?;
        let shape = Shape { rows: layer.rows, cols: layer.cols };
        let reader = Reader::new(book, layout, shape).map_err(|e| wrong(e.to_string()))?;
        let parts = reader.tensors().iter().map(|t| self.bytes(&format!("{name}.{}", t.name)));
        let parts = parts.collect::<Result<_, _>>()?;
        let tensor = Tensor::of_format(&Arc::new(reader), parts);
        tensor.map(Some).ok_or_else(|| wrong("its tensors have not the bytes that its layout states".to_owned()))
    }

    /// True if there is a tensor of that name.
    pub fn contains(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    /// The quantizer and the packed matrix of the layer `name` (without `.weight`).
    ///
    /// # Errors
    /// If the layer is not quantized, or its tensors are damaged or do not fit its spec.
    pub fn linear(&self, name: &str) -> Result<(Arc<Quantizer>, PackedMatrix), Error> {
        let layer = self.layer(name).ok_or_else(|| Error::NoTensor {
            dir: self.dir.clone(),
            tensor: tensor_names(name)[0].clone(),
            hint: nearest(name, self.layers.keys().map(String::as_str)).map(|n| format!("did you mean layer `{n}`?")),
        })?;
        let wrong = |message| Error::Layer { dir: self.dir.clone(), layer: name.to_owned(), message };
        let q = self.specs.get(&layer.spec).ok_or_else(|| wrong(format!("there is no spec `{}`", layer.spec)))?;
        let shape = Shape { rows: layer.rows, cols: layer.cols };
        let layout = Packed::new(q, shape);
        let [packed, scales] = tensor_names(name);
        let words = Words::from_bytes(Arc::new(self.stored(&packed, Dtype::U32, layout.words(), &wrong)?));
        let scales = self.stored(&scales, Dtype::BF16, scale_count(q, shape), &wrong)?;
        let scales = scales.as_slice().as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b)).collect();
        Ok((q.clone(), PackedMatrix { layout, words, scales }))
    }

    /// The checked bytes of a tensor that must have `len` elements of type `dtype`.
    fn stored(&self, name: &str, dtype: Dtype, len: usize, wrong: &dyn Fn(String) -> Error) -> Result<Bytes, Error> {
        let (found, shape, bytes) = self.raw(name)?;
        if (found, shape) != (dtype, &[len][..]) {
            return Err(wrong(format!("`{name}` is {found:?} {shape:?}, but its spec makes it {dtype:?} [{len}]")));
        }
        Ok(bytes)
    }

    /// The unquantized tensor `name`.
    ///
    /// # Errors
    /// If there is none of that name, it is damaged, or not of floats.
    pub fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        self.raw(name)?;
        let file = &self.manifest.tensors[self.tensors[name]].file;
        self.shards[file].tensor(name).map_err(|e| Error::Values { path: self.dir.join(file), message: e.to_string() })
    }

    /// A tensor as it is stored: element type, shape and checked bytes.
    fn raw(&self, name: &str) -> Result<(Dtype, &[usize], Bytes), Error> {
        let Some(&index) = self.tensors.get(name) else {
            return Err(Error::NoTensor {
                dir: self.dir.clone(),
                tensor: name.to_owned(),
                hint: nearest(name, self.tensors.keys().map(String::as_str)).map(|n| format!("did you mean `{n}`?")),
            });
        };
        let t = &self.manifest.tensors[index];
        let raw = self.shards[&t.file]
            .raw(name)
            .map_err(|e| Error::Values { path: self.dir.join(&t.file), message: e.to_string() })?;
        let checked = |set: &Mutex<BTreeSet<usize>>| {
            set.lock().unwrap_or_else(std::sync::PoisonError::into_inner).contains(&index)
        };
        if !checked(&self.checked) {
            let bytes = raw.2.as_slice();
            let same = match &t.blake3 {
                Some(sum) => blake3(bytes) == *sum,
                None => sha256(bytes) == t.sha256,
            };
            if !same {
                return Err(Error::TensorChanged { path: self.dir.join(&t.file), tensor: name.to_owned() });
            }
            self.checked.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(index);
        }
        Ok(raw)
    }

    /// Checks the checksums of all tensors, on all cores, so that those who read them later need not wait: the largest
    /// first, since a tensor without a BLAKE3 sum is hashed by one core.
    ///
    /// # Errors
    /// The first tensor, in the manifest's order, that is damaged.
    pub fn check(&self) -> Result<(), Error> {
        let bytes = |t: &TensorEntry| t.shape.iter().product::<usize>() * t.dtype.bitsize() / 8;
        let mut order: Vec<usize> = (0..self.manifest.tensors.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(bytes(&self.manifest.tensors[i])));
        let check = |&i: &usize| self.raw(&self.manifest.tensors[i].name).err().map(|e| (i, e));
        let wrong: Vec<_> = order.par_iter().with_max_len(1).filter_map(check).collect();
        wrong.into_iter().min_by_key(|w| w.0).map_or(Ok(()), |(_, e)| Err(e))
    }

    /// Checks every tensor, and every file as a whole. `progress` is told the bytes of each piece when it is done; the
    /// sum is [`Checkpoint::verify_bytes`].
    ///
    /// # Errors
    /// All that is damaged.
    pub fn verify(&self, progress: &mut dyn FnMut(u64)) -> Result<(), Vec<Error>> {
        let mut errors = Vec::new();
        for t in &self.manifest.tensors {
            match self.raw(&t.name) {
                Ok((_, _, bytes)) => progress(bytes.as_slice().len() as u64),
                Err(e) => errors.push(e),
            }
        }
        for l in &self.manifest.layers {
            if self.formats.contains_key(&l.spec) {
                errors.extend(self.of_format(&l.name).err().filter(|e| matches!(e, Error::Layer { .. })));
                continue;
            }
            errors.extend(self.linear(&l.name).err().filter(|e| matches!(e, Error::Layer { .. })));
        }
        for f in &self.manifest.files {
            let path = self.dir.join(&f.name);
            match hash_file(&path) {
                Ok((bytes, sum)) if sum == f.sha256 => progress(bytes),
                // A damaged tensor was named already; this is the padding or the header's order.
                Ok(_) if errors.iter().any(|e| matches!(e, Error::TensorChanged { path: p, .. } if *p == path)) => (),
                Ok(_) => errors.push(Error::FileChanged { path }),
                Err(e) => errors.push(e),
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// What [`Checkpoint::verify`] reads, in bytes.
    pub fn verify_bytes(&self) -> u64 {
        let tensors: usize =
            self.manifest.tensors.iter().map(|t| t.shape.iter().product::<usize>() * t.dtype.bitsize() / 8).sum();
        tensors as u64 + self.manifest.files.iter().map(|f| f.bytes).sum::<u64>()
    }
}

impl Source for Checkpoint {
    fn tensor(&self, name: &str) -> Result<Tensor, model::Error> {
        Ok(Checkpoint::tensor(self, name)?)
    }

    fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, model::Error> {
        let Some(layer) = self.layer(name) else {
            return shaped(self, &format!("{name}.weight"), &[rows, cols]).map(Weight::Dense);
        };
        let (found, expected) = (vec![layer.rows as usize, layer.cols as usize], vec![rows, cols]);
        if found != expected {
            return Err(model::Error::Shape { name: name.to_owned(), found, expected });
        }
        if let Some(tensor) = self.of_format(name)? {
            return Ok(Weight::Dense(tensor));
        }
        let (quantizer, matrix) = Checkpoint::linear(self, name)?;
        Ok(Weight::Quantized { quantizer, matrix: Arc::new(matrix) })
    }

    fn groups(&self) -> Vec<Vec<String>> {
        self.manifest.groups.clone()
    }

    fn check(&self) -> Result<(), model::Error> {
        Ok(Checkpoint::check(self)?)
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn is_quantized(&self, name: &str) -> bool {
        self.layer(name).is_some()
    }

    fn tensors_of(&self, name: &str) -> Vec<String> {
        let layer = self.layer(name);
        let layout = layer.and_then(|l| self.formats.get(&l.spec)?.format.layout(l.layout.as_deref()?));
        layout.iter().flat_map(|l| &l.tensors).map(|t| format!("{name}.{}", t.name)).collect()
    }
}

/// What is wrong with a weight file's header, without the path and the cure that [`Error::Header`] states.
fn header_message(e: model::Error) -> String {
    match e {
        model::Error::File { what, .. } => what.trim_end_matches("; copy or download it again").to_owned(),
        e => e.to_string(),
    }
}

/// The path of `name`, which must not lead out of `dir`.
pub(super) fn inside(dir: &Path, name: &str) -> Result<PathBuf, Error> {
    let mut parts = Path::new(name).components();
    if parts.all(|c| matches!(c, std::path::Component::Normal(_))) {
        return Ok(dir.join(name));
    }
    Err(Error::Manifest {
        path: dir.join(MANIFEST),
        message: format!("the file name `{name}` leads out of the directory"),
    })
}

fn read_spec(dir: &Path, entry: &SpecEntry) -> Result<Definition, Error> {
    let path = inside(dir, &entry.file)?;
    let text = text_file::read(&path).map_err(Error::io("read", &path))?;
    let library = load_alone(&path.display().to_string(), &text)
        .map_err(|d| Error::Spec { path: path.clone(), message: d.to_string() })?;
    let (definition, found) = match (library.get(&entry.name), library.format(&entry.name)) {
        (Some(q), _) => (Definition::Quantizer(q.clone()), q.hash()),
        (None, Some(f)) => (Definition::Format(f.clone()), f.hash()),
        (None, None) => return Err(Error::Spec { path, message: format!("it does not define `{}`", entry.name) }),
    };
    if found != entry.hash {
        return Err(Error::SpecHash { path, expected: entry.hash.clone(), found });
    }
    Ok(definition)
}
