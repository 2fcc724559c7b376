//! Writing a checkpoint as a GGUF file: matrices whose format is one of GGUF's types, floats, configuration and tokenizer.
//!
//! No weight is rounded. The header is written first and read again, by what reads any GGUF file: it must describe the same
//! model, or nothing is written.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use qp_codegen::output::Whole;
use safetensors::Dtype;
use serde_json::Value;

use super::{Error, Progress};
use crate::chat::template::Template;
use crate::checkpoint::reader::tensor_names;
use crate::checkpoint::{Checkpoint, LayerEntry};
use crate::model::gguf::describe::{Called, Target, differences};
use crate::model::gguf::vocabulary;
use crate::model::gguf::write::{Planned, Put, header};
use crate::model::gguf::{Gguf, LAYOUT};
use crate::model::tensors::{Bytes, interleaved};
use crate::model::weights::{HEAD, Source};
use crate::model::{self, Config, Files, Tokenizer};

/// Numbers of plain element types.
const F32: u32 = 0;
const F16: u32 = 1;
const BF16: u32 = 30;

/// A tensor of the file.
struct Item {
    planned: Planned,
    from: Origin,
}

/// Where a tensor's bytes come from.
enum Origin {
    /// These tensors of the checkpoint one behind the other, each with so many rows; rows of so many heads interleaved.
    Stored { tensors: Vec<String>, rows: usize, heads: Option<usize> },
    /// The numbers of these tensors, each this much larger, in single precision; rows of so many heads interleaved.
    Single { tensors: Vec<String>, more: f32, heads: Option<usize> },
    /// These.
    Made(Vec<u8>),
}

/// Writes the checkpoint `dir` as the GGUF file `out`. Returns its path.
///
/// # Errors
/// If something of the model cannot be said in a GGUF file, the checkpoint is damaged, the file exists and `force` is not given,
/// or cannot be written. What is written is removed then.
pub fn to_gguf(dir: &Path, out: &Path, force: bool, progress: &mut Progress<'_>) -> Result<PathBuf, Error> {
    let checkpoint = Checkpoint::open(dir)?;
    if out.exists() && !force {
        return Err(Error::refused(out, "exists; --force replaces it"));
    }
    let refused = |why: String| Error::refused(dir, why);
    let files = Files::open(dir)?;
    let mut config = Config::of(&files)?;
    // An output layer of its own is the model's, whatever config.json says.
    config.tied = checkpoint.layer(HEAD).is_none() && !checkpoint.contains(&format!("{HEAD}.weight"));
    let tokenizer = Tokenizer::of(&files)?;
    let text = files.text("config.json")?.unwrap_or_default();
    let json: Value = serde_json::from_str(&text).unwrap_or(Value::Null);

    let target = Target::new(&config).map_err(refused)?;
    let items = items(&checkpoint, &target)?;
    let mut values = target.values(&json);
    let of_tokens = vocabulary::values(&files, &config, &tokenizer)?;
    values.extend(of_tokens.map_err(|why| refused(format!("has a tokenizer that {why}")))?);
    if let Some(template) = Template::text(&files).map_err(|e| refused(e.to_string()))? {
        values.push(("tokenizer.chat_template".to_owned(), Put::Text(template)));
    }
    let planned: Vec<Planned> = items.iter().map(|i| i.planned.clone()).collect();
    let (header, offsets) = header(&values, &planned);

    let failed = |source| Error::Write { path: out.to_owned(), source };
    let mut whole = Whole::create(out).map_err(failed)?;
    let check = |place: &Path| same(dir, place, (&config, &tokenizer));
    write(&checkpoint, (out, &mut whole), &header, &items, &offsets, progress, check)?;
    whole.keep().map_err(failed)?;
    Ok(out.to_owned())
}

