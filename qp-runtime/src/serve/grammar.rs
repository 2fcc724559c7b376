//! Structured output: which tokens a JSON schema, a regular expression or a grammar allows next, by `llguidance`.

use std::sync::{Arc, OnceLock};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::Value;

use super::choose::Grammar;
use crate::engine::mask_words;
use crate::model::Tokenizer;

/// What a text must be like.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// Some JSON object.
    Object,
    /// JSON that fits a schema.
    Schema(Value),
    /// A text that a regular expression matches whole.
    Regex(String),
    /// A text of a context-free grammar in Lark's notation.
    Lark(String),
}

/// Compiles grammars for one model's tokens. The tokens' tree is made when the first grammar is asked for.
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    end: Arc<[u32]>,
    factory: OnceLock<Result<ParserFactory, String>>,
}

impl Grammars {
    /// Grammars over the tokens of `tokenizer`; `end` are the tokens that end a text.
    pub fn new(tokenizer: Arc<Tokenizer>, end: Arc<[u32]>) -> Self {
        Grammars { tokenizer, end, factory: OnceLock::new() }
    }

    /// A grammar at its beginning, for each of `n` answers.
    ///
    /// # Errors
    /// If the form is malformed or too large, or the model has no token that ends a text.
    pub fn compile(&self, form: &Form, n: usize) -> Result<Vec<Box<dyn Grammar>>, String> {
        let grammar = match form {
            Form::Object => TopLevelGrammar::from_json_schema(compact(serde_json::json!({"type": "object"}))),
            Form::Schema(schema) => TopLevelGrammar::from_json_schema(compact(schema.clone())),
            Form::Regex(pattern) => TopLevelGrammar::from_regex(pattern),
            Form::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let factory = self.factory.get_or_init(|| self.factory()).as_ref().map_err(Clone::clone)?;
        let mut matcher = Matcher::new(factory.create_parser(grammar));
        match matcher.get_error() {
            Some(error) => Err(said(error)),
            None => {
                // An unsatisfiable form shows when the first token is to be chosen.
                matcher.compute_mask_or_eos().map_err(said)?;
                // Each by itself: answers are chosen on several threads.
                Ok((0..n).map(|_| Box::new(Tokens(matcher.deep_clone())) as Box<dyn Grammar>).collect())
            }
        }
    }

    fn factory(&self) -> Result<ParserFactory, String> {
        let Some(&first) = self.end.first() else {
            return Err("the model has no token that ends a text, so its output cannot be given a form".to_owned());
        };
        let words = self.tokenizer.all_bytes();
        let info = TokRxInfo::new(words.len() as u32, first);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&self.end);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(said)?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(factory)
    }
}

/// An error of llguidance's without the mark of what it leaves out.
fn said(error: impl std::fmt::Display) -> String {
    error.to_string().replace("<non-verbose/>", "").trim_end().to_owned()
}

struct Tokens(Matcher);

impl Grammar for Tokens {
    fn forbidden(&mut self, vocab: usize) -> Result<Vec<u32>, String> {
        let allowed = self.0.compute_mask_or_eos().map_err(said)?;
        let mut words: Vec<u32> = allowed.as_slice().iter().map(|word| !word).collect();
        // The model may have more tokens than the tokenizer.
        words.resize(mask_words(vocab as u32) as usize, u32::MAX);
        Ok(words)
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        self.0.consume_token(token).map_err(said)
    }

    fn is_done(&self) -> bool {
        self.0.is_stopped()
    }
}

/// The schema, with no space between the parts of a text unless it says otherwise: a model that is allowed to may write
/// spaces until its tokens are used up.
fn compact(mut schema: Value) -> Value {
    if let Value::Object(keys) = &mut schema {
        keys.entry("x-guidance").or_insert_with(|| serde_json::json!({"whitespace_flexible": false}));
    }
    schema
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::engine::Sampling;
    use crate::serve::choose::{Chooser, Choosing};

    const END: u32 = 1;

    /// Texts of random tokens under a grammar: the logits are noise.
    fn write(form: &Form, seed: u64) -> String {
        let model = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/kjv-llama"));
        let tokenizer = Arc::new(Tokenizer::read(model).unwrap());
        let grammars = Grammars::new(tokenizer.clone(), Arc::from([END]));
        let sampling = Sampling { temperature: 1.0, seed, ..Sampling::default() };
        let grammar = grammars.compile(form, 1).unwrap().pop();
        let mut chooser = Chooser::new(Choosing { sampling, grammar, ..Choosing::default() }, &[]);
        let mut tokens = Vec::new();
        let mut state = seed;
        while tokens.len() < 400 && !chooser.is_done() {
            let mut logits: Vec<f32> = (0..2048)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (state >> 40) as f32 / (1 << 22) as f32
                })
                .collect();
            logits[END as usize] = 9.0;
            let (token, _) = chooser.choose(&mut logits).unwrap();
            if token == END {
                break;
            }
            tokens.push(token);
        }
        tokenizer.decode(&tokens).unwrap()
    }

    #[test]
    fn texts_have_the_form() {
        let schema = json!({"type": "object", "additionalProperties": false, "required": ["name", "age", "kind"], "properties": {
            "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["a", "bc"]}, "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}}});
        for seed in 0..5 {
            let text = write(&Form::Schema(schema.clone()), seed);
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!(value["name"].as_str().unwrap().chars().count() <= 12, "{text}");
            assert!((0..=150).contains(&value["age"].as_i64().unwrap()), "{text}");
            assert!(["a", "bc"].contains(&value["kind"].as_str().unwrap()), "{text}");
            let text = write(&Form::Regex("(yes|no), [0-9]{2,4}\\.".to_owned()), seed);
            let number = text.strip_prefix("yes, ").or(text.strip_prefix("no, ")).unwrap().strip_suffix('.').unwrap();
            assert!((2..=4).contains(&number.len()) && number.parse::<u32>().is_ok(), "{text}");
        }
        let lark = "start: \"<\" word (\" \" word){2} \">\"\nword: \"ab\" | \"ba\"";
        let text = write(&Form::Lark(lark.to_owned()), 3);
        assert!(text.len() == 10 && text.starts_with('<') && text.ends_with('>'), "{text}");
    }

    #[test]
    fn bad_forms_are_refused() {
        let model = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/kjv-llama"));
        let tokenizer = Arc::new(Tokenizer::read(model).unwrap());
        let grammars = Grammars::new(tokenizer.clone(), Arc::from([END]));
        for form in [
            Form::Schema(json!({"type": "nonsense"})),
            Form::Schema(json!(3)),
            Form::Regex("(".to_owned()),
            Form::Lark("start: nowhere".to_owned()),
        ] {
            assert!(grammars.compile(&form, 1).is_err(), "{form:?}");
        }
        assert!(Grammars::new(tokenizer, Arc::from([])).compile(&Form::Object, 1).err().unwrap().contains("no token"));
    }
}
