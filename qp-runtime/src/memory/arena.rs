//! Memory for many long slices, in large pages where the system has them: weights that every token reads pass by almost twice as
//! fast then, since fewer addresses are to be translated.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytemuck::Pod;
use memmap2::MmapMut;

/// Slices begin at multiples of so many bytes.
const ALIGN: usize = 64;

/// Memory that is handed out piece by piece, zeros at first, and given back when the last piece is gone.
pub struct Arena {
    /// Held for its memory, which only pieces look at.
    _memory: MmapMut,
    start: *mut u8,
    bytes: usize,
    taken: AtomicUsize,
}

// SAFETY: the pointer is that of memory that the arena owns, and each part of it belongs to one piece.
unsafe impl Send for Arena {}
// SAFETY: as above; what is shared is a counter.
unsafe impl Sync for Arena {}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena({} of {} bytes)", self.taken.load(Ordering::Relaxed), self.bytes)
    }
}

impl Arena {
    /// Bytes that a slice of `len` numbers takes.
    pub fn bytes_of<T>(len: usize) -> usize {
        (len * size_of::<T>()).next_multiple_of(ALIGN)
    }

    /// An arena of `bytes`; nothing is used before it is written to. `None` if the system refuses.
    pub fn new(bytes: usize) -> Option<Arc<Arena>> {
        let mut memory = MmapMut::map_anon(bytes.max(1)).ok()?;
        // Where there are no large pages, small ones do.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        let start = memory.as_mut_ptr();
        Some(Arc::new(Arena { _memory: memory, start, bytes, taken: AtomicUsize::new(0) }))
    }

    /// A slice of `len` zeros, or `None` if it does not fit what is left.
    pub fn take<T: Pod>(self: &Arc<Self>, len: usize) -> Option<Piece<T>> {
        const { assert!(align_of::<T>() <= ALIGN) };
        let bytes = Arena::bytes_of::<T>(len);
        let fits = |taken: usize| taken.checked_add(bytes).filter(|end| *end <= self.bytes);
        let at = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok()?;
        // SAFETY: `at + bytes` lie within the memory.
        let start = unsafe { self.start.add(at) }.cast();
        Some(Piece { _arena: self.clone(), start, len, of: PhantomData })
    }
}

/// A slice in an [`Arena`].
pub struct Piece<T> {
    _arena: Arc<Arena>,
    start: *mut T,
    len: usize,
    of: PhantomData<T>,
}

// SAFETY: a piece alone has its part of the memory, as a vector has.
unsafe impl<T: Send> Send for Piece<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Piece<T> {}

impl<T: Pod> Deref for Piece<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the memory is this piece's, aligned, initialized with zeros, and lives as long as the arena.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl<T: Pod> DerefMut for Piece<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl<T> fmt::Debug for Piece<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Piece({})", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_apart_and_end_with_the_memory() {
        let arena = Arena::new(Arena::bytes_of::<i8>(100) + Arena::bytes_of::<f32>(7)).unwrap();
        let mut bytes = arena.take::<i8>(100).unwrap();
        assert!(arena.take::<f32>(17).is_none());
        let mut floats = arena.take::<f32>(7).unwrap();
        assert!(bytes.iter().all(|b| *b == 0) && floats.iter().all(|f| *f == 0.0));
        bytes.fill(-1);
        floats.fill(2.5);
        assert!(arena.take::<i8>(1).is_none(), "nothing is left");
        drop(arena);
        assert!(bytes.iter().all(|b| *b == -1) && floats.iter().all(|f| *f == 2.5));
        assert!(floats.as_ptr().addr() - bytes.as_ptr().addr() >= 100 && floats.as_ptr().addr() % ALIGN == 0);
        assert_eq!(Arena::new(0).unwrap().take::<u8>(0).unwrap().len(), 0);
    }
}
