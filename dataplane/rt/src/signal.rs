//! A value that comes once, for any number of tasks of one worker.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
};

/// A value to wait for. Share it in an `Rc`.
pub struct Signal<T> {
    value: Cell<Option<T>>,
    /// Those who wait, each in a place of its own. Wakers are not compared: two of one task may look different.
    wakers: RefCell<Vec<Option<Waker>>>,
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
        for waker in self.wakers.take().into_iter().flatten() {
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
    pub fn wait(&self) -> Wait<'_, T> {
        Wait { signal: self, place: None }
    }

    #[cfg(test)]
    fn waiting(&self) -> usize {
        self.wakers.borrow().iter().flatten().count()
    }
}

/// The future of [`Signal::wait`].
pub struct Wait<'a, T> {
    signal: &'a Signal<T>,
    place: Option<usize>,
}

impl<T: Clone> Future for Wait<'_, T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let this = &mut *self;
        if let Some(value) = this.signal.get() {
            this.place = None;
            return Poll::Ready(value);
        }
        let mut wakers = this.signal.wakers.borrow_mut();
        match this.place.and_then(|place| wakers.get_mut(place)) {
            Some(Some(waker)) => waker.clone_from(cx.waker()),
            _ => {
                this.place = Some(wakers.len());
                wakers.push(Some(cx.waker().clone()));
            }
        }
        Poll::Pending
    }
}

impl<T> Drop for Wait<'_, T> {
    fn drop(&mut self) {
        // Once the value has come, nobody has a place.
        let mut wakers = self.signal.wakers.borrow_mut();
        if let Some(waker) = self.place.and_then(|place| wakers.get_mut(place)) {
            *waker = None;
        }
        while wakers.last().is_some_and(Option::is_none) {
            wakers.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{pin::pin, ptr, task::RawWaker, task::RawWakerVTable};

    use super::*;

    /// A waker whose clones have another table, as the runtime's may have.
    fn waker() -> Waker {
        fn clone(_: *const ()) -> RawWaker {
            RawWaker::new(ptr::dangling(), &CLONED)
        }
        fn nothing(_: *const ()) {}
        static CLONED: RawWakerVTable = RawWakerVTable::new(clone, nothing, nothing, nothing);
        static FIRST: RawWakerVTable = RawWakerVTable::new(clone, |_| {}, nothing, nothing);
        // SAFETY: no function of the table looks at what the pointer points to.
        unsafe { Waker::new(ptr::dangling(), &FIRST) }
    }

    #[test]
    fn who_waits_again_is_kept_once() {
        let signal = Signal::<()>::default();
        let waker = waker();
        let mut cx = Context::from_waker(&waker);
        {
            let (mut one, mut other) = (pin!(signal.wait()), pin!(signal.wait()));
            for _ in 0..10 {
                assert!(one.as_mut().poll(&mut cx).is_pending());
                assert!(other.as_mut().poll(&mut cx).is_pending());
            }
            assert_eq!(signal.waiting(), 2);
        }
        assert_eq!(signal.waiting(), 0, "who waits no more is forgotten");
        let mut wait = pin!(signal.wait());
        assert!(wait.as_mut().poll(&mut cx).is_pending());
        signal.set(());
        assert!(wait.as_mut().poll(&mut cx).is_ready());
        assert_eq!(signal.waiting(), 0);
    }
}
