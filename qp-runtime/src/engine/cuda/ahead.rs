//! Steps that are launched before anybody asks for them: while the host looks at a token, the device computes the next one.
//!
//! When sequences go on with the tokens that were likeliest, one each, the next step's input is on the device already, and its
//! positions follow. So it is launched before the present step's tokens are read. If something else is
//! asked for, what was computed ahead is forgotten: the keys and values that it wrote lie behind the sequences' ends.

use super::{CudaEngine, How, MOST_ROWS};
use crate::device::{DeviceError, Executor, Mail};
use crate::engine::{Choice, Chunk, Error, Logits, PAGE, Wish};

/// The tokens that were chosen last, and what was launched to follow them.
pub struct Ahead {
    /// Tokens and rows of faults on their way, of the present step and the next in turn.
    mails: [Mail<i32>; 2],
    /// The mail that is sent next.
    next: usize,
    /// What each sequence was given last: a token, and the position where that belongs.
    last: Vec<(u32, usize)>,
    /// How the next tokens are chosen if all goes on as before; empty if the likeliest are.
    choices: Vec<Choice>,
    /// The step that was launched ahead.
    launched: Option<Launched>,
}

/// A step whose tokens are the last ones.
struct Launched {
    pages: Vec<Vec<u32>>,
    mail: usize,
}

impl Ahead {
    /// Nothing is launched yet. `nodes` is the number of the program's nodes.
    pub fn new(on: &Executor, nodes: usize) -> Result<Self, DeviceError> {
        let mail = || on.mail(MOST_ROWS as usize + nodes);
        Ok(Ahead { mails: [mail()?, mail()?], next: 0, last: Vec::new(), choices: Vec::new(), launched: None })
    }

    /// True if `chunks` go on with the tokens that were chosen last.
    fn go_on(&self, chunks: &[Chunk<'_>], choices: &[Choice]) -> bool {
        chunks.len() == self.last.len()
            && choices == self.choices
            && chunks.iter().zip(&self.last).all(|(c, last)| (c.tokens[0], c.position) == *last)
    }
}

/// True of a step of single tokens, each of which wants the next.
pub fn is_decoding(chunks: &[Chunk<'_>]) -> bool {
    (1..=MOST_ROWS as usize).contains(&chunks.len())
        && chunks.iter().all(|c| c.tokens.len() == 1 && c.logits == Logits::Last)
}

impl CudaEngine {
    /// Forgets what was launched ahead, before something else is launched.
    pub(super) fn forget(&mut self) -> Result<(), DeviceError> {
        self.ahead.last.clear();
        if self.ahead.launched.take().is_some() {
            self.clear_faults()?;
        }
        Ok(())
    }

    /// The next tokens of a step for which [`is_decoding`] is true, of rows that are all given a token.
    pub(super) fn decode(&mut self, chunks: &[Chunk<'_>], how: How<'_>, out: &mut Vec<u32>) -> Result<(), Error> {
        let wishes = if let How::Drawn(wishes) = how { wishes } else { &[] };
        let choices: Vec<Choice> =
            wishes.iter().filter_map(|w| if let Wish::Token(choice, _) = w { Some(*choice) } else { None }).collect();
        let goes_on = self.ahead.go_on(chunks, &choices);
        let later: Vec<Choice> = choices.iter().map(|c| Choice { draw: c.draw.wrapping_add(1), ..*c }).collect();
        let launched = self.ahead.launched.take();
        let is_this = |launched: &Launched| {
            goes_on && chunks.iter().zip(&launched.pages).all(|(c, pages)| c.pages.starts_with(pages))
        };
        let mail = match &launched {
            Some(launched) if is_this(launched) => launched.mail,
            _ => {
                if launched.is_some() {
                    self.clear_faults()?;
                }
                self.run(chunks, how, false)?;
                self.send(chunks.len())?
            }
        };
        let next: Vec<Chunk<'_>> = chunks.iter().map(|c| Chunk { position: c.position + 1, ..*c }).collect();
        let fits = |c: &Chunk<'_>| c.position < self.room.context && c.position < c.pages.len() * PAGE;
        if goes_on && next.iter().all(fits) {
            let wishes: Vec<Wish<'_>> = later.iter().map(|c| Wish::Token(*c, &[])).collect();
            let how = if wishes.is_empty() { How::Best } else { How::Drawn(&wishes) };
            self.run(&next, how, true)?;
            let pages = next.iter().map(|c| c.pages[..=c.position / PAGE].to_vec()).collect();
            self.ahead.launched = Some(Launched { pages, mail: self.send(chunks.len())? });
        }
        let got = self.ahead.mails[mail].open()?;
        let (best, faults) = got.split_at(MOST_ROWS as usize);
        let best: Option<Vec<u32>> = best[..chunks.len()].iter().map(|t| u32::try_from(*t).ok()).collect();
        let failed = self.fault_of(faults).or(if best.is_none() { Some(Error::NotANumber) } else { None });
        let (Some(best), None) = (best, &failed) else {
            self.forget()?;
            self.clear_faults()?;
            return Err(failed.unwrap_or(Error::NotANumber));
        };
        self.ahead.choices = later;
        self.ahead.last = best.iter().zip(chunks).map(|(t, c)| (*t, c.position + 1)).collect();
        out.extend(best);
        Ok(())
    }

    /// Sends the likeliest tokens of `rows` sequences, and faults, to the host. Gives the mail's number.
    fn send(&mut self, rows: usize) -> Result<usize, DeviceError> {
        let Ahead { mails, next, .. } = &mut self.ahead;
        let (at, faults) = (*next, &self.state.faults);
        *next = 1 - at;
        mails[at].add(0, &self.state.tokens, rows)?;
        mails[at].add(MOST_ROWS as usize, faults, faults.len())?;
        mails[at].send()?;
        Ok(at)
    }
}
