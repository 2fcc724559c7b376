//! What requests may say. A parameter that would have no effect is refused, so that no client relies on it; those are
//! accepted and ignored that only label a request.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;
use crate::engine::Sampling;
use crate::serve::grammar::Form;

/// Most answers to one request: prompts times `n`.
pub const MOST_ANSWERS: usize = 128;

/// Smaller temperatures are none: they draw the likeliest token too, unless another is as likely to the last bit.
const LEAST_TEMPERATURE: f32 = 1e-6;

/// Parameters that label a request and have no effect on its answer.
const LABELS: [&str; 7] =
    ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"];

/// Parameters of OpenAI's that are not supported, and what to do without them.
const UNSUPPORTED: [(&str, &str); 9] = [
    ("functions", "use 'tools'"),
    ("function_call", "use 'tools'"),
    ("suffix", "texts are continued at their end only"),
    ("audio", "the model writes text only"),
    ("modalities", "the model writes text only"),
    ("prediction", "answers are not predicted"),
    ("reasoning_effort", "say it by 'chat_template_kwargs' if the model's template knows it"),
    ("verbosity", "say it in a message"),
    ("web_search_options", "there is no search"),
];

/// The parameters of a request, which are taken out one by one.
#[derive(Clone, Debug)]
pub struct Fields(Map<String, Value>);

impl Fields {
    /// The parameters of a request's body.
    ///
    /// # Errors
    /// If the body is no JSON object.
    pub fn parse(body: &[u8]) -> Result<Fields, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Fields(fields)),
            Ok(_) => Err(ApiError::new(axum::http::StatusCode::BAD_REQUEST, "the body is no JSON object")),
            Err(e) => Err(ApiError::new(axum::http::StatusCode::BAD_REQUEST, format!("the body is not JSON: {e}"))),
        }
    }

    /// Takes a parameter; `None` if it is missing or null.
    ///
    /// # Errors
    /// If it is of another type.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        match self.0.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match serde_json::from_value(value) {
                Ok(value) => Ok(Some(value)),
                Err(e) => Err(ApiError::parameter(name, format!("{name}: {e}"))),
            },
        }
    }

    /// Takes the tools, for the template.
    ///
    /// # Errors
    /// If they are no list of objects.
    pub fn tools(&mut self) -> Result<Option<Value>, ApiError> {
        let tools: Option<Vec<Map<String, Value>>> = self.take("tools")?;
        Ok(tools.filter(|t| !t.is_empty()).map(|t| t.into_iter().map(Value::Object).collect()))
    }

    /// As [`Fields::take`], for a number within `low` and `high`.
    ///
    /// # Errors
    /// If it is none or outside.
    fn number(&mut self, name: &str, default: f32, low: f32, high: f32) -> Result<f32, ApiError> {
        match self.take(name)? {
            None => Ok(default),
            Some(v) if (low..=high).contains(&v) => Ok(v),
            Some(v) => Err(ApiError::parameter(name, format!("{name} is {v}: expected {low} to {high}"))),
        }
    }

    /// Refuses the parameters that were not taken, but for labels and those that say nothing.
    ///
    /// # Errors
    /// If there are others.
    pub fn end(self) -> Result<(), ApiError> {
        for (name, value) in &self.0 {
            let cure = UNSUPPORTED.iter().find(|(n, _)| n == name).map(|(_, cure)| *cure);
            let nothing = value.is_null()
                || *value == Value::Bool(false)
                || (name == "modalities" && *value == serde_json::json!(["text"]));
            if LABELS.contains(&name.as_str()) || (nothing && cure.is_some()) {
                continue;
            }
            let message = format!("'{name}' is not supported: {}", cure.unwrap_or("remove it"));
            return Err(ApiError::parameter(name, message).with_code("unsupported_parameter"));
        }
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
    #[serde(default, rename = "include_obfuscation")]
    _include_obfuscation: bool,
}

/// `POST /v1/chat/completions`.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatRequest {
    /// The conversation.
    pub messages: Vec<Value>,
    /// Tools for the template, unless they are not to be called.
    pub tools: Option<Value>,
    /// Further variables of the template.
    pub variables: Map<String, Value>,
    /// How answers are made.
    pub ask: Ask,
}

/// `POST /v1/completions`.
#[derive(Clone, Debug, PartialEq)]
pub struct CompletionRequest {
    /// The texts to continue.
    pub prompts: Vec<Prompt>,
    /// How answers are made.
    pub ask: Ask,
}

