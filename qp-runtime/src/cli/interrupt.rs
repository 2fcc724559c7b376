//! What an interruption (Ctrl-C) does: it ends the command, which may say first how its work is continued, or it only ends
//! the answer that is being written.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};

use super::output;

/// What the next interruption does.
static ACTION: Mutex<Action> = Mutex::new(Action::End);

enum Action {
    /// Ends the command.
    End,
    /// Says this and ends the command.
    Say(String),
    /// Sets this and lets the command go on; where it is set already, ends the command.
    Ask(Arc<AtomicBool>),
}

/// Replaces what an interruption does.
fn set(action: Action) {
    static HANDLER: Once = Once::new();
    *ACTION.lock().unwrap_or_else(PoisonError::into_inner) = action;
    // Without a handler an interruption ends the command all the same.
    HANDLER.call_once(|| {
        let _ = ctrlc::set_handler(interrupted);
    });
}

fn interrupted() {
    match &*ACTION.lock().unwrap_or_else(PoisonError::into_inner) {
        Action::Ask(asked) if !asked.swap(true, Ordering::Relaxed) => return,
        Action::Say(words) => output::say(words),
        Action::Ask(_) | Action::End => output::say("\n"),
    }
    // As a shell reports a command that SIGINT ended.
    std::process::exit(130);
}

/// From now on, an interruption says how this command is continued: as it was called, with `--resume`.
pub(super) fn can_resume() {
    set(Action::Say(format!("\nstopped; what is done is kept. Continue with:\n  {}\n", resumed(std::env::args()))));
}

/// While this lives, an interruption is noted here; only a second one ends the command.
pub(super) struct Noted(Arc<AtomicBool>);

impl Noted {
    /// Begins to note interruptions.
    pub(super) fn begin() -> Noted {
        let asked = Arc::new(AtomicBool::new(false));
        set(Action::Ask(asked.clone()));
        Noted(asked)
    }

    /// True once there was an interruption.
    pub(super) fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        set(Action::End);
    }
}

/// A command line for a shell that continues what `args` began.
fn resumed(args: impl Iterator<Item = String>) -> String {
    let mut words: Vec<String> = args.map(|a| quoted(&a)).collect();
    if !words.iter().any(|w| w == "--resume") {
        words.push("--resume".to_owned());
    }
    words.join(" ")
}

/// A word as a shell reads it back.
pub(super) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines() {
        let line = |args: &[&str]| resumed(args.iter().map(|a| (*a).to_owned()));
        assert_eq!(line(&["qp", "quantize", "a model", "-o", "it's"]), r"qp quantize 'a model' -o 'it'\''s' --resume");
        assert_eq!(line(&["qp", "--resume", ""]), "qp --resume ''");
    }
}
