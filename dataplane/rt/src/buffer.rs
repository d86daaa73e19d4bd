//! Buffers of a worker: two sizes, kept in a per-thread pool, moved into operations and given back.
//!
//! A session that waits holds none, but for at most 512 held receives a worker (8 MiB). Memory besides:
//! at most [`BUFFERS_LARGE_MAX`] large buffers a worker (12 MiB), and one small buffer for each direction
//! that holds bytes its destination has not taken.

use std::{cell::RefCell, mem};

/// Size of a small buffer in bytes: what a first receive may take.
pub const BUFFER_SMALL: usize = 16 * 1024;
/// Size of a large buffer in bytes: what a flow that fills small ones moves to.
pub const BUFFER_LARGE: usize = 256 * 1024;
/// Large buffers one worker may have in use; beyond it flows stay on small ones.
pub const BUFFERS_LARGE_MAX: usize = 48;
/// Free small buffers a worker keeps (4 MiB).
const SMALL_KEPT: usize = 256;
/// Free large buffers a worker keeps (4 MiB).
const LARGE_KEPT: usize = 16;

#[derive(Default)]
struct Pool {
    small: Vec<Box<[u8]>>,
    large: Vec<Box<[u8]>>,
    small_used: usize,
    large_used: usize,
}

thread_local! {
    static POOL: RefCell<Pool> = RefCell::default();
}

/// A pooled buffer with the bytes `start..end` filled. Given back to the pool when dropped.
pub struct Buffer {
    data: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Buffer {
    /// A buffer of [`BUFFER_SMALL`] bytes.
    pub fn small() -> Self {
        let data = POOL.with_borrow_mut(|pool| {
            pool.small_used += 1;
            pool.small.pop()
        });
        Self::new(data.unwrap_or_else(|| vec![0; BUFFER_SMALL].into()))
    }

    /// A buffer of [`BUFFER_LARGE`] bytes, or `None` when the worker has too many in use.
    pub fn large() -> Option<Self> {
        let data = POOL.with_borrow_mut(|pool| {
            if pool.large_used >= BUFFERS_LARGE_MAX {
                return None;
            }
            pool.large_used += 1;
            Some(pool.large.pop())
        })?;
        Some(Self::new(data.unwrap_or_else(|| vec![0; BUFFER_LARGE].into())))
    }

    fn new(data: Box<[u8]>) -> Self {
        Self { data, start: 0, end: 0 }
    }

    /// Whether this is a small buffer.
    pub fn is_small(&self) -> bool {
        self.data.len() == BUFFER_SMALL
    }

    /// The whole room, for a receive that overwrites it; say with [`Buffer::fill`] how much is valid.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.data
    }

    /// Declares the first `len` bytes of the room filled.
    pub fn fill(&mut self, len: usize) {
        self.keep(0, len);
    }

    /// Makes `start..end` of the room the filled part.
    ///
    /// # Panics
    /// If the range does not lie in the room.
    pub fn keep(&mut self, start: usize, end: usize) {
        assert!(start <= end && end <= self.data.len(), "a filled part lies inside its buffer");
        (self.start, self.end) = (start, end);
    }

    /// The filled part's place in the room.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.start..self.end
    }

    /// Drops the first `len` filled bytes: they were sent.
    pub fn consume(&mut self, len: usize) {
        self.keep(self.start + len, self.end);
    }

    /// The filled bytes.
    pub fn filled(&self) -> &[u8] {
        &self.data[self.start..self.end]
    }

    /// The filled bytes, to be changed in place.
    pub fn filled_mut(&mut self) -> &mut [u8] {
        &mut self.data[self.start..self.end]
    }

    /// How many bytes are filled.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether nothing is filled.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// How many bytes the room has.
    pub fn capacity(&self) -> usize {
        self.data.len()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let data = mem::take(&mut self.data);
        // A buffer may outlive its thread's pool when a worker ends; then it is simply freed.
        let _ = POOL.try_with(|pool| {
            let Ok(mut pool) = pool.try_borrow_mut() else { return };
            let pool = &mut *pool;
            let (free, kept, used) = match data.len() {
                BUFFER_SMALL => (&mut pool.small, SMALL_KEPT, &mut pool.small_used),
                BUFFER_LARGE => (&mut pool.large, LARGE_KEPT, &mut pool.large_used),
                _ => return,
            };
            *used -= 1;
            if free.len() < kept {
                free.push(data);
            }
        });
    }
}

// SAFETY: `data` is a boxed slice, so its address does not change while the buffer is moved, and
// `start..end` always lies inside it (asserted in `keep`).
unsafe impl monoio::buf::IoBuf for Buffer {
    fn read_ptr(&self) -> *const u8 {
        self.filled().as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.len()
    }
}

// SAFETY: as above; the driver says how many bytes from the room's start the kernel has written.
unsafe impl monoio::buf::IoBufMut for Buffer {
    fn write_ptr(&mut self) -> *mut u8 {
        self.data.as_mut_ptr()
    }

    fn bytes_total(&mut self) -> usize {
        self.data.len()
    }

    unsafe fn set_init(&mut self, len: usize) {
        self.fill(len);
    }
}

/// Small and large buffers of the calling worker that are in use.
pub fn buffer_statistics() -> (usize, usize) {
    POOL.with_borrow(|pool| (pool.small_used, pool.large_used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_used_again() {
        let mut buffer = Buffer::small();
        let address = buffer.room().as_ptr();
        drop(buffer);
        assert_eq!(Buffer::small().room().as_ptr(), address);
        assert_eq!(buffer_statistics(), (0, 0));
    }

    #[test]
    fn large_buffers_are_bounded() {
        let held: Vec<_> = std::iter::from_fn(Buffer::large).collect();
        assert_eq!(held.len(), BUFFERS_LARGE_MAX);
        drop(held);
        assert!(Buffer::large().is_some());
    }

    #[test]
    fn consume_leaves_the_rest() {
        let mut buffer = Buffer::small();
        buffer.room()[..5].copy_from_slice(b"hello");
        buffer.fill(5);
        buffer.consume(2);
        assert_eq!(buffer.filled(), b"llo");
    }
}