/// A text to continue.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// As text.
    Text(String),
    /// As tokens.
    Tokens(Vec<u32>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text, a list of tokens, or a list of either")]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

/// What a request is checked against.
#[derive(Clone, Copy, Debug)]
pub struct Serving<'a> {
    /// Name of the model that is served.
    pub model: &'a str,
    /// A seed for requests without one.
    pub seed: u64,
}

/// How answers are made.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// Drawing; the seed of the first answer.
    pub sampling: Sampling,
    /// See [`crate::serve::choose::Choosing`].
    pub bias: Vec<(u32, f32)>,
    /// Taken from logits of tokens that were generated.
    pub presence: f32,
    /// The same for each time.
    pub frequency: f32,
    /// The factor of tokens that occurred.
    pub repetition: Option<f32>,
    /// Reported probabilities.
    pub logprobs: Option<usize>,
    /// Tokens at most.
    pub most: Option<usize>,
    /// Answers to each prompt.
    pub n: usize,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Whether the answer comes in parts.
    pub stream: bool,
    /// Whether a streamed answer ends with the numbers of tokens.
    pub usage: bool,
    /// What the answer must be like.
    pub form: Option<Form>,
    /// Whether tokens that end a text do not end the answer.
    pub endless: bool,
}

impl Ask {
    /// Takes the parameters that chat and plain completions have in common.
    fn read(fields: &mut Fields, serving: Serving<'_>) -> Result<Ask, ApiError> {
        if let Some(name) = fields.take::<String>("model")?.filter(|m| !m.is_empty() && m != serving.model) {
            let message = format!("model '{name}' is not here: this server has '{}'", serving.model);
            let error = ApiError::parameter("model", message).with_code("model_not_found");
            return Err(ApiError { status: axum::http::StatusCode::NOT_FOUND, ..error });
        }
        let n = fields.take("n")?.unwrap_or(1);
        if n == 0 || n > MOST_ANSWERS {
            return Err(ApiError::parameter("n", format!("n is {n}: expected 1 to {MOST_ANSWERS}")));
        }
        let mut bias = Vec::new();
        for (token, value) in fields.take::<BTreeMap<String, f32>>("logit_bias")?.unwrap_or_default() {
            match token.parse() {
                Ok(token) if (-100.0..=100.0).contains(&value) => bias.push((token, value)),
                _ => {
                    let message = "logit_bias: expected numbers of tokens with values from -100 to 100";
                    return Err(ApiError::parameter("logit_bias", message));
                }
            }
        }
        let stop = match fields.take("stop")? {
            None => Vec::new(),
            Some(OneOrMany::One(text)) => vec![text],
            Some(OneOrMany::Many(texts)) => texts,
        };
        if stop.len() > 16 || stop.iter().any(|s| s.is_empty() || s.len() > 1000) {
            return Err(ApiError::parameter("stop", "stop: expected up to 16 texts of 1 to 1000 bytes"));
        }
        let stream = fields.take("stream")?.unwrap_or(false);
        let options: Option<StreamOptions> = fields.take("stream_options")?;
        if options.is_some() && !stream {
            return Err(ApiError::parameter("stream_options", "stream_options needs stream = true"));
        }
        let repetition = fields.number("repetition_penalty", 1.0, 0.01, 100.0)?;
        let temperature = fields.number("temperature", 1.0, 0.0, 100.0)?;
        Ok(Ask {
            sampling: Sampling {
                temperature: if temperature < LEAST_TEMPERATURE { 0.0 } else { temperature },
                top_k: fields.take("top_k")?.unwrap_or(0),
                top_p: fields.number("top_p", 1.0, 0.0, 1.0)?,
                min_p: fields.number("min_p", 0.0, 0.0, 1.0)?,
                seed: fields.take::<i64>("seed")?.map_or(serving.seed, |s| s as u64),
            },
            bias,
            presence: fields.number("presence_penalty", 0.0, -2.0, 2.0)?,
            frequency: fields.number("frequency_penalty", 0.0, -2.0, 2.0)?,
            repetition: (repetition != 1.0).then_some(repetition),
            logprobs: None,
            most: fields.take("max_tokens")?,
            n,
            stop,
            stream,
            usage: options.is_some_and(|o| o.include_usage),
            form: fields.take::<Value>("response_format")?.as_ref().map(form).transpose()?.flatten(),
            endless: fields.take("ignore_eos")?.unwrap_or(false),
        })
    }
}

