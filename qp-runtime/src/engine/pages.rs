//! Who owns the pages of an engine.

/// Gives pages out, and takes them back when their last owner has let go.
#[derive(Debug)]
pub struct Pool {
    /// Pages without owner; the last is given out first.
    free: Vec<u32>,
    /// Owners of each page.
    owners: Vec<u32>,
}

impl Pool {
    /// Pages `0..pages`, all free.
    pub fn new(pages: usize) -> Self {
        Pool { free: (0..pages as u32).rev().collect(), owners: vec![0; pages] }
    }

    /// Free pages.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// A page with one owner; `None` if none is free.
    pub fn take(&mut self) -> Option<u32> {
        let page = self.free.pop()?;
        self.owners[page as usize] = 1;
        Some(page)
    }

    /// Adds an owner to a page that has some.
    pub fn share(&mut self, page: u32) {
        debug_assert!(self.owners[page as usize] > 0, "only pages in use are shared");
        self.owners[page as usize] += 1;
    }

    /// True if a page has several owners: nobody may write to it then.
    pub fn is_shared(&self, page: u32) -> bool {
        self.owners[page as usize] > 1
    }

    /// Takes an owner away; a page without any is free.
    pub fn release(&mut self, page: u32) {
        let owners = &mut self.owners[page as usize];
        *owners = owners.saturating_sub(1);
        if *owners == 0 {
            self.free.push(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_back_when_their_last_owner_lets_go() {
        let mut pool = Pool::new(2);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        assert_eq!((a, b, pool.take(), pool.free()), (0, 1, None, 0));
        pool.share(a);
        pool.release(a);
        assert!(pool.take().is_none() && !pool.is_shared(a));
        pool.release(a);
        assert_eq!((pool.take(), pool.is_shared(b)), (Some(0), false));
    }
}
