//! A model's chat template, in Jinja, rendered as Hugging Face's transformers renders it.
//!
//! Where it is found, in this order: `chat_template.jinja` (with `additional_chat_templates/tool_use.jinja`; in a GGUF file
//! `tokenizer.chat_template`), `chat_template.json`, `chat_template` of `tokenizer_config.json`, which is a text or a list of
//! named ones. Of named ones `tool_use` is taken when there are tools, else `default`.
//!
//! Blocks take their line with them (`trim_blocks`, `lstrip_blocks`), loops have `break` and `continue`, values print as
//! Python prints them, `tojson`, `raise_exception` and `strftime_now` are there, and the marks of training
//! (`{% generation %}`) have no effect. A rendering has a budget of steps and memory, so that every template ends.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, Output, State, UndefinedBehavior};
use serde_json::{Map, Value};

use super::python::{self, Dumps};
use super::{Error, Options};
use crate::model::{self, Files};

/// Budget of one rendering: instructions, and 64 bytes each of data.
const FUEL: u64 = 4_000_000;

/// How the plain dialogue begins a line of the user's.
pub const PLAIN_USER: &str = "User:";

/// A dialogue for models without a template: one that many texts of the world are written in.
const PLAIN: &str = "\
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content }}

{% elif message.role == 'assistant' %}Assistant: {{ message.content }}
{% else %}User: {{ message.content }}
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}";

/// Names of special tokens in `tokenizer_config.json`, which are variables of templates.
const SPECIAL: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A compiled chat template with the special tokens that it may write.
pub struct Template {
    env: Environment<'static>,
    /// File of the template, by the template's name.
    names: BTreeMap<String, String>,
    special: BTreeMap<&'static str, String>,
    plain: bool,
}

impl std::fmt::Debug for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Template").field("names", &self.names).field("special", &self.special).finish_non_exhaustive()
    }
}

/// What `raise_exception` was called with.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl Template {
    /// Reads a model's template; without one, that of a plain dialogue.
    ///
    /// # Errors
    /// If a file is malformed or a template has a syntax error.
    pub fn read(files: &Files) -> Result<Self, Error> {
        let config = json(files, "tokenizer_config.json")?.unwrap_or(Value::Null);
        let map = json(files, "special_tokens_map.json")?.unwrap_or(Value::Null);
        let content = |v: &Value| Some(v.as_str().or_else(|| v.get("content")?.as_str())?.to_owned());
        let special = SPECIAL
            .iter()
            .filter_map(|&name| Some((name, [&config, &map].into_iter().find_map(|file| content(file.get(name)?))?)));
        let special = special.collect();

        let mut sources = Template::sources(files, &config)?;
        let plain = sources.is_empty();
        if plain {
            sources.push(("default".to_owned(), "the plain dialogue".to_owned(), PLAIN.to_owned()));
        }
        Template::new(sources, special, plain)
    }

    /// The text of a model's template, if it has one; of several the default one.
    ///
    /// # Errors
    /// If a file is malformed.
    pub fn text(files: &Files) -> Result<Option<String>, Error> {
        let config = json(files, "tokenizer_config.json")?.unwrap_or(Value::Null);
        let sources = Template::sources(files, &config)?;
        Ok(sources.into_iter().find(|(name, ..)| name == "default").map(|(_, _, text)| text))
    }

    /// Name, file and text of each template of a model; `config` is its `tokenizer_config.json`.
    fn sources(files: &Files, config: &Value) -> Result<Vec<(String, String, String)>, Error> {
        let mut sources: Vec<(String, String, String)> = Vec::new();
        let file = "chat_template.jinja";
        if let Some(text) = files.text(file)? {
            sources.push(("default".to_owned(), file.to_owned(), text));
        }
        let file = "additional_chat_templates/tool_use.jinja";
        if let Some(text) = files.text(file)? {
            sources.push(("tool_use".to_owned(), file.to_owned(), text));
        }
        if sources.is_empty() {
            let legacy = json(files, "chat_template.json")?;
            for (file, object) in [("chat_template.json", legacy.as_ref()), ("tokenizer_config.json", Some(config))] {
                if let Some(found) = object.and_then(|o| o.get("chat_template")) {
                    sources = named(files, file, found)?;
                    break;
                }
            }
        }
        Ok(sources)
    }

    fn new(
        sources: Vec<(String, String, String)>,
        special: BTreeMap<&'static str, String>,
        plain: bool,
    ) -> Result<Self, Error> {
        let mut template = Template { env: environment(), names: BTreeMap::new(), special, plain };
        for (name, file, source) in sources {
            template.names.insert(name.clone(), file);
            let added = template.env.add_template_owned(name, without_marks(&source));
            added.map_err(|e| template.located(&e))?;
        }
        Ok(template)
    }

    /// True if the model has no template of its own.
    pub fn is_plain(&self) -> bool {
        self.plain
    }

    /// The text of a special token, such as `eos_token`.
    pub fn special(&self, name: &str) -> Option<&str> {
        self.special.get(name).map(String::as_str)
    }

    /// The prompt for `messages`, up to where the assistant begins to answer.
    ///
    /// # Errors
    /// If the template fails, refuses the messages or does not end within its budget.
    pub fn render(&self, messages: &[Value], options: &Options) -> Result<String, Error> {
        let mut variables = Map::new();
        for (name, text) in &self.special {
            variables.insert((*name).to_owned(), Value::String(text.clone()));
        }
        variables.insert("messages".to_owned(), Value::Array(messages.to_vec()));
        variables.insert("tools".to_owned(), options.tools.clone().unwrap_or(Value::Null));
        variables.insert("documents".to_owned(), Value::Null);
        variables.insert("add_generation_prompt".to_owned(), Value::Bool(true));
        variables.extend(options.variables.clone());
        let name = if options.tools.is_some() && self.names.contains_key("tool_use") { "tool_use" } else { "default" };
        // A model with one named template only has that one.
        let name =
            if self.names.contains_key(name) { Some(name) } else { self.names.keys().next().map(String::as_str) };
        let compiled = self.env.get_template(name.unwrap_or("default")).map_err(|e| self.located(&e))?;
        compiled.render(Jinja::from(Serde(variables))).map_err(|e| self.located(&e))
    }

    /// An error of the template's with its place.
    fn located(&self, error: &minijinja::Error) -> Error {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(e) = cause {
            if let Some(Raised(text)) = e.downcast_ref() {
                return Error::Refused(text.clone());
            }
            cause = e.source();
        }
        let name = error.name().unwrap_or("default");
        let file = self.names.get(name).map_or(name, String::as_str);
        let line = error.line().unwrap_or(1);
        let excerpt = error.template_source().and_then(|s| s.lines().nth(line - 1)).map(|l| shortened(l.trim(), error));
        let what = match error.kind() {
            ErrorKind::OutOfFuel => {
                "it does not end within the steps and the memory that a template may take".to_owned()
            }
            kind => error.detail().map_or_else(|| kind.to_string(), |d| format!("{kind}: {d}")),
        };
        Error::Template { place: format!("{file}:{line}"), what, excerpt }
    }
}

