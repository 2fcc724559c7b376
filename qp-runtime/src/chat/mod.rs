//! Conversations with a model: its chat template, and the prompts that follow from messages.
//!
//! * [`template`]: the model's own Jinja template, rendered as Hugging Face's transformers renders it.
//! * [`python`]: values as Python prints them, which templates rely on.
//! * [`stop`]: texts that end an answer.
//! * [`conversation`]: the messages of one conversation in a terminal, and how they are kept within the context.
//!
//! Messages are JSON objects in OpenAI's form (`role`, `content`, `tool_calls` …), because that is what templates expect.

pub mod conversation;
pub mod python;
pub mod stop;
pub mod template;

use serde_json::{Map, Value};

use crate::model::{self, Files, Tokenizer};
pub use conversation::Conversation;
pub use stop::StopTexts;
pub use template::Template;

/// What can be wrong with a template or with the messages that it was given.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the model cannot be read or does not say what it should.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// The template cannot be compiled or fails while it runs.
    #[error("the model's chat template fails: {place}: {what}{}", excerpt.as_ref().map(|l| format!(": {l}")).unwrap_or_default())]
    Template {
        /// File and line, as in `chat_template.jinja:12`.
        place: String,
        /// What is wrong there.
        what: String,
        /// The line of the template, shortened.
        excerpt: Option<String>,
    },
    /// The template itself refused the messages (by `raise_exception`).
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// A message is not of the expected form.
    #[error("message {index}: {what}")]
    Message {
        /// Which message, from 0.
        index: usize,
        /// What is wrong with it.
        what: String,
    },
}

/// How a model is talked to.
#[derive(Debug)]
pub struct Chat {
    template: Template,
    /// Tokens that end an answer.
    pub end: Vec<u32>,
    /// Texts that end an answer: those that separate speakers where the model has no template of its own.
    pub stop: Vec<String>,
}

/// What a template is told beside the messages.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Tools in OpenAI's form, if there are any.
    pub tools: Option<Value>,
    /// Further variables of the template, such as `enable_thinking`.
    pub variables: Map<String, Value>,
}

impl Chat {
    /// Reads how the model of `files` is talked to; `eos` are the tokens that its configuration says end a text.
    ///
    /// # Errors
    /// If a file is malformed or the template has a syntax error.
    pub fn open(files: &Files, tokenizer: &Tokenizer, eos: &[u32]) -> Result<Self, Error> {
        let template = Template::read(files)?;
        let mut end = eos.to_vec();
        end.extend(template.special("eos_token").and_then(|t| tokenizer.id(t)).filter(|id| !eos.contains(id)));
        let stop = if template.is_plain() { vec![format!("\n{}", template::PLAIN_USER)] } else { Vec::new() };
        Ok(Chat { template, end, stop })
    }

    /// True if the model has no template and messages are written as lines of a plain dialogue.
    pub fn is_plain(&self) -> bool {
        self.template.is_plain()
    }

    /// The prompt after which the assistant's answer to `messages` follows, as text and as tokens.
    ///
    /// # Errors
    /// If a message is malformed, the template fails or the tokenizer does.
    pub fn prompt(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Value],
        options: &Options,
    ) -> Result<(String, Vec<u32>), Error> {
        let text = self.text(messages, options)?;
        let tokens = self.tokens(tokenizer, &text)?;
        Ok((text, tokens))
    }

    /// The text of [`Chat::prompt`].
    ///
    /// # Errors
    /// If a message is malformed or the template fails.
    pub fn text(&self, messages: &[Value], options: &Options) -> Result<String, Error> {
        self.template.render(&normalise(messages)?, options)
    }

    /// The tokens of what [`Chat::text`] gave.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn tokens(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Error> {
        // A template writes the special tokens itself; the plain dialogue leaves them to the tokenizer.
        Ok(match self.is_plain() {
            true => tokenizer.encode(text)?,
            false => tokenizer.encode_exact(text)?,
        })
    }
}

/// Who may speak.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// Messages as templates expect them: the content one text where it is a list of texts, arguments of tool calls
/// parsed.
fn normalise(messages: &[Value]) -> Result<Vec<Value>, Error> {
    let wrong = |index: usize, what: &str| Error::Message { index, what: what.to_owned() };
    let one = |(index, message): (usize, &Value)| {
        let Value::Object(fields) = message else { return Err(wrong(index, "expected an object")) };
        let mut fields = fields.clone();
        let role = match fields.get("role") {
            Some(Value::String(role)) if ROLES.contains(&role.as_str()) => None,
            Some(Value::String(role)) => Some(format!("the role '{role}' is not known")),
            Some(_) => Some("'role' must be a text".to_owned()),
            None => Some("'role' is missing".to_owned()),
        };
        if let Some(what) = role {
            return Err(wrong(index, &format!("{what}: expected one of {}", ROLES.join(", "))));
        }
        let content = match fields.get("content") {
            None | Some(Value::Null) => Value::Null,
            Some(Value::String(text)) => Value::String(text.clone()),
            Some(Value::Array(parts)) => {
                let text = |p: &Value| match (p.get("type")?.as_str()?, p.get("text")?) {
                    ("text", Value::String(text)) => Some(text.clone()),
                    _ => None,
                };
                let texts: Option<Vec<String>> = parts.iter().map(text).collect();
                let what = "'content' has a part that is no text: only {\"type\": \"text\", \"text\": …} can be read";
                Value::String(texts.ok_or_else(|| wrong(index, what))?.join("\n"))
            }
            Some(_) => return Err(wrong(index, "'content' must be a text or a list of parts")),
        };
        let calls = fields.get_mut("tool_calls").and_then(Value::as_array_mut);
        if content.is_null() && calls.is_none() {
            return Err(wrong(index, "'content' is missing"));
        }
        for call in calls.into_iter().flatten() {
            if let Some(arguments) = call.get_mut("function").and_then(|f| f.get_mut("arguments"))
                && let Some(Ok(parsed @ Value::Object(_))) = arguments.as_str().map(serde_json::from_str)
            {
                *arguments = parsed;
            }
        }
        fields.insert("content".to_owned(), content);
        Ok(Value::Object(fields))
    };
    messages.iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn messages_take_one_form() {
        let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
        let call = json!({"role": "assistant", "content": null,
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]});
        let out = normalise(&[parts, call]).unwrap();
        assert_eq!(out[0]["content"], "a\nb");
        assert_eq!(out[1]["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
    }

    #[test]
    fn malformed_messages_are_named() {
        let error = |m: Value| normalise(&[json!({"role": "user", "content": ""}), m]).unwrap_err().to_string();
        assert_eq!(error(json!(3)), "message 1: expected an object");
        assert!(error(json!({"content": "x"})).contains("'role' is missing"));
        assert!(error(json!({"role": 5, "content": "x"})).contains("'role' must be a text"));
        assert!(
            error(json!({"role": "alien", "content": "x"})).contains("'alien' is not known: expected one of system")
        );
        assert!(error(json!({"role": "user"})).contains("'content' is missing"));
        assert!(error(json!({"role": "user", "content": 3})).contains("must be a text"));
        let image = json!([{"type": "image_url", "image_url": {"url": "x"}}]);
        assert!(error(json!({"role": "user", "content": image})).contains("no text"));
    }
}
