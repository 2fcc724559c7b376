//! Text → tokens and comments. Never fails: what is no token becomes an error and is left out.

use super::diag::{Diagnostic, FileId, Span};
use super::number::Rational;

/// What a token is; its text is found by its span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// A name or keyword: letters, digits and `_`, and `.digits` after that (`tcq_2.5`).
    Name,
    /// A number.
    Number(Rational),
    /// A string in double quotes, on one line, without escapes.
    Str,
    /// `{`
    LBrace,
    /// `}`
    RBrace,
    /// `(`
    LParen,
    /// `)`
    RParen,
    /// `[`
    LBracket,
    /// `]`
    RBracket,
    /// `,`
    Comma,
    /// `.`
    Dot,
    /// `..`
    Range,
    /// `:`
    Colon,
    /// `=`
    Assign,
    /// `+`
    Plus,
    /// `-`
    Minus,
    /// `*`
    Star,
    /// `**`
    Power,
    /// `/`
    Slash,
    /// `%`
    Percent,
    /// `&`
    And,
    /// `|`
    Or,
    /// `^`
    Xor,
    /// `~`
    Not,
    /// `<<`
    Shl,
    /// `>>`
    Shr,
    /// `==`
    Eq,
    /// `!=`
    Ne,
    /// `<`
    Lt,
    /// `<=`
    Le,
    /// `>`
    Gt,
    /// `>=`
    Ge,
    /// The end of the text.
    End,
}

impl TokenKind {
    /// How the token is called in messages, if that is not its text.
    pub fn describe(self) -> Option<&'static str> {
        match self {
            TokenKind::Str => Some("a string"),
            TokenKind::End => Some("the end of the file"),
            TokenKind::Name
            | TokenKind::Number(_)
            | TokenKind::LBrace
            | TokenKind::RBrace
            | TokenKind::LParen
            | TokenKind::RParen
            | TokenKind::LBracket
            | TokenKind::RBracket
            | TokenKind::Comma
            | TokenKind::Dot
            | TokenKind::Range
            | TokenKind::Colon
            | TokenKind::Assign
            | TokenKind::Plus
            | TokenKind::Minus
            | TokenKind::Star
            | TokenKind::Power
            | TokenKind::Slash
            | TokenKind::Percent
            | TokenKind::And
            | TokenKind::Or
            | TokenKind::Xor
            | TokenKind::Not
            | TokenKind::Shl
            | TokenKind::Shr
            | TokenKind::Eq
            | TokenKind::Ne
            | TokenKind::Lt
            | TokenKind::Le
            | TokenKind::Gt
            | TokenKind::Ge => None,
        }
    }
}

/// Tokens of two characters, then of one.
const PUNCTUATION: [(&str, TokenKind); 30] = [
    ("**", TokenKind::Power),
    ("<<", TokenKind::Shl),
    (">>", TokenKind::Shr),
    ("==", TokenKind::Eq),
    ("!=", TokenKind::Ne),
    ("<=", TokenKind::Le),
    (">=", TokenKind::Ge),
    ("..", TokenKind::Range),
    ("{", TokenKind::LBrace),
    ("}", TokenKind::RBrace),
    ("(", TokenKind::LParen),
    (")", TokenKind::RParen),
    ("[", TokenKind::LBracket),
    ("]", TokenKind::RBracket),
    (",", TokenKind::Comma),
    (".", TokenKind::Dot),
    (":", TokenKind::Colon),
    ("=", TokenKind::Assign),
    ("+", TokenKind::Plus),
    ("-", TokenKind::Minus),
    ("*", TokenKind::Star),
    ("/", TokenKind::Slash),
    ("%", TokenKind::Percent),
    ("&", TokenKind::And),
    ("|", TokenKind::Or),
    ("^", TokenKind::Xor),
    ("~", TokenKind::Not),
    ("<", TokenKind::Lt),
    (">", TokenKind::Gt),
    ("×", TokenKind::Name),
];

/// Operators of other languages, what stands for them here, and why.
const FOREIGN: [(&str, TokenKind, &str, &str); 3] = [
    (">>>", TokenKind::Shr, ">>", "words have no sign, so that `>>` shifts zeros in"),
    ("&&", TokenKind::And, "&", "bits and words are joined by `&`"),
    ("||", TokenKind::Or, "|", "bits and words are joined by `|`"),
];

