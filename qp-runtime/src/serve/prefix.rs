//! Pages of keys and values that sequences with a common beginning share.
//!
//! A whole page's keys and values follow from the tokens of its positions and of all before them. The cache knows each
//! page by these: its 64 tokens and the page before. It is an owner of its pages, so that they outlive the sequence that
//! computed them; a page that nobody else owns is given up when pages run out, the longest unused first.

use std::collections::{BTreeMap, HashMap};

use crate::engine::{PAGE, Pool};

/// The page before the first.
pub const ROOT: u64 = 0;

/// Number of a cached page among all that were ever cached, from 1.
type Id = u64;

/// A page's tokens and the page before it.
type Key = (Id, Box<[u32]>);

struct Entry {
    id: Id,
    page: u32,
    /// When it was last used; a key of `by_age`.
    used: u64,
}

/// The cached pages.
#[derive(Default)]
pub struct PrefixCache {
    entries: HashMap<Key, Entry>,
    /// Keys by time of use.
    by_age: BTreeMap<u64, Key>,
    /// The number of the next page to be cached.
    next: Id,
    clock: u64,
}

impl PrefixCache {
    /// Pages in the cache.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The cached pages that `tokens` begin with, whole pages only, each with a new owner, and the number of the last.
    pub fn find(&mut self, tokens: &[u32], pool: &mut Pool) -> (Vec<u32>, u64) {
        let (mut pages, mut keys, mut parent) = (Vec::new(), Vec::new(), ROOT);
        for tokens in tokens.chunks_exact(PAGE) {
            let key = (parent, Box::from(tokens));
            let Some(entry) = self.entries.get(&key) else { break };
            pool.share(entry.page);
            pages.push(entry.page);
            parent = entry.id;
            keys.push(key);
        }
        self.touch(keys);
        (pages, parent)
    }

    /// Caches the page after `parent` that holds `tokens`, if it is not known, and gives its number.
    pub fn add(&mut self, parent: u64, tokens: &[u32], page: u32, pool: &mut Pool) -> u64 {
        let key = (parent, Box::from(tokens));
        let id = match self.entries.get(&key) {
            Some(entry) => entry.id,
            None => {
                pool.share(page);
                self.next += 1;
                self.clock += 1;
                self.by_age.insert(self.clock, key.clone());
                self.entries.insert(key.clone(), Entry { id: self.next, page, used: self.clock });
                return self.next;
            }
        };
        self.touch(vec![key]);
        id
    }

    /// Marks pages, in their order in a sequence, as just used: the later ones of a sequence count as older, because an
    /// earlier one is of use without them and not the other way round.
    fn touch(&mut self, keys: Vec<Key>) {
        for key in keys.into_iter().rev() {
            if let Some(entry) = self.entries.get_mut(&key) {
                self.by_age.remove(&entry.used);
                self.clock += 1;
                entry.used = self.clock;
                self.by_age.insert(self.clock, key);
            }
        }
    }

    /// Pages that only the cache owns.
    pub fn idle(&self, pool: &Pool) -> usize {
        self.entries.values().filter(|e| !pool.is_shared(e.page)).count()
    }

    /// Gives up the longest unused page that only the cache owns; false if there is none.
    pub fn evict(&mut self, pool: &mut Pool) -> bool {
        let idle = |key: &&Key| self.entries.get(*key).is_some_and(|e| !pool.is_shared(e.page));
        let Some(key) = self.by_age.values().find(idle).cloned() else { return false };
        self.remove(&key, pool);
        true
    }

    fn remove(&mut self, key: &Key, pool: &mut Pool) {
        if let Some(entry) = self.entries.remove(key) {
            self.by_age.remove(&entry.used);
            pool.release(entry.page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(pages: &[u32]) -> Vec<u32> {
        pages.iter().flat_map(|&p| (0..PAGE as u32).map(move |i| 100 * p + i)).collect()
    }

    /// Adds a sequence's pages to the cache and lets go of them.
    fn add(cache: &mut PrefixCache, pool: &mut Pool, pages: &[u32]) -> Vec<u32> {
        let all = tokens(pages);
        let (mut found, mut parent) = cache.find(&all, pool);
        for tokens in all.chunks(PAGE).skip(found.len()) {
            let page = pool.take().or_else(|| cache.evict(pool).then(|| pool.take()).flatten()).unwrap();
            parent = cache.add(parent, tokens, page, pool);
            found.push(page);
        }
        for &page in &found {
            pool.release(page);
        }
        found
    }

    #[test]
    fn common_beginnings_are_one_page() {
        let (mut cache, mut pool) = (PrefixCache::default(), Pool::new(8));
        let a = add(&mut cache, &mut pool, &[1, 2, 3]);
        let b = add(&mut cache, &mut pool, &[1, 2, 4]);
        assert_eq!((a[..2].to_vec(), a[2] == b[2]), (b[..2].to_vec(), false));
        // The same tokens elsewhere are another page.
        let c = add(&mut cache, &mut pool, &[2]);
        assert!(c[0] != a[1]);
        assert_eq!((cache.len(), pool.free(), cache.idle(&pool)), (5, 3, 5));
        let (found, _) = cache.find(&tokens(&[1, 2, 3])[..PAGE * 3 - 1], &mut pool);
        assert_eq!(found, a[..2]);
        assert_eq!(cache.idle(&pool), 3);
    }

    #[test]
    fn the_longest_unused_page_goes_and_never_one_in_use() {
        let (mut cache, mut pool) = (PrefixCache::default(), Pool::new(4));
        add(&mut cache, &mut pool, &[1, 2]);
        add(&mut cache, &mut pool, &[3, 4]);
        let (held, _) = cache.find(&tokens(&[1]), &mut pool);
        // Of the two sequences' last pages the first sequence's is older, and a beginning outlives what follows.
        assert!(cache.evict(&mut pool));
        let (found, _) = cache.find(&tokens(&[1, 2]), &mut pool);
        assert_eq!(found.len(), 1);
        found.iter().for_each(|&p| pool.release(p));
        assert!(cache.evict(&mut pool) && cache.evict(&mut pool) && !cache.evict(&mut pool));
        assert_eq!((cache.len(), pool.free()), (1, 3));
        pool.release(held[0]);
        assert!(cache.evict(&mut pool));
        assert_eq!((cache.is_empty(), pool.free()), (true, 4));
    }
}
