//! How many sessions a node takes: counted before one begins, so that it never runs out of
//! descriptors half way.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

/// Sessions beyond the limit that are told so, at once; further clients are closed.
const REFUSING_MAX: usize = 128;

/// The node's sessions.
#[derive(Debug)]
pub struct NodePlaces {
    taken: AtomicUsize,
    max: AtomicUsize,
    refusing: AtomicUsize,
}

/// One session's place, given back when dropped.
#[derive(Debug)]
pub struct NodePlace {
    places: Arc<NodePlaces>,
    /// Whether the session only tells its client that the node is full.
    pub refusing: bool,
}

impl NodePlaces {
    /// Places for so many sessions.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            taken: AtomicUsize::new(0),
            max: AtomicUsize::new(max),
            refusing: AtomicUsize::new(0),
        })
    }

    /// The limit.
    pub fn max(&self) -> usize {
        self.max.load(Relaxed)
    }

    /// Changes the limit; running sessions stay.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Relaxed);
    }

    /// Takes a place, or one for telling a client that there is none (as for all, when `none` are to be
    /// had now); `None` when those are gone too.
    pub fn take(self: &Arc<Self>, none: bool) -> Option<NodePlace> {
        let take = |counter: &AtomicUsize, max: usize| {
            let more = |taken: usize| (taken < max).then_some(taken + 1);
            counter.fetch_update(Relaxed, Relaxed, more).is_ok()
        };
        if !none && take(&self.taken, self.max()) {
            return Some(NodePlace { places: self.clone(), refusing: false });
        }
        take(&self.refusing, REFUSING_MAX)
            .then(|| NodePlace { places: self.clone(), refusing: true })
    }
}

impl Drop for NodePlace {
    fn drop(&mut self) {
        let counter = if self.refusing { &self.places.refusing } else { &self.places.taken };
        counter.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_holds_and_a_few_are_told() {
        let places = NodePlaces::new(2);
        let taken: Vec<_> = std::iter::from_fn(|| places.take(false)).collect();
        assert_eq!(taken.iter().filter(|place| !place.refusing).count(), 2);
        assert_eq!(taken.len(), 2 + REFUSING_MAX);
        drop(taken);
        assert!(places.take(true).unwrap().refusing);
        assert!(!places.take(false).unwrap().refusing);
    }
}