/// A token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// What it is.
    pub kind: TokenKind,
    /// Where it is.
    pub span: Span,
    /// True if no other token stands before it on its line.
    pub first_on_line: bool,
}

/// Tokens and comments of a text.
#[derive(Clone, Debug, Default)]
pub struct Lexed {
    /// Tokens in order; the last is [`TokenKind::End`].
    pub tokens: Vec<Token>,
    /// Comments in order, from `//` up to (without) the end of the line.
    pub comments: Vec<Span>,
}

/// What ends a line: as on Unix, on Windows (both), and on old Macs.
pub const LINE_ENDS: [char; 2] = ['\n', '\r'];
const BYTE_ORDER_MARK: char = '\u{feff}';

/// Splits `text` into tokens and comments, adding to `errors` what is neither.
pub fn lex(file: FileId, text: &str, errors: &mut Vec<Diagnostic>) -> Lexed {
    let mut out = Lexed::default();
    let span = |start: usize, end: usize| Span { file, start: start as u32, end: end as u32 };
    if u32::try_from(text.len()).is_err() {
        errors.push(Diagnostic::error(span(0, 0), "the file is larger than 4 GiB", ""));
        out.tokens.push(Token { kind: TokenKind::End, span: span(0, 0), first_on_line: true });
        return out;
    }
    // A mark that some editors put at the beginning of a text.
    let mut at = if text.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len_utf8() } else { 0 };
    let mut first_on_line = true;
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        if c.is_whitespace() {
            first_on_line |= LINE_ENDS.contains(&c);
            at += c.len_utf8();
            continue;
        }
        if rest.starts_with("//") {
            let len = rest.find(LINE_ENDS).unwrap_or(rest.len());
            out.comments.push(span(at, at + rest[..len].trim_end().len()));
            at += len;
            continue;
        }
        let (kind, len) = if c.is_ascii_alphabetic() || c == '_' {
            (Some(TokenKind::Name), name_len(rest))
        } else if let Some((digits, len)) = tight_block(rest) {
            let all = span(at, at + len);
            errors.push(bad_number(all, &rest[..len]));
            for (from, to, kind) in [
                (0, digits, number(&rest[..digits])),
                (digits, digits + 1, Some(TokenKind::Name)),
                (digits + 1, len, number(&rest[digits + 1..len])),
            ] {
                let kind = kind.unwrap_or(TokenKind::Number(1.into()));
                out.tokens.push(Token { kind, span: span(at + from, at + to), first_on_line });
                first_on_line = false;
            }
            (None, len)
        } else if let Some((value, len)) = exponent(rest) {
            let all = span(at, at + len);
            let text = &rest[..len];
            let d = Diagnostic::error(all, format!("`{text}` is not a number: there are no exponents"), "");
            errors.push(match value {
                Some(v) => d.replace(all, decimal(v)).hint(format!("write `{}`", decimal(v))),
                None => d.hint("write a power of ten: `3 * 10 ** -5`"),
            });
            (Some(TokenKind::Number(value.unwrap_or(1.into()))), len)
        } else if c.is_ascii_digit() {
            let len = number_len(rest);
            let kind = number(&rest[..len]);
            if kind.is_none() {
                errors.push(bad_number(span(at, at + len), &rest[..len]));
            }
            // A bad number still stands where a number should: one error is enough.
            (Some(kind.unwrap_or(TokenKind::Number(1.into()))), len)
        } else if c == '"' {
            let line = rest.find(LINE_ENDS).unwrap_or(rest.len());
            match rest[1..line].find('"') {
                Some(end) => (Some(TokenKind::Str), end + 2),
                None => {
                    let len = rest[..line].trim_end().len();
                    errors.push(
                        Diagnostic::error(span(at, at + len), "this string is not closed", "starts here")
                            .hint("end it with `\"` on the same line"),
                    );
                    (Some(TokenKind::Str), len)
                }
            }
        } else if let Some((wrong, kind, right, why)) = FOREIGN.iter().find(|f| rest.starts_with(f.0)) {
            let all = span(at, at + wrong.len());
            let d = Diagnostic::error(all, format!("there is no operator `{wrong}`"), "");
            errors.push(d.replace(all, *right).hint(format!("{why}: write `{right}`")));
            (Some(*kind), wrong.len())
        } else {
            match PUNCTUATION.iter().find(|(s, _)| rest.starts_with(s)) {
                Some((s, kind)) => (Some(*kind), s.len()),
                None => {
                    // As often as it is repeated.
                    let len = rest.find(|other| other != c).unwrap_or(rest.len());
                    let shown = c.escape_debug();
                    let e = Diagnostic::error(span(at, at + len), format!("`{shown}` has no meaning here"), "");
                    errors.push(match c {
                        ';' => e.replace(span(at, at + len), "").hint("a line needs no end mark: leave it out"),
                        '#' => e.replace(span(at, at + len), "//").hint("a comment begins with `//`"),
                        '!' => e.replace(span(at, at + len), "~").hint("the complement of a word is `~`"),
                        '\'' => e.hint("a string stands in double quotes"),
                        _ => e,
                    });
                    (None, len)
                }
            }
        };
        if let Some(kind) = kind {
            out.tokens.push(Token { kind, span: span(at, at + len), first_on_line });
            first_on_line = false;
        }
        at += len;
    }
    out.tokens.push(Token { kind: TokenKind::End, span: span(text.len(), text.len()), first_on_line: true });
    out
}

