//! All that commands write: files, standard output, and what is said beside it.
//!
//! A reader of standard output that goes away (`qp plan … | head -1`) is no error: what follows is not printed, and the
//! command does the rest of its work. Text from files of others is shown without bytes that steer a terminal.

use std::borrow::Cow;
use std::fmt::{Arguments, Display};
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Error;

/// True once nobody reads standard output any more.
static CLOSED: AtomicBool = AtomicBool::new(false);

/// Prints to standard output: `print!` that fails with an error and not with a panic.
///
/// # Errors
/// If it cannot be written.
pub(super) fn print(text: Arguments<'_>) -> Result<(), Error> {
    if closed() {
        return Ok(());
    }
    let text = text.to_string();
    let text = if std::io::stdout().is_terminal() { plain(&text) } else { Cow::from(text) };
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => {
            CLOSED.store(true, Ordering::Relaxed);
            Ok(())
        }
        other => other.map_err(|e| format!("cannot write to standard output: {e}").into()),
    }
}

/// True once nobody reads standard output any more.
pub(super) fn closed() -> bool {
    CLOSED.load(Ordering::Relaxed)
}

/// Says something that the user should know, on standard error.
pub(super) fn note(text: impl Display) {
    say(&format!("note: {text}\n"));
}

/// Prints to standard error. There is nobody to tell if that fails.
pub(super) fn say(text: &str) {
    let _ = std::io::stderr().write_all(plain(text).as_bytes());
}

/// `text` with control characters, which could steer a terminal, as `\u{1b}`; lines and tabs stay.
pub(super) fn plain(text: &str) -> Cow<'_, str> {
    let steers = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if !text.contains(steers) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if steers(c) { out.extend(c.escape_unicode()) } else { out.push(c) }
    }
    out.into()
}

/// Writes a file whole or not at all.
///
/// # Errors
/// If it cannot be written; the message names it.
pub(super) fn write(path: &Path, text: &str) -> Result<(), Error> {
    qp_codegen::output::write(path, text.as_bytes()).map_err(|e| failed(path, &e))
}

/// Whether [`write()`] is likely to succeed: to be asked before long work.
///
/// # Errors
/// If it would not.
pub(super) fn check(path: &Path) -> Result<(), Error> {
    qp_codegen::output::check(path).map_err(|e| failed(path, &e))
}

fn failed(path: &Path, e: &std::io::Error) -> Error {
    format!("cannot write {}: {e}", path.display()).into()
}

/// As `print!`, but a closed pipe is no error and others are errors of the command.
macro_rules! out {
    ($($text:tt)*) => { $crate::cli::output::print(format_args!($($text)*)) };
}

/// As [`out!`], with the end of a line.
macro_rules! outln {
    () => { $crate::cli::output::print(format_args!("\n")) };
    ($($text:tt)*) => { $crate::cli::output::print(format_args!("{}\n", format_args!($($text)*))) };
}

pub(super) use {out, outln};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown() {
        assert_eq!(plain("a\tb\n"), "a\tb\n");
        assert_eq!(plain("\u{1b}[2J\u{9b}é\r"), "\\u{1b}[2J\\u{9b}é\\u{d}");
    }
}
