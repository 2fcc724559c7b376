//! What is said when a command is interrupted (Ctrl-C) whose work can be continued.

use std::sync::Mutex;

use super::output;

/// What is said; nothing was promised yet if there is none.
static WORDS: Mutex<Option<String>> = Mutex::new(None);

/// From now on, an interruption says how this command is continued: as it was called, with `--resume`.
pub(super) fn can_resume() {
    let words = format!("\nstopped; what is done is kept. Continue with:\n  {}\n", resumed(std::env::args()));
    let first = WORDS.lock().is_ok_and(|mut now| now.replace(words).is_none());
    if first {
        // Without a handler an interruption stops the command all the same.
        let _ = ctrlc::set_handler(|| {
            if let Ok(Some(words)) = WORDS.lock().as_deref() {
                output::say(words);
            }
            // As a shell reports a command that SIGINT ended.
            std::process::exit(130);
        });
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
