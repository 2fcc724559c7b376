//! The keys of a JSON file, each taken by name and type; what nobody asked for is known in the end.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use serde_json::Value;

use super::Error;

/// The keys of an object. A key whose value is `null` counts as absent.
#[derive(Debug)]
pub struct Keys {
    /// The file, for messages.
    path: PathBuf,
    values: BTreeMap<String, Value>,
    asked: RefCell<BTreeSet<String>>,
}

impl Keys {
    /// Reads the text of the file `path`.
    ///
    /// # Errors
    /// If it is no JSON object, or has a key twice.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let unique: Unique = serde_json::from_str(text).map_err(|e| Error::file(path, e.to_string()))?;
        Ok(Keys { path: path.to_owned(), values: unique.0, asked: RefCell::default() })
    }

    /// The object that is the value of `key`, if it is given.
    ///
    /// # Errors
    /// If it is something else.
    pub fn object(&self, key: &str) -> Result<Option<Keys>, Error> {
        self.typed(key, "an object", |v| {
            let values = v.as_object()?.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
            Some(Keys { path: self.path.clone(), values, asked: RefCell::default() })
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The value of `key`, if it is given.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.values.get(key).filter(|v| !v.is_null())
    }

    /// True if `key` is there, with `null` too.
    pub fn has(&self, key: &str) -> bool {
        self.asked.borrow_mut().insert(key.to_owned());
        self.values.contains_key(key)
    }

    /// A whole number that is not negative.
    ///
    /// # Errors
    /// If the value is something else.
    pub fn whole(&self, key: &str) -> Result<Option<usize>, Error> {
        self.typed(key, "a whole number that is not negative", |v| v.as_u64()?.try_into().ok())
    }

    /// A finite number.
    ///
    /// # Errors
    /// If the value is something else.
    pub fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        self.typed(key, "a number", |v| v.as_f64().filter(|v| v.is_finite()))
    }

    /// A positive number.
    ///
    /// # Errors
    /// If the value is something else.
    pub fn positive(&self, key: &str) -> Result<Option<f64>, Error> {
        self.typed(key, "a positive number", |v| v.as_f64().filter(|v| v.is_finite() && *v > 0.0))
    }

    /// Truth.
    ///
    /// # Errors
    /// If the value is something else.
    pub fn truth(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// Text.
    ///
    /// # Errors
    /// If the value is something else.
    pub fn text(&self, key: &str) -> Result<Option<String>, Error> {
        self.typed(key, "text", |v| v.as_str().map(str::to_owned))
    }

    /// A list of texts.
    ///
    /// # Errors
    /// If the value is something else.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<String>>, Error> {
        self.typed(key, "a list of texts", |v| v.as_array()?.iter().map(|v| v.as_str().map(str::to_owned)).collect())
    }

    /// A list of finite numbers.
    ///
    /// # Errors
    /// If the value is something else.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, Error> {
        let list = |v: &Value| v.as_array()?.iter().map(|v| v.as_f64().filter(|v| v.is_finite())).collect();
        self.typed(key, "a list of numbers", list)
    }

    /// A list of true and false, or of 1 and 0.
    ///
    /// # Errors
    /// If the value is something else.
    pub fn truths(&self, key: &str) -> Result<Option<Vec<bool>>, Error> {
        let truth = |v: &Value| match v.as_u64() {
            Some(n @ (0 | 1)) => Some(n == 1),
            Some(_) => None,
            None => v.as_bool(),
        };
        self.typed(key, "a list of 0 and 1", |v| v.as_array()?.iter().map(truth).collect())
    }

    /// A list of whole numbers that are not negative.
    ///
    /// # Errors
    /// If the value is something else.
    pub fn wholes(&self, key: &str) -> Result<Option<Vec<usize>>, Error> {
        let whole = |v: &Value| v.as_u64().and_then(|v| v.try_into().ok());
        self.typed(key, "a list of whole numbers", |v| v.as_array()?.iter().map(whole).collect())
    }

    /// These keys, and of `names` those of `outer` that are not among them.
    pub fn with(mut self, outer: &Keys, names: &[&str]) -> Keys {
        for name in names {
            if let (Some(value), None) = (outer.get(name), self.values.get(*name)) {
                self.values.insert((*name).to_owned(), value.clone());
            }
        }
        self
    }

    /// Ids of tokens: one or a list of them. Negative ones, which some files have for "none", are left out.
    ///
    /// # Errors
    /// If the value is something else.
    pub fn tokens(&self, key: &str) -> Result<Option<Vec<u32>>, Error> {
        let all: Option<Vec<i64>> = self.typed(key, "the id of a token, or a list of ids", |v| match v {
            Value::Array(ids) => ids.iter().map(Value::as_i64).collect(),
            one => Some(vec![one.as_i64()?]),
        })?;
        Ok(all.map(|ids| ids.into_iter().filter_map(|id| u32::try_from(id).ok()).collect()))
    }

    /// Counts `keys` as asked for: they are known to change nothing.
    pub fn ignore(&self, keys: &[&str]) {
        self.asked.borrow_mut().extend(keys.iter().map(|k| (*k).to_owned()));
    }

    /// Keys that were not asked for, with their values unless they are `null`.
    pub fn unasked(&self) -> impl Iterator<Item = (&str, &Value)> {
        let asked = self.asked.borrow().clone();
        self.values.iter().filter(move |(k, v)| !v.is_null() && !asked.contains(*k)).map(|(k, v)| (k.as_str(), v))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        get: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match get(value) {
            Some(value) => Ok(Some(value)),
            None => Err(Error::file(&self.path, format!("{key} is {}: expected {expected}", shown(value)))),
        }
    }
}

/// A value in a message: short, whatever it is.
pub fn shown(value: &Value) -> String {
    let text = match value {
        Value::Array(values) if values.len() > 4 => return format!("a list of {}", values.len()),
        Value::Object(values) if values.len() > 4 => return format!("an object of {} keys", values.len()),
        value => value.to_string(),
    };
    match text.char_indices().nth(60) {
        None => text,
        Some((at, _)) => format!("{}…", &text[..at]),
    }
}

/// An object in which no key is given twice: of two, a reader would believe one, and which one is not defined.
struct Unique(BTreeMap<String, Value>);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Unique;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Unique, M::Error> {
                let mut values = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    if values.insert(key.clone(), value).is_some() {
                        return Err(serde::de::Error::custom(format!("key '{key}' is in it twice")));
                    }
                }
                Ok(Unique(values))
            }
        }
        from.deserialize_map(Object)
    }
}
