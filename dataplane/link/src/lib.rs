//! The control link's connection, the same on both sides: messages in and out of a socket.
//!
//! The frames and their messages are `culvert-api`'s, which does no IO.

mod tls;

use std::{
    future::poll_fn,
    io,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use culvert_api::link::{Decoder, FRAME_MAX, FrameError, encode};
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    time::timeout,
};

pub use tls::{Acceptor, Connector, Identity, IdentityError, SERVER_NAME};

/// The other side takes some of what it is sent within this time.
const STUCK: Duration = Duration::from_secs(30);
/// Bytes received at once.
const RECEIVE: usize = 64 * 1024;

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The socket failed, or was closed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// What came is no frame.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// Nothing of what was sent was taken for 30 s.
    #[error("it takes nothing for 30 s")]
    Stuck,
}

/// A connected socket, plain or wrapped.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A connection on which messages `In` come and messages `Out` go.
pub struct Peer<In, Out> {
    stream: Box<dyn Stream>,
    bytes: Box<[u8]>,
    decoder: Decoder,
    out: Vec<u8>,
    heard: Instant,
    messages: PhantomData<fn(Out) -> In>,
}

impl<In: Message + Default, Out: Message> Peer<In, Out> {
    /// Over a connected socket.
    pub fn new(stream: impl Stream + 'static) -> Self {
        Self {
            stream: Box::new(stream),
            bytes: vec![0; RECEIVE].into(),
            decoder: Decoder::default(),
            out: Vec::new(),
            heard: Instant::now(),
            messages: PhantomData,
        }
    }

    /// When bytes came last: a large message may take long, which is not silence.
    pub fn heard(&self) -> Instant {
        self.heard
    }

    /// The next message. May be dropped: nothing is lost.
    ///
    /// # Errors
    /// The connection is over.
    pub async fn receive(&mut self) -> Result<In, LinkError> {
        loop {
            if let Some(message) = self.decoder.take()? {
                return Ok(message);
            }
            let received = self.stream.read(&mut self.bytes).await?;
            self.received(received)?;
        }
    }

    /// Sends a message. Receives meanwhile: two sides that both only wrote would wait for ever.
    ///
    /// # Errors
    /// The connection is over.
    pub async fn send(&mut self, message: impl Into<Out>) -> Result<(), LinkError> {
        let mut frame = std::mem::take(&mut self.out);
        frame.clear();
        encode(&message.into(), &mut frame);
        let sent = self.send_frame(&frame).await;
        self.out = frame;
        sent
    }

    /// Sends a message that is encoded already.
    ///
    /// # Errors
    /// The connection is over.
    pub async fn send_frame(&mut self, frame: &[u8]) -> Result<(), LinkError> {
        let mut rest = frame;
        while !rest.is_empty() {
            let more = timeout(STUCK, poll_fn(|context| self.exchange(rest, context)));
            rest = &rest[more.await.map_err(|_| LinkError::Stuck)??..];
        }
        let flushed = timeout(STUCK, poll_fn(|context| self.flush(context)));
        flushed.await.map_err(|_| LinkError::Stuck)?
    }

    /// Sends some of the bytes, and receives while that waits.
    fn exchange(
        &mut self,
        bytes: &[u8],
        context: &mut Context<'_>,
    ) -> Poll<Result<usize, LinkError>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if let Poll::Ready(written) = written {
            return Poll::Ready(match written? {
                0 => Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                more => Ok(more),
            });
        }
        self.take_in(context)?;
        Poll::Pending
    }

    fn flush(&mut self, context: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        if let Poll::Ready(flushed) = Pin::new(&mut self.stream).poll_flush(context) {
            return Poll::Ready(flushed.map_err(LinkError::from));
        }
        self.take_in(context)?;
        Poll::Pending
    }

    /// Receives all that is there, as far as there is room.
    fn take_in(&mut self, context: &mut Context<'_>) -> Result<(), LinkError> {
        while self.decoder.waiting() < FRAME_MAX {
            let mut room = ReadBuf::new(&mut self.bytes);
            match Pin::new(&mut self.stream).poll_read(context, &mut room) {
                Poll::Pending => break,
                Poll::Ready(read) => read?,
            }
            let received = room.filled().len();
            self.received(received)?;
        }
        Ok(())
    }

    fn received(&mut self, bytes: usize) -> Result<(), LinkError> {
        if bytes == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        self.decoder.push(&self.bytes[..bytes]);
        self.heard = Instant::now();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use culvert_api::link::{Record, Records};
    use tokio::net::UnixStream;

    use super::*;

    fn records(bytes: usize) -> Records {
        Records { boot: 1, records: vec![Record { json: vec![b'x'; bytes], ..Record::default() }] }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn two_sides_that_both_write_pass_each_other() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut a = Peer::<Records, Records>::new(a);
        let mut b = Peer::<Records, Records>::new(b);
        // Far more than a socket holds.
        let (first, second) = (records(8 << 20), records(5 << 20));
        let of_a = async {
            a.send(first.clone()).await.unwrap();
            assert_eq!(a.receive().await.unwrap(), second);
        };
        let of_b = async {
            b.send(second.clone()).await.unwrap();
            assert_eq!(b.receive().await.unwrap(), first);
        };
        tokio::join!(of_a, of_b);
        drop(a);
        assert!(matches!(b.receive().await, Err(LinkError::Io(_))));
    }
}
