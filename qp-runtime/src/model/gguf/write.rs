//! The header of a GGUF file that is written.

/// Where the data of each tensor begin: at a multiple of so many bytes, which is the format's default.
pub const ALIGNMENT: u64 = 32;
/// The version that is written.
const VERSION: u32 = 3;

/// A value of the header.
#[derive(Clone, Debug, PartialEq)]
pub enum Put {
    /// A whole number.
    U32(u32),
    /// A number.
    F32(f32),
    /// True or false.
    Bool(bool),
    /// A text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// Several whole numbers.
    I32s(Vec<i32>),
    /// Several numbers.
    F32s(Vec<f32>),
}

/// Keys with their values, in the order of the file.
pub type Values = Vec<(String, Put)>;

/// A tensor that is to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// Its shape, outermost first.
    pub shape: Vec<usize>,
    /// Number of its element type.
    pub code: u32,
    /// Its bytes.
    pub bytes: u64,
}

/// The bytes before the data, and for each tensor where its bytes begin in the file.
pub fn header(values: &Values, tensors: &[Planned]) -> (Vec<u8>, Vec<u64>) {
    let mut out = b"GGUF".to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((values.len() as u64).to_le_bytes());
    for (key, value) in values {
        text(&mut out, key);
        put(&mut out, value);
    }
    let mut offsets = Vec::new();
    let mut offset = 0u64;
    for tensor in tensors {
        text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|side| out.extend((*side as u64).to_le_bytes()));
        out.extend(tensor.code.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offsets.push(offset);
        offset += tensor.bytes.next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    let data = out.len() as u64;
    (out, offsets.into_iter().map(|o| data + o).collect())
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put(out: &mut Vec<u8>, value: &Put) {
    fn scalar(out: &mut Vec<u8>, ty: u32, bytes: &[u8]) {
        out.extend(ty.to_le_bytes());
        out.extend(bytes);
    }
    fn list(out: &mut Vec<u8>, ty: u32, len: usize) {
        scalar(out, 9, &ty.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    }
    match value {
        Put::U32(n) => scalar(out, 4, &n.to_le_bytes()),
        Put::F32(n) => scalar(out, 6, &n.to_le_bytes()),
        Put::Bool(b) => scalar(out, 7, &[u8::from(*b)]),
        Put::Text(t) => {
            scalar(out, 8, &[]);
            text(out, t);
        }
        Put::Texts(texts) => {
            list(out, 8, texts.len());
            texts.iter().for_each(|t| text(out, t));
        }
        Put::I32s(numbers) => {
            list(out, 5, numbers.len());
            numbers.iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
        Put::F32s(numbers) => {
            list(out, 6, numbers.len());
            numbers.iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
    }
}
