//! The target of all scenarios: the first byte of a connection says what it does.

use std::{net::SocketAddr, thread};

use crate::process::receive_in_bulk;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// Sends without end.
pub(crate) const DOWN: u8 = b'd';
/// Reads without end.
pub(crate) const UP: u8 = b'u';
/// Sends back what it gets.
pub(crate) const ECHO: u8 = b'e';

/// Bytes that bulk senders and receivers move at once.
pub(crate) const BULK: usize = 512 * 1024;

/// Starts the target on a thread of its own.
pub(crate) fn start() -> anyhow::Result<SocketAddr> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        socket.listen(8192)
    })?;
    let address = listener.local_addr()?;
    thread::Builder::new().name("target".into()).spawn(move || {
        runtime.block_on(serve(listener));
    })?;
    Ok(address)
}

async fn serve(listener: TcpListener) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            tokio::spawn(async move {
                let _ = answer(stream).await;
            });
        }
    }
}

async fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    match stream.read_u8().await? {
        DOWN => {
            let block = vec![7u8; BULK];
            loop {
                stream.write_all(&block).await?;
            }
        }
        UP => {
            receive_in_bulk(&stream, BULK);
            let mut block = vec![0u8; BULK];
            while stream.read(&mut block).await? > 0 {}
        }
        _ => {
            // Small: an idle session waits here with it.
            let mut block = [0u8; 256];
            loop {
                let read = stream.read(&mut block).await?;
                if read == 0 {
                    return Ok(());
                }
                stream.write_all(&block[..read]).await?;
            }
        }
    }
    Ok(())
}
