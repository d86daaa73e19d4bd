//! The one loop that drives every protocol's handshake.

use std::io;

use culvert_proto::{Handshake, Next, Outcome, Request, http, socks4, socks5};
use culvert_rt::{Buffer, either};

use super::{Kept, Session};
use crate::end::{Cause, End, Stage};

/// After a refusal: how much more of the client is read, so that the answer is not lost to a reset.
const LINGER_BYTES_MAX: usize = 256 * 1024;
/// The same, in time.
const LINGER: std::time::Duration = std::time::Duration::from_secs(1);

impl Session {
    /// Tells the protocol from the first bytes.
    pub(super) async fn detect(&self) -> Result<Box<dyn Handshake>, End> {
        self.receive(&mut None).await?;
        let first = self.early.borrow().first().copied().unwrap_or_default();
        let protocol = culvert_proto::detect(first)
            .filter(|protocol| self.listener.protocols.contains(protocol))
            .ok_or(End::new(Stage::Handshake, Cause::ClientMalformed))?;
        self.protocol.set(Some(protocol));
        self.live.speaks(protocol);
        let login = self.listener.login;
        Ok(match protocol {
            culvert_proto::Protocol::Socks5 => Box::new(socks5::Server::new(login)),
            culvert_proto::Protocol::Socks4 => Box::new(socks4::Server::new()),
            culvert_proto::Protocol::Http => Box::new(http::Server::new(login)),
        })
    }

    /// Drives the handshake to its next request.
    pub(super) async fn negotiate(
        &self,
        handshake: &mut dyn Handshake,
        kept: &mut Option<Kept>,
    ) -> Result<Request, End> {
        let mut begun = self.live.exchanges() == 0;
        let mut logged_in = false;
        loop {
            match handshake.poll() {
                Next::Read => {
                    if self.early.borrow().is_empty() {
                        self.receive(kept).await?;
                    }
                    if !begun {
                        // A further request has begun: from now on it has a handshake's time.
                        begun = true;
                        let timeouts = self.worker.snapshot().settings.timeouts;
                        self.watch.stage(timeouts.handshake, Cause::HandshakeTimeout.code());
                    }
                    self.feed(handshake).await?;
                }
                Next::Write(_) => self.write(handshake).await?,
                Next::Authenticate(credentials) => {
                    let credentials = credentials.clone();
                    logged_in = self.authenticate(handshake, credentials).await?;
                }
                Next::Request(request) => {
                    let request = request.clone();
                    if !logged_in {
                        // Each HTTP request logs in, or is nobody's.
                        self.become_nobody();
                    }
                    let now = std::time::Instant::now();
                    if self.times.requested.replace(Some(now)).is_none() {
                        self.worker.counters.handshake.record(now - self.times.accepted);
                    }
                    return Ok(request);
                }
                Next::Refused(refusal) => {
                    self.linger().await;
                    return Err(self.login_end().unwrap_or(End::of_refusal(refusal)));
                }
                Next::Done => return Err(End::new(Stage::Handshake, Cause::ClientClosed)),
            }
        }
    }

    /// Says how the request went.
    pub(super) async fn tell(
        &self,
        handshake: &mut dyn Handshake,
        outcome: Outcome,
    ) -> Result<(), End> {
        handshake.reply(outcome);
        while let Next::Write(_) = handshake.poll() {
            self.write(handshake).await?;
        }
        Ok(())
    }

    /// Receives once, appending to the early bytes. Holds no buffer while it waits.
    async fn receive(&self, kept: &mut Option<Kept>) -> Result<(), End> {
        loop {
            self.await_client(kept).await?;
            let mut buffer = Buffer::small();
            match self.client.receive(buffer.room()) {
                Ok(0) => return Err(End::new(Stage::Handshake, Cause::ClientClosed)),
                Ok(received) => {
                    buffer.fill(received);
                    self.early.borrow_mut().extend_from_slice(buffer.filled());
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Err(End::new(Stage::Handshake, Cause::ClientReset)),
            }
        }
    }

    /// Waits for the client's next word. A connection that is kept for its next request is closed as soon as it is
    /// of no more use.
    async fn await_client(&self, kept: &mut Option<Kept>) -> Result<(), End> {
        if let Some(held) = kept {
            // Boxed: few sessions keep one, and all wait.
            let spoilt = Box::pin(either(self.client.readable(), held.spoilt()));
            if !self.handshake_wait(async { Ok(spoilt.await) }).await? {
                return Ok(());
            }
            *kept = None;
        }
        self.handshake_wait(self.client.readable()).await
    }

    /// Gives the early bytes to the handshake; what it does not use stays.
    async fn feed(&self, handshake: &mut dyn Handshake) -> Result<(), End> {
        let mut early = self.early.take();
        let result = handshake.handle_input(&early);
        match result {
            Ok(used) => {
                early.drain(..used);
                self.early.replace(early);
                Ok(())
            }
            Err(malformed) => {
                let answered = matches!(handshake.poll(), Next::Write(_));
                while let Next::Write(_) = handshake.poll() {
                    self.write(handshake).await?;
                }
                if answered {
                    self.linger().await;
                }
                Err(End::of_malformed(malformed))
            }
        }
    }

    /// Sends what the handshake has to say.
    async fn write(&self, handshake: &mut dyn Handshake) -> Result<(), End> {
        let Next::Write(bytes) = handshake.poll() else { return Ok(()) };
        match self.client.send_now(bytes) {
            Ok(sent) => handshake.sent(sent),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.handshake_wait(self.client.writable()).await?;
            }
            Err(_) => return Err(End::new(Stage::Handshake, Cause::ClientReset)),
        }
        Ok(())
    }

    async fn handshake_wait<T>(
        &self,
        ready: impl Future<Output = io::Result<T>>,
    ) -> Result<T, End> {
        match self.watch.guard(ready).await {
            Ok(Ok(ready)) => Ok(ready),
            Ok(Err(_)) => Err(End::new(Stage::Handshake, Cause::ClientReset)),
            Err(stopped) => Err(End::new(Stage::Handshake, Cause::of_code(stopped.0))),
        }
    }

    /// Ends our side and reads on for a moment: closing with unread bytes would reset the connection,
    /// and the client might never see why.
    pub(super) async fn linger(&self) {
        if self.client.shutdown_write().is_err() {
            return;
        }
        self.watch.stage(LINGER, Cause::HandshakeTimeout.code());
        let mut left = LINGER_BYTES_MAX;
        while left > 0 && self.handshake_wait(self.client.readable()).await.is_ok() {
            match self.client.receive(Buffer::small().room()) {
                Ok(received) if received > 0 => left = left.saturating_sub(received),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                _ => return,
            }
        }
    }
}