fn name_len(s: &str) -> usize {
    let b = s.as_bytes();
    let mut i = 0;
    while i < b.len() && (b[i].is_ascii_alphanumeric() || b[i] == b'_') {
        i += 1;
        // `tcq_2.5`: a point belongs to the name if a digit follows.
        if i + 1 < b.len() && b[i] == b'.' && b[i + 1].is_ascii_digit() {
            i += 1;
        }
    }
    i
}

fn number_len(s: &str) -> usize {
    name_len(s)
}

/// `2x128`: what was meant is clear, so that it is one error and not two. Digits before the `x`, length of all.
fn tight_block(s: &str) -> Option<(usize, usize)> {
    let len = number_len(s);
    let (rows, cols) = s[..len].split_once('x')?;
    let digits = |t: &str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
    (digits(rows) && digits(cols) && rows != "0").then_some((rows.len(), len))
}

/// `1e-3`: its value, if that is a sane one, and its length.
fn exponent(s: &str) -> Option<(Option<Rational>, usize)> {
    let digits = |t: &str| t.find(|c: char| !c.is_ascii_digit()).unwrap_or(t.len());
    let whole = digits(s);
    let fraction = s[whole..].strip_prefix('.').map_or(0, |t| 1 + digits(t));
    let mantissa = whole + fraction;
    let rest = s[mantissa..].strip_prefix(['e', 'E']).filter(|_| whole > 0 && fraction != 1)?;
    let sign = usize::from(rest.starts_with(['-', '+']));
    let power = digits(&rest[sign..]);
    let len = mantissa + 1 + sign + power;
    if power == 0 || s[len..].starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') {
        return None;
    }
    let exponent = rest[..sign + power].trim_start_matches('+').parse::<i128>().ok().filter(|e| e.abs() <= 18);
    let power = exponent.and_then(|e| Rational::from(10).pow(e));
    Some((Rational::parse_decimal(&s[..mantissa]).zip(power).and_then(|(m, p)| m.checked_mul(p)), len))
}

/// A number whose denominator divides a power of ten, as digits.
fn decimal(r: Rational) -> String {
    let (mut num, den) = r.parts();
    let mut places = 0;
    let mut of = 1;
    while of % den != 0 {
        of *= 10;
        places += 1;
    }
    num *= of / den;
    let digits = format!("{num:0>width$}", width = places + 1);
    let (whole, fraction) = digits.split_at(digits.len() - places);
    if places == 0 { whole.to_string() } else { format!("{whole}.{fraction}") }
}