/// At most 120 characters of a line: templates are often one line. What the error is about, if it is known.
fn shortened(line: &str, error: &minijinja::Error) -> String {
    let exact = error.template_source().zip(error.range()).and_then(|(s, r)| s.get(r));
    let text = if line.chars().count() > 120 { exact.unwrap_or(line) } else { line };
    match text.char_indices().nth(120) {
        Some((end, _)) => format!("{} …", &text[..end]),
        None => text.to_owned(),
    }
}

/// The named templates of a `chat_template`: (name, file, source).
fn named(files: &Files, file: &str, found: &Value) -> Result<Vec<(String, String, String)>, Error> {
    let wrong = || {
        let what = "chat_template: expected a text, or a list of objects with 'name' and 'template'";
        Error::Model(model::Error::file(&files.path(file), what))
    };
    let one = |v: &Value| {
        let text = |key: &str| Some(v.get(key)?.as_str()?.to_owned());
        Some((text("name")?, format!("chat_template of {file}"), text("template")?))
    };
    match found {
        Value::String(text) => Ok(vec![("default".to_owned(), format!("chat_template of {file}"), text.clone())]),
        Value::Null => Ok(Vec::new()),
        Value::Array(items) => items.iter().map(|v| one(v).ok_or_else(wrong)).collect(),
        _ => Err(wrong()),
    }
}

fn json(files: &Files, name: &str) -> Result<Option<Value>, Error> {
    let parse =
        |text: String| serde_json::from_str(&text).map_err(|e| model::Error::file(&files.path(name), e.to_string()));
    Ok(files.text(name)?.map(parse).transpose()?)
}

/// The template without the marks by which training finds an assistant's words: blocks without effect take their place.
fn without_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|e| start + e + 2) else { break };
        let tag = &rest[start..end];
        let inner = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        let replaced = match inner {
            "generation" => tag.replace("generation", "if true"),
            "endgeneration" => tag.replace("endgeneration", "endif"),
            _ => tag.to_owned(),
        };
        out.push_str(&rest[..start]);
        out.push_str(&replaced);
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// Jinja as transformers sets it up.
fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    // Neither fails to build: no delimiter is changed.
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        env.set_syntax(syntax);
    }
    env.set_debug(true);
    env.set_fuel(Some(FUEL));
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(|out: &mut Output, _: &mut State, value: &Jinja| {
        let text = match value.kind() {
            ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
                python::text(&plain(value)?)
            }
            _ => value.to_string(),
        };
        out.write_str(&text).map_err(minijinja::Error::from)
    });
    env.add_filter("tojson", tojson);
    env.add_function("raise_exception", |text: String| {
        Err::<Jinja, _>(minijinja::Error::new(ErrorKind::InvalidOperation, text.clone()).with_source(Raised(text)))
    });
    env.add_function("strftime_now", |format: String| strftime_now(&format));
    env
}

/// A value of the template's as JSON.
fn plain(value: &Jinja) -> Result<Value, minijinja::Error> {
    if value.is_undefined() {
        return Err(minijinja::Error::new(ErrorKind::UndefinedError, "an undefined value is not JSON serializable"));
    }
    serde_json::to_value(value).map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))
}

fn tojson(value: &Jinja, options: Kwargs) -> Result<String, minijinja::Error> {
    let pair = |v: Jinja| -> Result<(String, String), minijinja::Error> {
        let text = |i: usize| Ok::<_, minijinja::Error>(v.get_item_by_index(i)?.to_string());
        Ok((text(0)?, text(1)?))
    };
    let how = Dumps {
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent: options.get("indent")?,
        separators: options.get::<Option<Jinja>>("separators")?.filter(|v| !v.is_none()).map(pair).transpose()?,
        sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    Ok(python::dumps(&plain(value)?, &how))
}

/// The local time in the form that `format` gives.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    static ZONE: OnceLock<jiff::tz::TimeZone> = OnceLock::new();
    let now = jiff::Timestamp::now().to_zoned(ZONE.get_or_init(jiff::tz::TimeZone::system).clone());
    jiff::fmt::strtime::format(format, &now)
        .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
}

#[cfg(test)]
mod tests;
