//! The runtime facade: threads, rings, sockets, buffers, deadlines and mailboxes of a worker.
//!
//! This is the only crate that names monoio, and with the ledger the only one with `unsafe`. It owns
//! the rules that make monoio 0.2.4 safe for a proxy:
//!
//! * nothing that holds data is ever dropped while the kernel works on it: a task waits with
//!   [`Socket::readable`] or [`Socket::writable`], which hold none; only a send and a held receive have
//!   a buffer, and are ended by shutting their socket down ([`Socket::send`],
//!   [`Socket::receive_held`]);
//! * a session is ended from outside by its [`Watch`], which wakes it; it then closes its own sockets;
//! * a panic in a task ends that task only ([`spawn`]), but for those a worker cannot do without
//!   ([`spawn_vital`]);
//! * a full submission queue is flushed, a busy ring waited for ([`Runtime`]; tested).
//!
//! It never parses a protocol and knows nothing of users or policy.

mod affinity;
mod buffer;
mod connect;
mod deadline;
mod interfaces;
mod join;
mod listener;
mod mailbox;
mod pipe;
mod process;
mod runtime;
mod signal;
mod socket;
mod task;

pub use affinity::{available_cores, pin_to_core};
pub use buffer::{BUFFER_LARGE, BUFFER_SMALL, BUFFERS_LARGE_MAX, Buffer, buffer_statistics};
pub use connect::{ConnectOptions, connect};
pub use deadline::{Guarded, Stopped, Ticks, Watch, Wheel, now};
pub use interfaces::local_addresses;
pub use join::{Join, either, join};
pub use listener::{Accepted, Listener, bind_listener, probe_listener};
pub use mailbox::{Full, Inbox, Mailbox, Sender, mailbox};
pub use pipe::{PIPE_BYTES, PIPES_MAX, Pipe, set_pipes_max};
pub use process::{
    descriptor_limit, lower_priority, raise_descriptor_limit, refuse_huge_pages, shorten_slice,
    thread_name,
};
pub use runtime::{Driver, DriverChoice, Runtime, RuntimeError, RuntimeOptions, cq_overflow};
pub use signal::Signal;
pub use socket::Socket;
pub use task::{panics_total, spawn, spawn_vital};

/// Lets other tasks of the worker run. On the ring every send and every wait is an operation, so tasks
/// take turns anyway (and a task that wakes itself would keep completions from being seen); on epoll
/// an operation may be done without any wait.
pub async fn take_turns() {
    if runtime::on_ring() {
        return;
    }
    let mut waited = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut waited, true) {
            return std::task::Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}

/// Waits on the runtime's own timer; resolution one millisecond. The timer is boxed: it takes a KiB,
/// which would otherwise be part of every future that may once sleep.
pub fn sleep(duration: std::time::Duration) -> std::pin::Pin<Box<impl Future<Output = ()>>> {
    Box::pin(monoio::time::sleep(duration))
}