/// All tensors of the file, in its order: what is outside of blocks, then block by block.
fn items(checkpoint: &Checkpoint, target: &Target) -> Result<Vec<Item>, Error> {
    let mut items: BTreeMap<String, Item> = BTreeMap::new();
    let mut stacks: BTreeMap<String, BTreeMap<usize, (&LayerEntry, Item)>> = BTreeMap::new();
    let mut inside: BTreeSet<String> = BTreeSet::new();
    let nameless = |tensor: &str| {
        let why = format!("has the tensor '{tensor}', for which GGUF files of its architecture have no name");
        Error::refused(checkpoint.dir(), why)
    };
    for layer in &checkpoint.manifest().layers {
        inside.extend(checkpoint.tensors_of(&layer.name).into_iter().chain(tensor_names(&layer.name)));
        let tensor = format!("{}.weight", layer.name);
        let called = target.called(&tensor, 2).ok_or_else(|| nameless(&tensor))?;
        let item = of_format(checkpoint, layer, &called)?;
        match called.expert {
            Some(expert) => drop(stacks.entry(called.name).or_default().insert(expert, (layer, item))),
            None => drop(items.insert(called.name, item)),
        }
    }
    for (name, experts) in stacks {
        let item = stack(checkpoint, &name, experts)?;
        items.insert(name, item);
    }
    let mut plain: BTreeMap<String, BTreeMap<usize, Item>> = BTreeMap::new();
    for tensor in checkpoint.manifest().tensors.iter().filter(|t| !inside.contains(&t.name)) {
        let called = target.called(&tensor.name, tensor.shape.len()).ok_or_else(|| nameless(&tensor.name))?;
        let item = of_floats(&tensor.name, (tensor.dtype, &tensor.shape), &called);
        let item = item.ok_or_else(|| {
            let why = format!("has the tensor '{}' of {:?}, which is no float", tensor.name, tensor.dtype);
            Error::refused(checkpoint.dir(), why)
        })?;
        match called.expert {
            Some(expert) => drop(plain.entry(called.name).or_default().insert(expert, item)),
            None => drop(items.insert(called.name, item)),
        }
    }
    for (name, experts) in plain {
        let mixed = || {
            let why = format!("has experts of several types in '{name}', which a GGUF file keeps in one tensor");
            Error::refused(checkpoint.dir(), why)
        };
        let joined = joined(&name, experts.into_values().collect()).ok_or_else(mixed)?;
        if items.insert(name.clone(), joined).is_some() {
            return Err(mixed());
        }
    }
    for (name, factors) in target.frequency_factors() {
        let bytes: Vec<u8> = factors.iter().flat_map(|f| f.to_le_bytes()).collect();
        let planned =
            Planned { name: name.to_owned(), shape: vec![factors.len()], code: F32, bytes: bytes.len() as u64 };
        items.insert(name.to_owned(), Item { planned, from: Origin::Made(bytes) });
    }
    let mut items: Vec<Item> = items.into_values().collect();
    let block = |i: &Item| i.planned.name.strip_prefix("blk.").and_then(|n| n.split('.').next()?.parse::<usize>().ok());
    items.sort_by_key(|i| block(i));
    Ok(items)
}

/// A quantized layer as it is.
fn of_format(checkpoint: &Checkpoint, layer: &LayerEntry, called: &Called) -> Result<Item, Error> {
    let refused = |why: String| {
        let cure = "quantize it with a format of GGUF (q4_k, q6_k, q8_0, …), or write it out with --dequantized";
        Error::refused(checkpoint.dir(), format!("has the layer '{}' {why}: {cure}", layer.name))
    };
    let Some(format) = checkpoint.format(&layer.spec) else {
        return Err(refused(format!("of `{}`, a quantizer that GGUF has no type for", layer.spec)));
    };
    let Some(layout) = format.layout(LAYOUT) else {
        return Err(refused(format!("of `{}`, a format that GGUF has no type for", layer.spec)));
    };
    let (Some(code), Some(LAYOUT)) = (layout.ty, layer.layout.as_deref()) else {
        let found = layer.layout.as_deref().unwrap_or_default();
        return Err(refused(format!("of `{}` in the layout `{found}`, which is not that of GGUF files", layer.spec)));
    };
    let tensor = format!("{}.{}", layer.name, layout.tensors[0].name);
    let (rows, cols) = (layer.rows as usize, layer.cols as usize);
    let bytes = checkpoint.bytes(&tensor)?.as_slice().len() as u64;
    let planned = Planned { name: called.name.clone(), shape: vec![rows, cols], code, bytes };
    Ok(Item { planned, from: Origin::Stored { tensors: vec![tensor], rows, heads: called.heads } })
}

/// A tensor of floats; nothing if it is of other numbers.
fn of_floats(tensor: &str, (dtype, shape): (Dtype, &[usize]), called: &Called) -> Option<Item> {
    let count: usize = shape.iter().product();
    let (code, size) = match dtype {
        Dtype::F32 => (F32, 4),
        Dtype::F16 => (F16, 2),
        Dtype::BF16 => (BF16, 2),
        _ => return None,
    };
    let planned = |code, size| {
        let (name, shape, bytes) = (called.name.clone(), shape.to_vec(), (count * size) as u64);
        Planned { name, shape, code, bytes }
    };
    let heads = called.heads;
    Some(match called.single || called.one_more {
        true => {
            let more = if called.one_more { 1.0 } else { 0.0 };
            Item { planned: planned(F32, 4), from: Origin::Single { tensors: vec![tensor.to_owned()], more, heads } }
        }
        false => {
            let rows = shape.first().copied().unwrap_or(1);
            let from = Origin::Stored { tensors: vec![tensor.to_owned()], rows, heads };
            Item { planned: planned(code, size), from }
        }
    })
}

/// Quantized experts, which a file keeps in one tensor.
fn stack(checkpoint: &Checkpoint, name: &str, experts: BTreeMap<usize, (&LayerEntry, Item)>) -> Result<Item, Error> {
    let mut layers = experts.values().map(|(layer, _)| *layer);
    let first = layers.next();
    if let (Some(first), Some(other)) = (first, layers.find(|l| Some(&l.spec) != first.map(|f| &f.spec))) {
        let why = format!(
            "has '{}' of `{}` and '{}' of `{}`, but a GGUF file keeps the experts of '{name}' in one type: give them one in the plan",
            first.name, first.spec, other.name, other.spec
        );
        return Err(Error::refused(checkpoint.dir(), why));
    }
    let whole = joined(name, experts.into_values().map(|(_, item)| item).collect());
    whole.ok_or_else(|| Error::refused(checkpoint.dir(), format!("has experts of several shapes in '{name}'")))
}