impl ChatRequest {
    /// Reads a request.
    ///
    /// # Errors
    /// If a parameter is missing, wrong or not supported.
    pub fn read(mut fields: Fields, serving: Serving<'_>) -> Result<ChatRequest, ApiError> {
        let messages: Vec<Value> = fields.take("messages")?.unwrap_or_default();
        if messages.is_empty() {
            return Err(ApiError::parameter("messages", "messages: expected a list of at least one message"));
        }
        let tools = fields.tools()?;
        let tools = match fields.take::<Value>("tool_choice")?.as_ref().map(|c| c.as_str()) {
            None | Some(Some("auto")) => tools,
            Some(Some("none")) => None,
            Some(_) => {
                let message = "tool_choice: only 'auto' and 'none' can be followed; a form of the answer can be required \
                               by 'response_format'";
                return Err(ApiError::parameter("tool_choice", message));
            }
        };
        let variables = fields.take("chat_template_kwargs")?.unwrap_or_default();
        let top = fields.take::<usize>("top_logprobs")?;
        let logprobs = match (fields.take("logprobs")?.unwrap_or(false), top.unwrap_or(0)) {
            (false, 0) => None,
            (false, _) => return Err(ApiError::parameter("top_logprobs", "top_logprobs needs logprobs = true")),
            (true, n) if n <= 20 => Some(n),
            (true, _) => return Err(ApiError::parameter("top_logprobs", "top_logprobs: expected 0 to 20")),
        };
        let most = fields.take("max_completion_tokens")?;
        let ask = Ask::read(&mut fields, serving)?;
        fields.end()?;
        Ok(ChatRequest { messages, tools, variables, ask: Ask { logprobs, most: most.or(ask.most), ..ask } })
    }
}

impl CompletionRequest {
    /// Reads a request.
    ///
    /// # Errors
    /// If a parameter is missing, wrong or not supported.
    pub fn read(mut fields: Fields, serving: Serving<'_>) -> Result<CompletionRequest, ApiError> {
        let prompts = match fields.take("prompt")? {
            None => return Err(ApiError::parameter("prompt", "prompt is missing: expected a text or tokens")),
            Some(Prompts::Text(text)) => vec![Prompt::Text(text)],
            Some(Prompts::Texts(texts)) => texts.into_iter().map(Prompt::Text).collect(),
            Some(Prompts::Tokens(tokens)) => vec![Prompt::Tokens(tokens)],
            Some(Prompts::TokenLists(lists)) => lists.into_iter().map(Prompt::Tokens).collect(),
        };
        let logprobs: Option<usize> = fields.take("logprobs")?;
        if logprobs.is_some_and(|n| n > 20) {
            return Err(ApiError::parameter("logprobs", "logprobs: expected 0 to 20"));
        }
        if fields.take("echo")?.unwrap_or(false) {
            return Err(ApiError::parameter("echo", "echo: the prompt is not repeated; put it before the answer"));
        }
        let best_of: Option<usize> = fields.take("best_of")?;
        let ask = Ask::read(&mut fields, serving)?;
        if best_of.is_some_and(|b| b != ask.n) {
            return Err(ApiError::parameter("best_of", "best_of: all answers are given back; expected n"));
        }
        fields.end()?;
        if prompts.is_empty() {
            return Err(ApiError::parameter("prompt", "prompt is an empty list: expected a text or tokens"));
        }
        if prompts.len() * ask.n > MOST_ANSWERS {
            let message =
                format!("{} prompts with {} answers each: expected 1 to {MOST_ANSWERS} answers", prompts.len(), ask.n);
            return Err(ApiError::parameter("prompt", message));
        }
        // As OpenAI has it: short answers, unless more is asked for.
        Ok(CompletionRequest { prompts, ask: Ask { logprobs, most: ask.most.or(Some(16)), ..ask } })
    }
}

