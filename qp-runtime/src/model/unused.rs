//! Tensors that nothing asks for: each is refused, if it would change the result, or named in a note.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use super::config::Config;
use super::weights::{EMBEDDING, HEAD};
use super::{Error, Source, Tensor, Weight};
use crate::checkpoint::reader::tensor_names;

/// A source that remembers what it was asked for.
pub struct Asked<'a> {
    source: &'a dyn Source,
    names: RefCell<BTreeSet<String>>,
}

impl<'a> Asked<'a> {
    /// Nothing was asked for yet.
    pub fn new(source: &'a dyn Source) -> Self {
        Asked { source, names: RefCell::default() }
    }

    /// Names of the tensors that were asked for; and of those that are not there, but would have been taken instead.
    pub fn names(self) -> BTreeSet<String> {
        self.names.into_inner()
    }
}

impl Source for Asked<'_> {
    fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        self.names.borrow_mut().insert(name.to_owned());
        self.source.tensor(name)
    }

    fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, Error> {
        let own = tensor_names(name).into_iter().chain([format!("{name}.weight")]);
        self.names.borrow_mut().extend(own.chain(self.source.tensors_of(name)));
        self.source.linear(name, rows, cols)
    }

    fn names(&self) -> Vec<String> {
        self.source.names()
    }

    fn groups(&self) -> Vec<Vec<String>> {
        self.source.groups()
    }

    fn is_quantized(&self, name: &str) -> bool {
        self.source.is_quantized(name)
    }

    fn tensors_of(&self, name: &str) -> Vec<String> {
        self.source.tensors_of(name)
    }
}

/// If `config` says that the output layer is the embedding, but there is one that differs, takes that one, as
/// transformers 5 does, and says so.
///
/// # Errors
/// If a tensor cannot be read.
pub fn untie(config: &mut Config, source: &dyn Source) -> Result<(), Error> {
    let (head, embedding) = (format!("{HEAD}.weight"), format!("{EMBEDDING}.weight"));
    if !config.tied || !source.names().contains(&head) {
        return Ok(());
    }
    // A checkpoint keeps an output layer beside a quantized embedding only if it was another matrix.
    let same = !source.is_quantized(EMBEDDING) && {
        let (a, b) = (source.tensor(&head)?, source.tensor(&embedding)?);
        (&a.dtype, &a.shape, a.bytes()) == (&b.dtype, &b.shape, b.bytes())
    };
    if !same {
        config.tied = false;
        config.notes.push(format!(
            "config.json says that the output layer is the embedding (tie_word_embeddings), but '{head}' differs from \
             it and is used"
        ));
    }
    Ok(())
}

/// Looks at the tensors of `source` that are not among `asked`; returns what is to be said to the user. `model` is the
/// directory or file.
///
/// # Errors
/// If one of them would change the result.
pub fn check(
    model: &Path,
    config: &Config,
    source: &dyn Source,
    asked: &BTreeSet<String>,
) -> Result<Vec<String>, Error> {
    let unused: Vec<String> = source.names().into_iter().filter(|n| !asked.contains(n)).collect();
    // Equal to the embedding, or else it would have been asked for.
    let twin = format!("{HEAD}.weight");
    // Frequencies that older files hold; config.json says what they are.
    let frequencies = |n: &str| n.ends_with(".rotary_emb.inv_freq") || n == "rotary_emb.inv_freq";
    let mut harmless: Vec<&str> = Vec::new();
    let (mut beyond, mut biases, mut other) = (Vec::new(), Vec::new(), Vec::new());
    for name in unused.iter().filter(|n| !(config.tied && **n == twin)) {
        let layer = name.strip_prefix("model.layers.").and_then(|n| n.split('.').next()?.parse::<usize>().ok());
        // Layers that guess further tokens are not used.
        let guesses = config.layers..config.layers + config.unused_layers;
        if frequencies(name) || layer.is_some_and(|n| guesses.contains(&n)) {
            harmless.push(name);
        } else if layer.is_some_and(|n| n >= config.layers) {
            beyond.push(name.as_str());
        } else if name.ends_with(".bias") {
            let zero = source.tensor(name).is_ok_and(|t| t.to_f32().iter().all(|v| *v == 0.0));
            if zero { harmless.push(name) } else { biases.push(name.as_str()) }
        } else {
            other.push(name.as_str());
        }
    }
    let refused = |names: &[&str], why: String| Error::Unused {
        path: model.to_owned(),
        what: format!("{} would not be used: {why}", listed(names)),
    };
    if !other.is_empty() {
        let why = format!("{} has no such tensors; the model is another, or made of several", config.architecture);
        return Err(refused(&other, why));
    }
    if !beyond.is_empty() {
        let why = format!("config.json has num_hidden_layers {}; correct it, or remove the tensors", config.layers);
        return Err(refused(&beyond, why));
    }
    if !biases.is_empty() {
        let why = format!(
            "by config.json (attention_bias, mlp_bias) {} adds no such biases; correct it, or remove the tensors",
            config.architecture
        );
        return Err(refused(&biases, why));
    }
    if harmless.is_empty() {
        return Ok(Vec::new());
    }
    Ok(vec![format!("{}: {} change nothing and are not used", model.display(), listed(&harmless))])
}

/// Names in a message: the first, and how many there are.
fn listed(names: &[&str]) -> String {
    match names {
        [] => "no tensors".to_owned(),
        [one] => format!("tensor '{one}'"),
        [first, rest @ ..] => format!("tensor '{first}' and {} more", rest.len()),
    }
}
