//! Where each tensor will lie: the weight files' sizes follow from plan and shapes alone, so they are laid out
//! before the first layer is coded, and layers are written into their places in any order.

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

/// Tensor data begins at a multiple of this many bytes of the file.
const ALIGN: usize = 64;

/// Largest weight file, in bytes, unless one item alone is larger.
pub const SHARD_BYTES: u64 = 4 << 30;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, in elements.
    pub shape: Vec<usize>,
}

impl Planned {
    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.bitsize() as u64 / 8
    }
}

/// A weight file to be written.
#[derive(Clone, Debug)]
pub struct Shard {
    /// File name.
    pub file: String,
    /// Length and text of the header, up to the first tensor.
    pub header: Vec<u8>,
    /// Its tensors with their place in the file, in bytes; by place.
    pub tensors: Vec<(Planned, u64)>,
    /// Size of the file.
    pub bytes: u64,
}

/// Distributes `items` (tensors that are written together) over weight files of at most `limit` bytes.
pub fn layout(items: &[Vec<Planned>], limit: u64) -> Vec<Shard> {
    let mut shards: Vec<Vec<Planned>> = vec![Vec::new()];
    let mut filled = 0;
    for item in items {
        let bytes: u64 = item.iter().map(Planned::bytes).sum();
        if filled > 0 && filled + bytes > limit {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        shards.last_mut().expect("never empty").extend(item.iter().cloned());
    }
    shards.into_iter().enumerate().map(|(i, tensors)| shard(i, tensors)).collect()
}

fn shard(index: usize, mut tensors: Vec<Planned>) -> Shard {
    // Wide elements first: then each tensor is aligned to its element, with no gaps (the format allows none).
    tensors.sort_by_key(|t| std::cmp::Reverse(t.dtype.bitsize()));
    let mut at = 0;
    let mut placed = Vec::new();
    let mut infos = Vec::new();
    for t in tensors {
        let end = at + t.bytes();
        let info = TensorInfo { dtype: t.dtype, shape: t.shape.clone(), data_offsets: (at as usize, end as usize) };
        infos.push((t.name.clone(), info));
        placed.push((t, at));
        at = end;
    }
    let metadata = Metadata::new(None, infos).expect("offsets are contiguous");
    let mut text = serde_json::to_vec(&metadata).expect("strings and numbers");
    text.resize((8 + text.len()).next_multiple_of(ALIGN) - 8, b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    let start = header.len() as u64;
    placed.iter_mut().for_each(|(_, at)| *at += start);
    Shard { file: format!("weights-{:05}.safetensors", index + 1), header, tensors: placed, bytes: start + at }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(name: &str, dtype: Dtype, shape: &[usize]) -> Planned {
        Planned { name: name.to_owned(), dtype, shape: shape.to_vec() }
    }

    #[test]
    fn tensors_are_aligned_and_readable() {
        let item = |n: &str| {
            vec![planned(&format!("{n}.scales"), Dtype::BF16, &[3]), planned(&format!("{n}.packed"), Dtype::U32, &[7])]
        };
        let shards = layout(&[item("a"), item("b"), vec![planned("c", Dtype::F32, &[2, 2])]], 1 << 20);
        assert_eq!(shards.len(), 1);
        let shard = &shards[0];
        let mut file = shard.header.clone();
        file.resize(shard.bytes as usize, 0);
        let read = safetensors::SafeTensors::deserialize(&file).unwrap();
        for (t, at) in &shard.tensors {
            let view = read.tensor(&t.name).unwrap();
            assert_eq!((view.dtype(), view.shape()), (t.dtype, t.shape.as_slice()));
            assert_eq!(view.data().as_ptr() as usize - file.as_ptr() as usize, *at as usize, "{}", t.name);
            assert_eq!(*at as usize % (t.dtype.bitsize() / 8), 0, "{}", t.name);
        }
    }

    #[test]
    fn an_item_stays_in_one_file() {
        let item = |n: &str, len| vec![planned(n, Dtype::U32, &[len]), planned(&format!("{n}.s"), Dtype::BF16, &[2])];
        let shards = layout(&[item("a", 10), item("b", 10), item("c", 1000), item("d", 1)], 100);
        let names: Vec<Vec<&str>> =
            shards.iter().map(|s| s.tensors.iter().map(|t| t.0.name.as_str()).collect()).collect();
        assert_eq!(names, [vec!["a", "b", "a.s", "b.s"], vec!["c", "c.s"], vec!["d", "d.s"]]);
        assert_eq!(shards[2].file, "weights-00003.safetensors");
    }
}