/// Tensors of one shape and type as one; nothing if they differ.
fn joined(name: &str, parts: Vec<Item>) -> Option<Item> {
    let first = parts.first()?.planned.clone();
    let alike = |p: &Item| (&p.planned.shape, p.planned.code) == (&first.shape, first.code);
    if !parts.iter().all(alike) {
        return None;
    }
    let shape = [&[parts.len()], first.shape.as_slice()].concat();
    let planned = Planned { name: name.to_owned(), shape, code: first.code, bytes: first.bytes * parts.len() as u64 };
    let mut parts = parts.into_iter().map(|p| p.from);
    let mut from = parts.next()?;
    for part in parts {
        match (&mut from, part) {
            (Origin::Stored { tensors, .. }, Origin::Stored { tensors: more, .. })
            | (Origin::Single { tensors, .. }, Origin::Single { tensors: more, .. }) => tensors.extend(more),
            _ => return None,
        }
    }
    Some(Item { planned, from })
}

/// Writes header and data; `check` is called when the header is written, and what the header is read with.
fn write(
    checkpoint: &Checkpoint,
    (out, whole): (&Path, &mut Whole),
    header: &[u8],
    items: &[Item],
    offsets: &[u64],
    progress: &mut Progress<'_>,
    check: impl Fn(&Path) -> Result<(), Error>,
) -> Result<(), Error> {
    let place = whole.place().to_owned();
    let failed = |source| Error::Write { path: out.to_owned(), source };
    let to = whole.file();
    let end = items.last().zip(offsets.last()).map_or(0, |(item, offset)| offset + item.planned.bytes);
    to.write_all(header).and_then(|()| to.set_len(end.max(header.len() as u64))).map_err(failed)?;
    let is_made = |item: &Item| matches!(item.from, Origin::Made(_));
    let mut done = 0;
    for made in [true, false] {
        for (item, offset) in items.iter().zip(offsets).filter(|(item, _)| is_made(item) == made) {
            progress(&item.planned.name, done, items.len());
            done += 1;
            let bytes = bytes(checkpoint, item)?;
            let bytes = bytes.as_slice();
            if bytes.len() as u64 != item.planned.bytes {
                let why = format!("has not the bytes of tensor '{}' that its format states", item.planned.name);
                return Err(Error::refused(checkpoint.dir(), why));
            }
            to.seek(SeekFrom::Start(*offset)).and_then(|_| to.write_all(bytes)).map_err(failed)?;
        }
        if made {
            check(&place)?;
        }
    }
    Ok(())
}

/// The bytes of a tensor of the file.
fn bytes(checkpoint: &Checkpoint, item: &Item) -> Result<Bytes, Error> {
    Ok(match &item.from {
        Origin::Made(bytes) => bytes.clone().into(),
        Origin::Stored { tensors, rows, heads } => match (&tensors[..], heads) {
            ([one], None) => checkpoint.bytes(one)?,
            ([one], Some(heads)) => interleaved(checkpoint.bytes(one)?.as_slice(), *rows, *heads).into(),
            (all, _) => {
                let mut out = Vec::with_capacity(item.planned.bytes as usize);
                for one in all {
                    out.extend_from_slice(checkpoint.bytes(one)?.as_slice());
                }
                out.into()
            }
        },
        Origin::Single { tensors, more, heads } => {
            let mut bytes = Vec::with_capacity(item.planned.bytes as usize);
            for tensor in tensors {
                let numbers = checkpoint.tensor(tensor)?.to_f32();
                bytes.extend(numbers.iter().flat_map(|n| (n + more).to_le_bytes()));
            }
            match heads {
                Some(heads) => interleaved(&bytes, item.planned.shape[0], *heads).into(),
                None => bytes.into(),
            }
        }
    })
}

/// Makes sure that the file whose header is at `path` describes this model.
fn same(dir: &Path, path: &Path, (config, tokenizer): (&Config, &Tokenizer)) -> Result<(), Error> {
    let refused = |why: String| Error::refused(dir, why);
    let gguf = Gguf::open(path)?;
    gguf.tensors()?;
    let read = Files::Gguf(Box::new(gguf));
    let unsaid = |e: model::Error| refused(format!("cannot be said in a GGUF file: {e}"));
    let mut found = Config::of(&read).map_err(unsaid)?;
    let tokens = Tokenizer::of(&read).map_err(unsaid)?;
    let mut config = config.clone();
    tokenizer.settle(&mut config);
    tokens.settle(&mut found);
    let differences = differences(&config, &found);
    if !differences.is_empty() {
        return Err(refused(format!(
            "cannot be said in a GGUF file, which has no place for {}",
            differences.join(", ")
        )));
    }
    match vocabulary::difference(tokenizer, &tokens) {
        Some(why) => Err(refused(format!("has a tokenizer that cannot be said in a GGUF file: {why}"))),
        None => Ok(()),
    }
}
