//! The least that a SOCKS5 proxy on Culvert's runtime takes: it answers, connects, and copies. No users, limits, rules,
//! deadlines, counts or records; what Culvert costs beyond it is the price of these.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
};

use anyhow::Context;
use monoio::{
    IoUringDriver, RuntimeBuilder,
    io::{AsyncReadRent, AsyncWriteRent, AsyncWriteRentExt, Splitable},
    net::{ListenerOpts, TcpListener, TcpStream},
};

/// Workers, as Culvert has on two cores.
const WORKERS: usize = 2;
/// Bytes received at once, as Culvert's small buffers take.
const BUFFER: usize = 16 * 1024;

/// Serves on an address until it is ended.
pub(crate) fn serve(address: SocketAddr) -> anyhow::Result<()> {
    let workers = (0..WORKERS).map(|_| std::thread::spawn(move || work(address)));
    for worker in workers.collect::<Vec<_>>() {
        worker.join().ok().context("a worker panicked")??;
    }
    Ok(())
}

fn work(address: SocketAddr) -> anyhow::Result<()> {
    let mut ring = io_uring::IoUring::builder();
    ring.setup_cqsize(16 * 1024).setup_clamp().setup_single_issuer().setup_defer_taskrun();
    let mut runtime =
        RuntimeBuilder::<IoUringDriver>::new().with_entries(2048).uring_builder(ring).build()?;
    runtime.block_on(async move {
        let options = ListenerOpts::new().reuse_port(true).backlog(4096);
        let listener = TcpListener::bind_with_config(address, &options)?;
        loop {
            let (client, _) = listener.accept().await?;
            drop(monoio::spawn(carry(client)));
        }
    })
}

async fn carry(client: TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    let (client, target) = greet(client).await?;
    let ((from_client, to_client), (from_target, to_target)) =
        (client.into_split(), target.into_split());
    drop(monoio::spawn(copy(from_client, to_target)));
    copy(from_target, to_client).await
}

/// Takes whatever login is offered and connects to the IPv4 address that is asked for. Clients say one message at a
/// time.
async fn greet(mut client: TcpStream) -> io::Result<(TcpStream, TcpStream)> {
    let mut said = Vec::with_capacity(512);
    for answer in [&[5, 2][..], &[1, 0]] {
        (_, said) = client.read(said).await;
        client.write_all(answer).await.0?;
        said.clear();
    }
    let (_, said) = client.read(said).await;
    let [5, 1, 0, 1, a, b, c, d, high, low] = said[..] else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let to = (Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([high, low]));
    let target = TcpStream::connect_addr(to.into()).await?;
    target.set_nodelay(true)?;
    client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0][..]).await.0?;
    Ok((client, target))
}

async fn copy(mut from: impl AsyncReadRent, mut to: impl AsyncWriteRent) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(BUFFER);
    loop {
        let received;
        (received, buffer) = from.read(buffer).await;
        if received? == 0 {
            return to.shutdown().await;
        }
        let sent;
        (sent, buffer) = to.write_all(buffer).await;
        sent?;
        buffer.clear();
    }
}
