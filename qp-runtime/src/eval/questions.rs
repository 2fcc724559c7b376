//! Questions with choices: which of several continuations a model finds likeliest.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::nll;
use crate::engine::{self, Logits, Session};
use crate::model::{self, Tokenizer};

/// A question. In a file, one a line: `{"question": "…", "choices": [" …", " …"], "answer": 0}`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// The text before the choices.
    pub question: String,
    /// What may follow it, word for word: with the space before, if there is one.
    pub choices: Vec<String>,
    /// The right one, counted from 0.
    pub answer: usize,
}

/// What a model answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// Questions.
    pub questions: usize,
    /// Those whose right choice is the likeliest.
    pub right: usize,
    /// Those whose right choice is the likeliest by byte: long choices are unlikely ones.
    pub right_by_byte: usize,
}

/// What can be wrong with questions.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A line is no question.
    #[error("{}, line {line}: {what}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Which, counted from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// No questions.
    #[error("{} has no questions: give one a line, as {{\"question\": \"…\", \"choices\": [\"…\", \"…\"], \"answer\": 0}}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The text cannot be cut into tokens.
    #[error(transparent)]
    Tokens(#[from] model::Error),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] engine::Error),
}

/// Reads a file of questions; `path` is for messages.
///
/// # Errors
/// If a line is no question, or there are none.
pub fn read(path: &Path, text: &str) -> Result<Vec<Question>, Error> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let question = |(i, line): (usize, &str)| {
        let wrong = |what: String| Error::Line { path: path.to_owned(), line: i + 1, what };
        let question: Question = serde_json::from_str(line).map_err(|e| wrong(e.to_string()))?;
        let count = question.choices.len();
        if count < 2 {
            return Err(wrong(format!("{count} choices: expected 2 at least")));
        }
        if question.choices.iter().any(String::is_empty) {
            return Err(wrong("a choice is empty".to_owned()));
        }
        if question.answer >= count {
            return Err(wrong(format!("answer is {}: expected 0 to {}", question.answer, count - 1)));
        }
        Ok(question)
    };
    let questions = lines.map(question).collect::<Result<Vec<_>, _>>()?;
    if questions.is_empty() { Err(Error::Empty { path: path.to_owned() }) } else { Ok(questions) }
}

/// A question cut into tokens: of each choice all tokens, and how many of them the question alone begins with.
pub struct Prepared {
    choices: Vec<(Vec<u32>, usize)>,
    bytes: Vec<usize>,
    answer: usize,
}

impl Prepared {
    /// Cuts a question into tokens. `bos` begins what has no token before its first choice.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn new(question: &Question, tokenizer: &Tokenizer, bos: Option<u32>) -> Result<Self, Error> {
        let alone = tokenizer.encode(&question.question)?;
        let mut choices = Vec::new();
        for choice in &question.choices {
            let mut all = tokenizer.encode(&format!("{}{choice}", question.question))?;
            let mut same = alone.iter().zip(&all).take_while(|(a, b)| a == b).count();
            if same == 0 {
                all.splice(0..0, bos);
                same = all.len().min(1);
            }
            // The last token is scored in any case.
            choices.push((all.clone(), same.min(all.len().saturating_sub(1)).max(1)));
        }
        let bytes = question.choices.iter().map(String::len).collect();
        Ok(Prepared { choices, bytes, answer: question.answer })
    }

    /// Tokens of the longest choice with its question.
    pub fn tokens(&self) -> usize {
        self.choices.iter().map(|c| c.0.len()).max().unwrap_or(0)
    }
}

/// Asks all questions; `progress` sees how many are answered.
///
/// # Errors
/// If a question does not fit the context, or the engine fails.
pub fn ask(session: &mut Session, questions: &[Prepared], mut progress: impl FnMut(usize)) -> Result<Answers, Error> {
    let mut out = Answers { questions: questions.len(), ..Answers::default() };
    let mut logits = Vec::new();
    for (i, question) in questions.iter().enumerate() {
        let mut losses = Vec::new();
        for (tokens, same) in &question.choices {
            let (before, scored) = tokens.split_at(*same);
            let Some((last, inputs)) = scored.split_last() else {
                losses.push(f64::INFINITY);
                continue;
            };
            // What the question alone begins with is computed once for all choices.
            let rest = session.keep_common(before);
            session.forward(rest, Logits::Last, &mut logits)?;
            let mut loss = nll(&logits, scored[0]);
            if !inputs.is_empty() {
                session.forward(inputs, Logits::All, &mut logits)?;
                let targets = inputs[1..].iter().chain([last]);
                let rows = logits.chunks_exact(session.vocab()).zip(targets);
                loss += rows.map(|(row, &target)| nll(row, target)).sum::<f64>();
            }
            if loss.is_nan() {
                return Err(engine::Error::NotANumber.into());
            }
            losses.push(loss);
        }
        let by_byte: Vec<f64> = losses.iter().zip(&question.bytes).map(|(loss, n)| loss / *n as f64).collect();
        out.right += usize::from(least(&losses) == Some(question.answer));
        out.right_by_byte += usize::from(least(&by_byte) == Some(question.answer));
        progress(i + 1);
    }
    Ok(out)
}

/// The first of the smallest.
fn least(x: &[f64]) -> Option<usize> {
    (0..x.len()).reduce(|best, i| if x[i] < x[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_checked() {
        let path = Path::new("q.jsonl");
        let good = r#"{"question":"1 + 1 =","choices":[" 3"," 2"],"answer":1}"#;
        assert_eq!(read(path, &format!("{good}\n\n{good}\n")).unwrap().len(), 2);
        for (bad, part) in [
            (r#"{"question":"a"}"#, "q.jsonl, line 2: missing field `choices`"),
            (r#"{"question":"a","choices":["b"],"answer":0}"#, "line 2: 1 choices: expected 2 at least"),
            (r#"{"question":"a","choices":["b",""],"answer":0}"#, "line 2: a choice is empty"),
            (r#"{"question":"a","choices":["b","c"],"answer":2}"#, "line 2: answer is 2: expected 0 to 1"),
        ] {
            let message = read(path, &format!("{good}\n{bad}")).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
        assert!(read(path, "\n").unwrap_err().to_string().contains("has no questions"));
    }

    #[test]
    fn the_first_of_equal_choices_counts() {
        assert_eq!((least(&[2.0, 1.0, 1.0]), least(&[])), (Some(1), None));
    }
}
