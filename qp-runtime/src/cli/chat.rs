//! `qp chat`: a conversation in the terminal.

use std::io::{BufRead, IsTerminal};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::device::{Device, context_within, open_model, open_session};
use super::drafts::{self, Drafting};
use super::generate::Drawing;
use super::interrupt::Noted;
use super::{Error, output};
use crate::chat::{Chat, Conversation, StopTexts};
use crate::engine::{self, Generated, Room, Sampler, Session, Stop};
use crate::model::{Files, Tokenizer};

/// Talk to a model in the terminal.
///
/// Ctrl-C ends an answer; between answers it ends the program. What is typed goes to the model, but for commands: /help
/// lists them. A line that ends with a backslash goes on in the next.
#[derive(Debug, clap::Args)]
pub struct ChatCommand {
    /// Model: a directory in Hugging Face's layout, quantized by `qp quantize` or not, or a GGUF file.
    model: PathBuf,
    /// What the model is told before the conversation.
    #[arg(long, short, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of an answer at most; as many as the context holds without it.
    #[arg(long = "tokens", short = 'n', value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    count: Option<u32>,
    /// Tokens that are kept in mind; the oldest exchanges are forgotten beyond. By default the model's, 8192 at most.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    #[command(flatten)]
    drawing: Drawing,
    #[command(flatten)]
    drafting: Drafting,
    /// Where to run.
    #[arg(long, value_enum, default_value = "auto")]
    device: Device,
}

const HELP: &str = "\
/reset         begin a new conversation
/system TEXT   tell the model something before the conversation, and begin a new one; without TEXT, nothing
/again         answer the last question again
/save FILE     write the conversation as JSON to a new file; /save! FILE replaces one
/quit          end (as does the end of the input)
";

impl ChatCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the model cannot be opened, its template fails or it cannot be computed.
    pub fn run(self) -> Result<(), Error> {
        let (model, on) = open_model(&self.model, self.device)?;
        self.drawing.say_suggested(&model.config.suggested);
        let chat = Chat::open(&Files::open(&self.model)?, &model.tokenizer, &model.config.eos)?;
        if chat.is_plain() {
            output::note("the model has no chat template: it is given a plain dialogue of 'User:' and 'Assistant:'");
        }
        let tokenizer = model.tokenizer.clone();
        let most = model.config.max_positions;
        let context = self.context.map_or(Ok(most.min(8192)), |c| context_within(c, most))?;
        let drafting = self.drafting.open(&tokenizer)?;
        let mut session = open_session(model, on.as_ref(), context)?;
        session.set_drafts(drafting.drafts(on.as_ref(), session.vocab(), Room::one(session.context()))?);
        let mut talk = Talk {
            chat,
            tokenizer,
            session,
            count: self.count.map(|c| c as usize),
            drawing: self.drawing,
            conversation: Conversation::new(self.system),
            answers: 0,
        };
        let terminal = std::io::stdin().is_terminal();
        if terminal {
            output::say("/help lists the commands.\n");
        }
        while let Some(line) = read(terminal)? {
            if talk.take(&line)?.is_break() {
                break;
            }
            if output::closed() {
                break;
            }
        }
        Ok(())
    }
}

/// A question or command; `None` at the end of the input.
fn read(terminal: bool) -> Result<Option<String>, Error> {
    let mut all = String::new();
    loop {
        if terminal {
            output::say(if all.is_empty() { "\n> " } else { ". " });
        }
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line).map_err(|e| format!("cannot read the input: {e}"))? == 0 {
            return Ok(Some(all).filter(|a| !a.is_empty()));
        }
        let line = line.trim_end_matches(['\n', '\r']);
        match line.strip_suffix('\\') {
            Some(part) => {
                all.push_str(part);
                all.push('\n');
            }
            None => {
                all.push_str(line);
                return Ok(Some(all));
            }
        }
    }
}

/// A conversation and what it needs.
struct Talk {
    chat: Chat,
    tokenizer: Tokenizer,
    session: Session,
    count: Option<usize>,
    drawing: Drawing,
    conversation: Conversation,
    /// Answers so far: each draws by a seed of its own.
    answers: u64,
}

