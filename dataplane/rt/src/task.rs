//! Tasks that may panic without taking the worker with them.

use std::{
    any::Any,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll},
};

static PANICS: AtomicU64 = AtomicU64::new(0);

/// How many tasks of this process ended by a panic.
pub fn panics_total() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

/// Runs a task on the calling worker. A panic ends the task, is counted and logged, and goes no
/// further; what the task owned is dropped, so its sockets close.
pub fn spawn<F>(task: F)
where
    F: Future<Output = ()> + 'static,
{
    drop(monoio::spawn(CatchPanic { task }));
}

pin_project_lite::pin_project! {
    struct CatchPanic<F> {
        #[pin]
        task: F,
    }
}

impl<F: Future<Output = ()>> Future for CatchPanic<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let task = self.project().task;
        // Unwind safety: the task is not polled again after a panic, only dropped.
        match catch_unwind(AssertUnwindSafe(|| task.poll(cx))) {
            Ok(poll) => poll,
            Err(payload) => {
                PANICS.fetch_add(1, Ordering::Relaxed);
                tracing::error!(panic = message(&payload), "a session panicked and was ended");
                Poll::Ready(())
            }
        }
    }
}

fn message(payload: &Box<dyn Any + Send>) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
