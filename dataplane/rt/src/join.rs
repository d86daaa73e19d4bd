//! Two futures in one task.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::{Context, Poll},
};

/// Polls both futures until both are done. Neither is ever dropped half way, which is what a relay
/// needs: an operation in flight holds bytes.
pub fn join<A: Future, B: Future>(a: A, b: B) -> Join<A, B> {
    Join { a, b, first: None, second: None }
}

pin_project_lite::pin_project! {
    /// The future of [`join`]. Not an `async fn`, which would hold each of its arguments twice.
    pub struct Join<A: Future, B: Future> {
        #[pin]
        a: A,
        #[pin]
        b: B,
        first: Option<A::Output>,
        second: Option<B::Output>,
    }
}

impl<A: Future, B: Future> Future for Join<A, B> {
    type Output = (A::Output, B::Output);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if this.first.is_none()
            && let Poll::Ready(output) = this.a.poll(cx)
        {
            *this.first = Some(output);
        }
        if this.second.is_none()
            && let Poll::Ready(output) = this.b.poll(cx)
        {
            *this.second = Some(output);
        }
        match (this.first.take(), this.second.take()) {
            (Some(a), Some(b)) => Poll::Ready((a, b)),
            (a, b) => {
                (*this.first, *this.second) = (a, b);
                Poll::Pending
            }
        }
    }
}

/// Waits for one of two futures that may be dropped, such as waits for readiness; whether it was the
/// second, which goes before the first if both are done.
pub async fn either<A: Future, B: Future>(first: A, second: B) -> bool {
    let (mut first, mut second) = (pin!(first), pin!(second));
    poll_fn(|cx| {
        if second.as_mut().poll(cx).is_ready() {
            return Poll::Ready(true);
        }
        first.as_mut().poll(cx).map(|_| false)
    })
    .await
}