impl Talk {
    /// Does what a line says.
    fn take(&mut self, line: &str) -> Result<ControlFlow<()>, Error> {
        let text = line.trim();
        let (command, argument) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let argument = argument.trim();
        match command {
            "" => (),
            "/help" | "/?" => output::say(HELP),
            "/quit" | "/exit" => return Ok(ControlFlow::Break(())),
            "/reset" => {
                self.conversation.reset();
                output::say("A new conversation.\n");
            }
            "/system" => {
                self.conversation = Conversation::new(Some(argument.to_owned()).filter(|a| !a.is_empty()));
                output::say("A new conversation.\n");
            }
            "/again" => match self.conversation.reopen() {
                true => self.answer()?,
                false => output::say("There is no answer yet.\n"),
            },
            "/save" | "/save!" if argument.is_empty() => output::say("/save needs the name of a file.\n"),
            "/save" if Path::new(argument).exists() => {
                output::say(&format!("There is a file {argument} already; /save! {argument} replaces it.\n"));
            }
            "/save" | "/save!" => match self.save(Path::new(argument)) {
                Ok(()) => output::say(&format!("Written to {argument}.\n")),
                Err(e) => output::say(&format!("error: {e}\n")),
            },
            _ if command.starts_with('/') && !command[1..].contains('/') => {
                output::say(&format!("There is no command {command}; /help lists them.\n"));
            }
            _ => {
                self.conversation.ask(text);
                self.answer()?;
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn save(&self, path: &Path) -> Result<(), Error> {
        output::write(path, &(serde_json::to_string_pretty(&self.conversation.messages())? + "\n"))
    }

    /// Answers the last question, which is taken back if that cannot be.
    fn answer(&mut self) -> Result<(), Error> {
        // At least a sixteenth of the context is for the answer, unless fewer tokens are wanted.
        let context = self.session.context();
        let room = self.count.unwrap_or(usize::MAX).min(context / 16).max(1);
        let prompt = match self.conversation.prompt(&self.chat, &self.tokenizer, context + 1 - room) {
            Ok(Some(prompt)) => prompt,
            Ok(None) => {
                self.conversation.take_back();
                output::say(&format!("That is too long for the context of {context} tokens.\n"));
                return Ok(());
            }
            Err(e) => {
                self.conversation.take_back();
                output::say(&format!("error: {e}\n"));
                return Ok(());
            }
        };
        if prompt.dropped > 0 {
            output::note(format_args!("the oldest {} messages were forgotten: the context is full", prompt.dropped));
        }
        let count = self.count.unwrap_or(usize::MAX).min(context + 1 - prompt.tokens.len());
        let mut sampler = self.drawing.sampler_of(self.answers);
        self.answers += 1;
        let interruption = Noted::begin();
        let Talk { session, tokenizer, chat, .. } = self;
        let (text, done) =
            say_answer(session, tokenizer, chat, &prompt.tokens, count, &mut sampler, || interruption.asked())?;
        let stopped = interruption.asked();
        drop(interruption);
        self.conversation.answer(&text);
        let why = match done.stop {
            _ if stopped => " (stopped)",
            Stop::Count => " (as long as it may be)",
            Stop::End | Stop::Caller => "",
        };
        output::say(&format!(
            "[{} tokens read in {:.2} s, {} written at {:.1} tokens/s{why}{}]\n",
            prompt.tokens.len(),
            done.prefill.as_secs_f64(),
            done.tokens.len(),
            done.rate(),
            drafts::said(&done).map_or(String::new(), |said| format!("; {said}")),
        ));
        Ok(())
    }
}

/// Prints the answer to `prompt` as it comes, without its end marks; its text, and how it came about.
///
/// # Errors
/// If it cannot be computed or printed.
pub(super) fn say_answer(
    session: &mut Session,
    tokenizer: &Tokenizer,
    chat: &Chat,
    prompt: &[u32],
    count: usize,
    sampler: &mut Sampler,
    stop: impl Fn() -> bool,
) -> Result<(String, Generated), Error> {
    let mut stream = tokenizer.stream(prompt);
    let mut texts = StopTexts::new(chat.stop.clone());
    let mut all = String::new();
    let mut show = |text: String| {
        // Many templates leave a blank or an empty line before the answer.
        let text = if all.is_empty() { text.trim_start().to_owned() } else { text };
        output::print(format_args!("{text}"))?;
        all.push_str(&text);
        Ok::<_, Error>(())
    };
    let done = engine::generate(session, prompt, count, &chat.end, sampler, |token| {
        let (text, found) = texts.push(&stream.push(token)?);
        show(text)?;
        let end = found || stop() || output::closed();
        Ok::<_, Error>(if end { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    let (rest, found) = texts.push(&stream.finish()?);
    show(rest)?;
    if !found && done.stop != Stop::Caller {
        show(texts.rest())?;
    }
    output::print(format_args!("\n"))?;
    Ok((all.trim_end().to_owned(), done))
}
