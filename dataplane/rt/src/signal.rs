//! A value that comes once, for any number of tasks of one worker.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    task::{Poll, Waker},
};

/// A value to wait for. Share it in an `Rc`.
pub struct Signal<T> {
    value: Cell<Option<T>>,
    wakers: RefCell<Vec<Waker>>,
}

impl<T> Default for Signal<T> {
    fn default() -> Self {
        Self { value: Cell::new(None), wakers: RefCell::default() }
    }
}

impl<T: Clone> Signal<T> {
    /// Gives the value and wakes all who wait. The first value stays.
    pub fn set(&self, value: T) {
        let known = self.value.take();
        self.value.set(known.or(Some(value)));
        for waker in self.wakers.take() {
            waker.wake();
        }
    }

    /// The value, if it came.
    pub fn get(&self) -> Option<T> {
        let value = self.value.take();
        self.value.set(value.clone());
        value
    }

    /// Waits for the value. Holds nothing; may be dropped.
    pub async fn wait(&self) -> T {
        poll_fn(|cx| match self.get() {
            Some(value) => Poll::Ready(value),
            None => {
                let mut wakers = self.wakers.borrow_mut();
                if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
                    wakers.push(cx.waker().clone());
                }
                Poll::Pending
            }
        })
        .await
    }
}
