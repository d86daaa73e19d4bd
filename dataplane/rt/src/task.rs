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
    drop(monoio::spawn(CatchPanic { task, vital: false }));
}

/// Runs a task that its worker cannot do without, such as the timer wheel. A panic of it ends the
/// process, for its supervisor to start another: no client would notice anything else in time.
pub fn spawn_vital<F>(task: F)
where
    F: Future<Output = ()> + 'static,
{
    drop(monoio::spawn(CatchPanic { task, vital: true }));
}

pin_project_lite::pin_project! {
    struct CatchPanic<F> {
        #[pin]
        task: F,
        vital: bool,
    }
}

impl<F: Future<Output = ()>> Future for CatchPanic<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        let task = this.task;
        // Unwind safety: the task is not polled again after a panic, only dropped.
        match catch_unwind(AssertUnwindSafe(|| task.poll(cx))) {
            Ok(poll) => poll,
            Err(payload) => {
                if *this.vital {
                    tracing::error!(
                        panic = message(&payload),
                        "a worker panicked; the process ends"
                    );
                    std::process::abort();
                }
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
