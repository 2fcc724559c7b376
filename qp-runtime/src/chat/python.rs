//! Values as Python prints them: `json.dumps`, `repr` and `str`, which chat templates are written for.

use std::fmt::Write;

use serde_json::Value;

/// How [`dumps`] writes.
#[derive(Clone, Debug, Default)]
pub struct Dumps {
    /// Write characters beyond ASCII as escapes.
    pub ascii: bool,
    /// Blanks of each level of indentation; everything on one line without it.
    pub indent: Option<usize>,
    /// What stands between items and after keys; Python's own choice without it.
    pub separators: Option<(String, String)>,
    /// Keys in alphabetical order.
    pub sorted: bool,
}

/// `value` as Python's `json.dumps` writes it.
pub fn dumps(value: &Value, how: &Dumps) -> String {
    let default = if how.indent.is_some() { "," } else { ", " };
    let (item, key) = how.separators.clone().unwrap_or_else(|| (default.to_owned(), ": ".to_owned()));
    let mut out = String::new();
    dump(value, how, (&item, &key), 0, &mut out);
    out
}

fn dump(value: &Value, how: &Dumps, separators: (&str, &str), depth: usize, out: &mut String) {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = how.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) => out.push_str(&number(n)),
        Value::String(s) => quote(s, how.ascii, out),
        Value::Array(items) if items.is_empty() => out.push_str("[]"),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(separators.0);
                }
                line(out, depth + 1);
                dump(item, how, separators, depth + 1, out);
            }
            line(out, depth);
            out.push(']');
        }
        Value::Object(fields) if fields.is_empty() => out.push_str("{}"),
        Value::Object(fields) => {
            let mut fields: Vec<(&String, &Value)> = fields.iter().collect();
            if how.sorted {
                fields.sort_by_key(|(key, _)| *key);
            }
            out.push('{');
            for (i, (key, value)) in fields.into_iter().enumerate() {
                if i > 0 {
                    out.push_str(separators.0);
                }
                line(out, depth + 1);
                quote(key, how.ascii, out);
                out.push_str(separators.1);
                dump(value, how, separators, depth + 1, out);
            }
            line(out, depth);
            out.push('}');
        }
    }
}

fn quote(text: &str, ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ascii && c > '~') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a string does not fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// A number as Python writes it: a float always has a point or an exponent.
fn number(n: &serde_json::Number) -> String {
    match n.as_f64() {
        Some(v) if n.is_f64() => float(v),
        _ => n.to_string(),
    }
}

/// `repr` of a float: the shortest digits that give it back, with an exponent below 1e-4 and from 1e16.
pub fn float(v: f64) -> String {
    if v.is_nan() {
        return "nan".to_owned();
    }
    if v.is_infinite() {
        return if v > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let magnitude = v.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{v:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(e) => ('-', e),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = v.to_string();
    if text.contains('.') { text } else { format!("{text}.0") }
}

/// `str(value)`: a text as it is, everything else by [`repr`].
pub fn text(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        other => repr(other),
    }
}

/// `repr(value)`.
pub fn repr(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(b) => if *b { "True" } else { "False" }.to_owned(),
        Value::Number(n) => number(n),
        Value::String(s) => {
            let mark = if s.contains('\'') && !s.contains('"') { '"' } else { '\'' };
            let mut out = String::from(mark);
            for c in s.chars() {
                match c {
                    '\\' => out.push_str("\\\\"),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    c if c == mark => {
                        out.push('\\');
                        out.push(c);
                    }
                    c if c.is_control() => {
                        let _ = write!(out, "\\x{:02x}", c as u32);
                    }
                    c => out.push(c),
                }
            }
            out.push(mark);
            out
        }
        Value::Array(items) => format!("[{}]", items.iter().map(repr).collect::<Vec<_>>().join(", ")),
        Value::Object(fields) => {
            let one =
                |(key, value): (&String, &Value)| format!("{}: {}", repr(&Value::String(key.clone())), repr(value));
            format!("{{{}}}", fields.iter().map(one).collect::<Vec<_>>().join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn dumps_as_python_does() {
        let value = json!({"b": [1, 2.0, 1e-5, 1e16, true, null], "a": "ä\"\n\u{1}", "e": {}, "l": []});
        // What Python 3.11 printed for the same value.
        assert_eq!(
            dumps(&value, &Dumps::default()),
            "{\"b\": [1, 2.0, 1e-05, 1e+16, true, null], \"a\": \"ä\\\"\\n\\u0001\", \"e\": {}, \"l\": []}"
        );
        let how = Dumps { ascii: true, indent: Some(2), sorted: true, separators: None };
        assert_eq!(
            dumps(&json!({"b": [1], "a": "ä😀"}), &how),
            "{\n  \"a\": \"\\u00e4\\ud83d\\ude00\",\n  \"b\": [\n    1\n  ]\n}"
        );
        let how = Dumps { separators: Some((",".to_owned(), ":".to_owned())), ..Dumps::default() };
        assert_eq!(dumps(&json!({"b": [1, 2], "a": 3}), &how), "{\"b\":[1,2],\"a\":3}");
    }

    #[test]
    fn floats_and_texts() {
        let cases = [
            (0.1, "0.1"),
            (100.0, "100.0"),
            (-0.0, "-0.0"),
            (1e-4, "0.0001"),
            (1.5e-7, "1.5e-07"),
            (1e15, "1000000000000000.0"),
            (1e300, "1e+300"),
        ];
        for (v, expected) in cases {
            assert_eq!(float(v), expected);
        }
        assert_eq!(repr(&json!({"a": [true, null, "it's", "a\n"]})), "{'a': [True, None, \"it's\", 'a\\n']}");
        assert_eq!((text(&json!("x")), text(&json!(true))), ("x".to_owned(), "True".to_owned()));
    }
}
