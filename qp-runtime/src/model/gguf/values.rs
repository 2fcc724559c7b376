//! Keys of a GGUF file, each taken by name and type; what nobody asked for is known in the end.

use super::Gguf;
use super::container::{Numbers, Value};
use crate::model::Error;

impl Gguf {
    pub(super) fn wrong(&self, key: &str, found: &Value, expected: &str) -> Error {
        let found = match found {
            Value::Texts(values) => format!("a list of {}", values.len()),
            Value::Numbers(values) => format!("a list of {}", values.len()),
            Value::Lists(values) => format!("a list of {}", values.len()),
            Value::Text(text) => format!("'{text}'"),
            Value::Int(n) => n.to_string(),
            Value::Float(n) => n.to_string(),
            Value::Bool(b) => b.to_string(),
        };
        Error::file(self.path(), format!("{key} is {found}: expected {expected}"))
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<u32>, Error> {
        self.value(key).map_or(Ok(None), |v| match v {
            Value::Int(n) => u32::try_from(*n).map(Some).map_err(|_| self.wrong(key, v, "a number below 2^32")),
            _ => Err(self.wrong(key, v, "a whole number")),
        })
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        self.value(key).map_or(Ok(None), |v| match v {
            Value::Int(n) => Ok(Some(*n as f64)),
            Value::Float(n) => Ok(Some(*n)),
            _ => Err(self.wrong(key, v, "a number")),
        })
    }

    pub(super) fn truth(&self, key: &str) -> Result<Option<bool>, Error> {
        self.value(key).map_or(Ok(None), |v| match v {
            Value::Bool(b) => Ok(Some(*b)),
            _ => Err(self.wrong(key, v, "true or false")),
        })
    }

    /// A key of the architecture.
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch.prefix)
    }

    /// The number of a key of the architecture.
    pub(super) fn number_of(&self, name: &str) -> Result<Option<f64>, Error> {
        self.number(&self.key(name))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, Error> {
        self.value(key).map_or(Ok(None), |v| match v {
            Value::Text(text) => Ok(Some(text.as_str())),
            _ => Err(self.wrong(key, v, "text")),
        })
    }

    pub(super) fn texts(&self, key: &str) -> Result<&[String], Error> {
        match self.need(key, self.value(key))? {
            Value::Texts(texts) => Ok(texts),
            // An empty list may have any type.
            Value::Numbers(n) if n.len() == 0 => Ok(&[]),
            other => Err(self.wrong(key, other, "a list of texts")),
        }
    }

    pub(super) fn numbers(&self, key: &str) -> Result<Option<&Numbers>, Error> {
        self.value(key).map_or(Ok(None), |v| match v {
            Value::Numbers(n) => Ok(Some(n)),
            _ => Err(self.wrong(key, v, "a list of numbers")),
        })
    }

    pub(super) fn need<T>(&self, key: &str, value: Option<T>) -> Result<T, Error> {
        value.ok_or_else(|| Error::file(self.path(), format!("has no key '{key}': convert the model again")))
    }

    /// A size of the architecture, at least 1.
    pub(super) fn size(&self, key: &str) -> Result<usize, Error> {
        let key = self.key(key);
        match self.need(&key, self.integer(&key)?)? {
            0 => Err(self.wrong(&key, &Value::Int(0), "at least 1")),
            n => Ok(n as usize),
        }
    }

    pub(super) fn heads(&self) -> Result<usize, Error> {
        self.size("attention.head_count")
    }

    pub(super) fn kv_heads(&self) -> Result<usize, Error> {
        let key = "attention.head_count_kv";
        if self.value(&self.key(key)).is_some() { self.size(key) } else { self.heads() }
    }

    pub(super) fn unsupported(&self, what: String, supported: &str) -> Error {
        Error::Unsupported { path: self.path().to_owned(), what, supported: supported.to_owned() }
    }

    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        self.asked().insert(key.to_owned());
        self.file.values.get(key)
    }
}
