//! Element types of tensors: plain ones, and blocks that are formats of `specs/formats`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use qp_codegen::formats;
use qp_codegen::reader::{Book, Reader};
use qp_codegen::spec::Shape;
use safetensors::Dtype;

use crate::model::tensors::Kind;

/// Name of the layouts of this container.
pub const LAYOUT: &str = "gguf";

/// Numbers and names of element types that cannot be used, for messages.
const UNUSED: [(u32, &str); 10] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (36, "IQ4_NL_4_4"),
];

/// Why a tensor cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// Its element type is not supported: what it is called, and what is supported.
    Type(String, String),
    /// Its rows are not whole blocks.
    Rows,
}

/// Types by number. Entries of a format are written out once for the whole program.
fn book(code: u32) -> Option<Arc<Book>> {
    static BOOKS: Mutex<BTreeMap<u32, Arc<Book>>> = Mutex::new(BTreeMap::new());
    let mut books = BOOKS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(book) = books.get(&code) {
        return Some(book.clone());
    }
    let book = Arc::new(Book::new(formats::of_type(LAYOUT, code)?.clone()));
    books.insert(code, book.clone());
    Some(book)
}

/// The element types of a file, by number and shape.
#[derive(Debug, Default)]
pub struct Types {
    readers: BTreeMap<(u32, u32, u32), Arc<Reader>>,
}

impl Types {
    /// The element type number `code` of a tensor of `shape`, outermost first.
    ///
    /// # Errors
    /// A type that is not supported, or rows that are not whole blocks.
    pub fn kind(&mut self, code: u32, shape: &[usize]) -> Result<Kind, Unreadable> {
        match code {
            0 => return Ok(Kind::Plain(Dtype::F32)),
            1 => return Ok(Kind::Plain(Dtype::F16)),
            30 => return Ok(Kind::Plain(Dtype::BF16)),
            _ => (),
        }
        let book = book(code).ok_or_else(|| unsupported(code))?;
        let shape = matrix(shape).ok_or(Unreadable::Rows)?;
        let key = (code, shape.rows, shape.cols);
        if let Some(reader) = self.readers.get(&key) {
            return Ok(Kind::Format(reader.clone()));
        }
        let layout = book.format.layout(LAYOUT).ok_or_else(|| unsupported(code))?;
        let reader = Arc::new(Reader::new(&book, layout, shape).map_err(|_| Unreadable::Rows)?);
        self.readers.insert(key, reader.clone());
        Ok(Kind::Format(reader))
    }
}

fn unsupported(code: u32) -> Unreadable {
    let found = match UNUSED.iter().find(|(c, _)| *c == code) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("elements of type number {code}"),
    };
    let named = |name: &&str| formats::get(name).is_some_and(|f| f.layout(LAYOUT).is_some());
    let known = formats::names().into_iter().filter(named).map(|n| n.trim_end_matches("_gguf").to_uppercase());
    let plain = ["F32", "F16", "BF16"].map(str::to_owned);
    Unreadable::Type(found, plain.into_iter().chain(known).collect::<Vec<_>>().join(", "))
}

/// A tensor's shape as rows × columns; nothing if it is too large.
fn matrix(shape: &[usize]) -> Option<Shape> {
    let (cols, outer) = shape.split_last()?;
    let rows = outer.iter().try_fold(1usize, |a, &n| a.checked_mul(n))?;
    Some(Shape { rows: u32::try_from(rows).ok()?, cols: u32::try_from(*cols).ok()? })
}
