//! What a record that is not written yet has to say.

use std::{fmt, sync::Arc};

use crossbeam::queue::SegQueue;

use super::map::{Region, Slot};

/// The slot of bytes whose record is on its way; free once the record is written, or given up.
pub struct Owed {
    region: Region,
    index: u32,
    written: Arc<SegQueue<u32>>,
}

impl Owed {
    pub(super) fn new(region: Region, index: u32, written: Arc<SegQueue<u32>>) -> Self {
        Self { region, index, written }
    }

    fn slot(&self) -> &Slot {
        &self.region.slots()[self.index as usize]
    }

    /// The record is about to be written under this number. Recovery makes one of the same number, which
    /// is not taken twice.
    pub fn recorded_as(&self, sequence: u64) {
        self.slot().recorded_as(sequence);
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        self.slot().clear();
        self.written.push(self.index);
    }
}

impl fmt::Debug for Owed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Owed").field(&self.index).finish()
    }
}