/// `response_format`.
fn form(value: &Value) -> Result<Option<Form>, ApiError> {
    let wrong = |what: &str| ApiError::parameter("response_format", format!("response_format: {what}"));
    let text = |name: &str| match value.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(wrong(&format!("'{name}' must be a text"))),
        None => Err(wrong(&format!("'{name}' is missing"))),
    };
    match value.get("type").and_then(Value::as_str) {
        _ if value.is_null() => Ok(None),
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Form::Object)),
        Some("json_schema") => {
            let schema = value.get("json_schema").and_then(|v| v.get("schema")).cloned();
            Ok(Some(Form::Schema(schema.ok_or_else(|| wrong("json_schema.schema is missing"))?)))
        }
        Some("regex") => Ok(Some(Form::Regex(text("regex")?))),
        Some("grammar") => Ok(Some(Form::Lark(text("grammar")?))),
        _ => Err(wrong("type: expected text, json_object, json_schema, regex or grammar")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SERVING: Serving<'_> = Serving { model: "m", seed: 9 };

    fn chat(body: Value) -> Result<Ask, ApiError> {
        let mut all = json!({"messages": [{"role": "user", "content": "x"}]});
        all.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        Ok(ChatRequest::read(Fields::parse(all.to_string().as_bytes())?, SERVING)?.ask)
    }

    fn completion(body: Value) -> Result<CompletionRequest, ApiError> {
        CompletionRequest::read(Fields::parse(body.to_string().as_bytes())?, SERVING)
    }

    #[test]
    fn defaults_are_those_of_openai() {
        let a = chat(json!({"model": "m", "user": "u", "functions": null, "top_p": null})).unwrap();
        assert_eq!((a.sampling.temperature, a.sampling.top_p, a.sampling.seed, a.n), (1.0, 1.0, 9, 1));
        assert_eq!((a.most, a.stream, a.logprobs, a.form), (None, false, None, None));
        let said = json!({"stop": "x", "seed": -1, "logit_bias": {"3": -100}, "logprobs": true, "max_tokens": 3});
        let a = chat(said).unwrap();
        assert_eq!((a.stop, a.sampling.seed, a.bias), (vec!["x".to_owned()], u64::MAX, vec![(3, -100.0)]));
        assert_eq!((a.logprobs, a.most), (Some(0), Some(3)));
        assert_eq!(chat(json!({"max_tokens": 3, "max_completion_tokens": 4})).unwrap().most, Some(4));
        let c = completion(json!({"prompt": [[1, 2], [3]], "n": 2})).unwrap();
        assert_eq!((c.prompts, c.ask.most), (vec![Prompt::Tokens(vec![1, 2]), Prompt::Tokens(vec![3])], Some(16)));
        assert_eq!(completion(json!({"prompt": "a"})).unwrap().prompts, [Prompt::Text("a".to_owned())]);
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        for (body, param) in [
            (json!({"messages": []}), "messages"),
            (json!({"messages": "hello"}), "messages"),
            (json!({"temperature": -1}), "temperature"),
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"top_p": 1.5}), "top_p"),
            (json!({"presence_penalty": 3}), "presence_penalty"),
            (json!({"n": 0}), "n"),
            (json!({"n": 1000}), "n"),
            (json!({"max_tokens": -1}), "max_tokens"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"logit_bias": {"1": 101}}), "logit_bias"),
            (json!({"stop": ["", "a"]}), "stop"),
            (json!({"stream_options": {"include_usage": true}}), "stream_options"),
            (json!({"response_format": {"type": "xml"}}), "response_format"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format"),
            (json!({"top_logprobs": 3}), "top_logprobs"),
            (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"functions": []}), "functions"),
            (json!({"tools": [1]}), "tools"),
            (json!({"nonsense": 1}), "nonsense"),
            (json!({"model": "other"}), "model"),
        ] {
            assert_eq!(chat(body.clone()).unwrap_err().param.as_deref(), Some(param), "{body}");
        }
        for (body, param) in [
            (json!({}), "prompt"),
            (json!({"prompt": []}), "prompt"),
            (json!({"prompt": {"a": 1}}), "prompt"),
            (json!({"prompt": "a", "echo": true}), "echo"),
            (json!({"prompt": "a", "best_of": 3}), "best_of"),
            (json!({"prompt": "a", "logprobs": 30}), "logprobs"),
            (json!({"prompt": ["a", "b"], "n": 100}), "prompt"),
        ] {
            assert_eq!(completion(body.clone()).unwrap_err().param.as_deref(), Some(param), "{body}");
        }
        assert!(Fields::parse(b"[1]").is_err() && Fields::parse(b"{").is_err());
    }
}