fn number(s: &str) -> Option<TokenKind> {
    let radix = |digits: &str, radix| {
        let digits: String = digits.chars().filter(|c| *c != '_').collect();
        i64::from_str_radix(&digits, radix).ok().map(Rational::from)
    };
    let value = if let Some(hex) = s.strip_prefix("0x") {
        radix(hex, 16)
    } else if let Some(binary) = s.strip_prefix("0b") {
        radix(binary, 2)
    } else {
        Rational::parse_decimal(s)
    };
    value.map(TokenKind::Number)
}

fn bad_number(span: Span, text: &str) -> Diagnostic {
    let e = Diagnostic::error(span, format!("`{text}` is not a number"), "");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    if text.starts_with("0x") || text.starts_with("0b") || digits == text.len() {
        e.hint("numbers are written 12, 0.5, 0x9E37 or 0b1010, and fit 63 bits in hexadecimal and binary")
    } else if text[digits..].starts_with('x') {
        let apart = format!("{} x {}", &text[..digits], &text[digits + 1..]);
        e.replace(span, apart.clone()).hint(format!("put spaces around `x`: `{apart}`"))
    } else {
        e.hint("put a space between a number and what follows it")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(text: &str) -> (Vec<TokenKind>, usize, usize) {
        let mut errors = Vec::new();
        let lexed = lex(FileId(0), text, &mut errors);
        (lexed.tokens.iter().map(|t| t.kind).collect(), lexed.comments.len(), errors.len())
    }

    #[test]
    fn names_hold_points_and_numbers_end() {
        use TokenKind::*;
        let n = |x: i64| Number(x.into());
        assert_eq!(kinds("tcq_2.5=mix // c"), (vec![Name, Assign, Name, End], 1, 0));
        assert_eq!(kinds("2 ** 20*3"), (vec![n(2), Power, n(20), Star, n(3), End], 0, 0));
        assert_eq!(kinds("0x10 0b11 1_000"), (vec![n(16), n(3), n(1000), End], 0, 0));
        assert_eq!(kinds("h[22]>>1"), (vec![Name, LBracket, n(22), RBracket, Shr, n(1), End], 0, 0));
    }

    #[test]
    fn what_is_no_token_is_an_error_and_lexing_goes_on() {
        assert_eq!(kinds("2x128").2, 1);
        assert_eq!(kinds("a ; b").2, 1);
        assert_eq!(kinds("\"open\nnext"), (vec![TokenKind::Str, TokenKind::Name, TokenKind::End], 0, 1));
        assert_eq!(kinds("0xFFFFFFFFFFFFFFFFF").2, 1);
        assert_eq!(kinds("1.2.3").2, 1);
        assert_eq!(kinds(&"\0".repeat(16_000)).2, 1);
    }

    #[test]
    fn what_other_languages_write_is_one_error_with_its_meaning() {
        use TokenKind::*;
        for (text, value, cure) in [
            ("1e-3", Rational::new(1, 1000), Some("0.001")),
            ("2.50E+2", Rational::new(250, 1), Some("250")),
            ("12e0", Rational::new(12, 1), Some("12")),
            ("1e99", Rational::new(1, 1), None),
        ] {
            let mut errors = Vec::new();
            let lexed = lex(FileId(0), text, &mut errors);
            assert_eq!((errors.len(), lexed.tokens.len(), lexed.tokens[0].kind), (1, 2, Number(value.unwrap())));
            assert_eq!(errors[0].replace.as_ref().map(|r| r.1.as_str()), cure, "{text}");
        }
        // These are other mistakes, or none.
        assert_eq!(kinds("0x1e - 3").2, 0);
        assert_eq!((kinds("1e").2, kinds("1e-3x").2), (1, 2));
        assert_eq!(kinds("a >>> b && c || d"), (vec![Name, Shr, Name, And, Name, Or, Name, End], 0, 3));
    }

    #[test]
    fn lines_end_as_on_every_system_and_a_mark_is_skipped() {
        use TokenKind::*;
        for text in ["a // b\nc", "a // b\r\nc", "a // b\rc", "\u{feff}a // b\nc"] {
            let lexed = lex(FileId(0), text, &mut Vec::new());
            let firsts: Vec<_> = lexed.tokens.iter().map(|t| (t.kind, t.first_on_line)).collect();
            assert_eq!(firsts, [(Name, true), (Name, true), (End, true)], "{text:?}");
        }
    }
}
