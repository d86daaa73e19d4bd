//! The same relay work on three runtimes: 64 MiB through one thread that copies from socket to socket.

#![allow(missing_docs)]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    thread,
};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const BYTES: usize = 64 << 20;
const BLOCK: usize = 256 * 1024;

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
    let address: SocketAddr = listener.local_addr().expect("its address");
    let near = TcpStream::connect(address).expect("a connection");
    (near, listener.accept().expect("its other end").0)
}

/// Sends [`BYTES`] into one connection, reads them out of another; `relay` moves them between.
fn carry(relay: impl FnOnce(TcpStream, TcpStream)) {
    let ((mut source, from), (mut sink, to)) = (pair(), pair());
    let sender = thread::spawn(move || {
        let block = vec![7; BLOCK];
        for _ in 0..BYTES / BLOCK {
            source.write_all(&block).expect("the relay reads");
        }
    });
    let receiver = thread::spawn(move || {
        let (mut total, mut block) = (0, vec![0; BLOCK]);
        while total < BYTES {
            total += sink.read(&mut block).expect("the relay writes");
        }
    });
    relay(from, to);
    sender.join().expect("the sender");
    receiver.join().expect("the receiver");
}

fn on_culvert(from: TcpStream, to: TcpStream) {
    thread::spawn(move || {
        let runtime = culvert_rt::Runtime::build(Default::default()).expect("a runtime");
        runtime.block_on(async move {
            for socket in [&from, &to] {
                socket.set_nonblocking(true).expect("a socket");
            }
            let from = culvert_rt::Socket::from_fd(OwnedFd::from(from)).expect("a socket");
            let to = culvert_rt::Socket::from_fd(OwnedFd::from(to)).expect("a socket");
            let watch = culvert_rt::Watch::new();
            let mut total = 0;
            while total < BYTES {
                from.readable().await.expect("readiness");
                let mut buffer = culvert_rt::Buffer::large().expect("a buffer");
                let Ok(received) = from.receive(buffer.room()) else { continue };
                buffer.fill(received);
                total += received;
                while !buffer.is_empty() {
                    let (sent, back) = to.send(buffer, &watch).await;
                    buffer = back;
                    buffer.consume(sent.expect("the sink reads"));
                }
            }
        });
    })
    .join()
    .expect("the relay");
}

fn on_tokio(from: TcpStream, to: TcpStream) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
    runtime.block_on(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        for socket in [&from, &to] {
            socket.set_nonblocking(true).expect("a socket");
        }
        let mut from = tokio::net::TcpStream::from_std(from).expect("a socket");
        let mut to = tokio::net::TcpStream::from_std(to).expect("a socket");
        let (mut total, mut block) = (0, vec![0; BLOCK]);
        while total < BYTES {
            let received = from.read(&mut block).await.expect("the sender writes");
            to.write_all(&block[..received]).await.expect("the sink reads");
            total += received;
        }
    });
}

fn on_tokio_uring(from: TcpStream, to: TcpStream) {
    tokio_uring::start(async move {
        let from = tokio_uring::net::TcpStream::from_std(from);
        let to = tokio_uring::net::TcpStream::from_std(to);
        let (mut total, mut block) = (0, vec![0; BLOCK]);
        while total < BYTES {
            let (received, back) = from.read(block).await;
            let received = received.expect("the sender writes");
            use tokio_uring::buf::BoundedBuf;
            let (written, slice) = to.write_all(back.slice(..received)).await;
            written.expect("the sink reads");
            block = slice.into_inner();
            total += received;
        }
    });
}

fn relays(c: &mut Criterion) {
    let mut group = c.benchmark_group("relay 64 MiB");
    group.throughput(Throughput::Bytes(BYTES as u64)).sample_size(10);
    group.bench_function("culvert-rt (monoio)", |b| b.iter(|| carry(on_culvert)));
    group.bench_function("tokio", |b| b.iter(|| carry(on_tokio)));
    group.bench_function("tokio-uring", |b| b.iter(|| carry(on_tokio_uring)));
    group.finish();
}

criterion_group!(benches, relays);
criterion_main!(benches);
