//! The words of a packed matrix, wherever they lie.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// Words in memory of their own, or part of a mapped file, which is then not copied. Cloning shares those of a file.
#[derive(Clone)]
pub struct Words(Place);

#[derive(Clone)]
enum Place {
    Memory(Vec<u32>),
    /// Aligned bytes, on a machine that stores words as files do.
    File(Arc<dyn AsRef<[u8]> + Send + Sync>),
}

impl Words {
    /// The words whose little-endian bytes are `bytes`: the bytes themselves, where this machine can read them in place.
    ///
    /// # Panics
    /// If the bytes are no whole words.
    pub fn from_bytes(bytes: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Words {
        let all = (*bytes).as_ref();
        assert!(all.len().is_multiple_of(4), "whole words");
        if cfg!(target_endian = "little") && bytemuck::try_cast_slice::<u8, u32>(all).is_ok() {
            return Words(Place::File(bytes));
        }
        Words(Place::Memory(all.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()))
    }

    /// All words.
    pub fn as_slice(&self) -> &[u32] {
        match &self.0 {
            Place::Memory(words) => words,
            Place::File(bytes) => bytemuck::cast_slice((**bytes).as_ref()),
        }
    }

    /// The words to be changed; those of a file are copied first.
    pub fn to_mut(&mut self) -> &mut Vec<u32> {
        if let Place::File(_) = self.0 {
            self.0 = Place::Memory(self.as_slice().to_vec());
        }
        match &mut self.0 {
            Place::Memory(words) => words,
            Place::File(_) => unreachable!("just copied"),
        }
    }
}

impl From<Vec<u32>> for Words {
    fn from(words: Vec<u32>) -> Words {
        Words(Place::Memory(words))
    }
}

impl Deref for Words {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        self.as_slice()
    }
}

impl PartialEq for Words {
    fn eq(&self, other: &Words) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_slice().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes from the second on, so that words are not aligned.
    struct Odd(Vec<u8>);

    impl AsRef<[u8]> for Odd {
        fn as_ref(&self) -> &[u8] {
            &self.0[1..]
        }
    }

    #[test]
    fn words_are_those_of_the_bytes_wherever_they_lie() {
        // A vector of words is aligned, one of bytes need not be.
        struct Even(Vec<u32>);
        impl AsRef<[u8]> for Even {
            fn as_ref(&self) -> &[u8] {
                bytemuck::cast_slice(&self.0)
            }
        }
        let words = [1u32, 0xdead_beef, 7].map(u32::to_le);
        let even = Arc::new(Even(words.to_vec()));
        let there = even.0.as_ptr();
        let mapped = Words::from_bytes(even);
        assert_eq!(mapped[..], [1, 0xdead_beef, 7]);
        assert_eq!(mapped.as_ptr() == there, cfg!(target_endian = "little"), "read in place");
        // One of four addresses is aligned, so three of these have to be copied.
        let mut odd = vec![0u8];
        words.iter().for_each(|w| odd.extend(w.to_ne_bytes()));
        assert_eq!(Words::from_bytes(Arc::new(Odd(odd))), mapped);
        let mut changed = mapped.clone();
        changed.to_mut()[0] = 2;
        assert_eq!((changed[0], mapped[0]), (2, 1));
    }
}
