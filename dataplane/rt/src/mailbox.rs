//! A worker's mailbox: a bounded queue any thread may fill, and an eventfd that wakes the worker.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crossbeam::queue::ArrayQueue;

use crate::Socket;

/// The queue is full; the message is handed back.
#[derive(Debug)]
pub struct Full<T>(pub T);

struct Shared<T> {
    queue: ArrayQueue<T>,
    event: OwnedFd,
    /// Whether the worker was already told; saves a system call for every message but the first.
    told: AtomicBool,
}

/// The sending side; cheap to clone.
pub struct Sender<T>(Arc<Shared<T>>);

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// The receiving side on its way to a worker, which takes it into its driver with [`Mailbox::open`].
pub struct Mailbox<T>(Arc<Shared<T>>);

/// The receiving side, in its worker.
pub struct Inbox<T> {
    shared: Arc<Shared<T>>,
    event: Socket,
}

/// A mailbox that holds at most `capacity` messages.
pub fn mailbox<T>(capacity: usize) -> io::Result<(Sender<T>, Mailbox<T>)> {
    // SAFETY: no memory is passed.
    let event = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    if event < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the descriptor is open and owned by nobody else.
    let event = unsafe { OwnedFd::from_raw_fd(event) };
    let shared =
        Arc::new(Shared { queue: ArrayQueue::new(capacity), event, told: AtomicBool::new(false) });
    Ok((Sender(shared.clone()), Mailbox(shared)))
}

impl<T> Sender<T> {
    /// Posts a message; never blocks.
    pub fn send(&self, message: T) -> Result<(), Full<T>> {
        self.0.queue.push(message).map_err(Full)?;
        if !self.0.told.swap(true, Ordering::SeqCst) {
            let one = 1u64;
            // SAFETY: `one` is readable for the eight bytes an eventfd takes.
            unsafe { libc::write(self.0.event.as_raw_fd(), (&raw const one).cast(), 8) };
        }
        Ok(())
    }
}

impl<T> Mailbox<T> {
    /// Takes the mailbox into the calling worker's driver.
    pub fn open(self) -> io::Result<Inbox<T>> {
        let event = Socket::from_fd(self.0.event.try_clone()?)?;
        Ok(Inbox { shared: self.0, event })
    }
}

impl<T> Inbox<T> {
    /// Waits for the next message. Holds nothing; may be dropped.
    pub async fn receive(&self) -> T {
        loop {
            if let Some(message) = self.shared.queue.pop() {
                return message;
            }
            // Empty: ask to be told, look once more, then wait.
            self.shared.told.store(false, Ordering::SeqCst);
            if let Some(message) = self.shared.queue.pop() {
                return message;
            }
            if self.event.readable().await.is_ok() {
                let mut count = 0u64;
                // SAFETY: `count` is writable for the eight bytes an eventfd gives.
                unsafe { libc::read(self.event.raw_fd(), (&raw mut count).cast(), 8) };
            }
        }
    }
}
