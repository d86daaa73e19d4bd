//! The whole product over loopback: the real program, real sockets. The suite runs on io_uring, and on
//! epoll with `TEST_DRIVER=epoll`.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod support;

mod access;
mod edges;
mod http;
mod life;
mod names;
mod relay;
mod socks;
