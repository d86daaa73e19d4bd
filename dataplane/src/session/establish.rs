//! From a request to a connection: limits, policy, names, dial.

use std::{sync::Arc, time::Instant};

use culvert_proto::{Command, Name, Request};

use super::{Established, Kept, LoggedIn, Record, Session};
use crate::{
    end::{Cause, End, Stage},
    policy::{Decision, Denial, Permit, Query},
    upstream::{Dialled, LookupError, dial, order},
    worker::{Message, unix_now},
};

/// Names one request may need: its own and a redirect's.
const NAMES_MAX: usize = 2;

impl Session {
    /// Judges a request and connects.
    pub(super) async fn establish(
        &self,
        request: &Request,
        record: &mut Record,
        kept: &mut Option<Kept>,
    ) -> Result<Box<Established>, End> {
        self.within_limits()?;
        match request.command {
            Command::Connect | Command::Forward(_) => {}
            Command::Bind | Command::Associate => {
                return Err(End::new(Stage::Policy, Cause::Unsupported));
            }
        }
        #[cfg(feature = "faults")]
        #[allow(clippy::disallowed_methods)]
        match self.user().as_ref().map(|user| &*user.name) {
            Some("panic") => panic!("a fault that a test asked for"),
            Some("stall") => std::thread::sleep(std::time::Duration::from_secs(4)),
            _ => {}
        }
        let started = Instant::now();
        let connect = self.worker.snapshot().settings.timeouts.connect;
        self.watch.stage_interrupts(connect, Cause::ConnectTimeout.code());
        let established = self.connect(request, record, kept).await;
        // The client is to be told, whatever became of the deadline.
        self.watch.clear_interrupt();
        let handshake = self.worker.snapshot().settings.timeouts.handshake;
        self.watch.stage(handshake, Cause::HandshakeTimeout.code());
        self.worker.counters.dial.record(started.elapsed());
        record.dialled(started);
        established
    }

    fn within_limits(&self) -> Result<(), End> {
        if self.refused {
            return Err(End::new(Stage::Policy, Cause::NodeLimit));
        }
        match &*self.login.borrow() {
            Some(LoggedIn { admission: Err(_), .. }) => {
                Err(End::new(Stage::Policy, Cause::UserLimit))
            }
            _ => Ok(()),
        }
    }

    async fn connect(
        &self,
        request: &Request,
        record: &mut Record,
        kept: &mut Option<Kept>,
    ) -> Result<Box<Established>, End> {
        let permit = self.authorize(request, record).await?;
        record.permitted(&permit);
        if let Some(kept) = kept.take().and_then(Kept::take)
            && kept.permit.upstream() == permit.upstream()
            && kept.permit.user().map(|user| user.id) == permit.user().map(|user| user.id)
            && kept.permit.egress() == permit.egress()
            && permit.addresses().contains(&kept.dialled.address)
            && is_quiet(&kept.dialled)
        {
            record.address = Some(kept.dialled.address);
            return Ok(Box::new(Established { permit, dialled: kept.dialled, is_used: true }));
        }
        let dialled = match self.watch.guard(dial(&permit)).await {
            Ok(Ok(dialled)) => dialled,
            Ok(Err(cause)) => return Err(End::new(Stage::Dial, cause)),
            Err(stopped) => return Err(End::new(Stage::Dial, Cause::of_code(stopped.0))),
        };
        record.address = Some(dialled.address);
        Ok(Box::new(Established { permit, dialled, is_used: false }))
    }

    async fn authorize(&self, request: &Request, record: &mut Record) -> Result<Permit, End> {
        let mut resolved: Vec<(Name, Arc<[std::net::IpAddr]>)> = Vec::new();
        loop {
            let snapshot = self.worker.snapshot();
            // The user of the present snapshot, who may have changed since the login.
            let user = match self.user() {
                Some(known) => match snapshot.directory.find(known.name.as_bytes()) {
                    Some(user) if Arc::ptr_eq(&user.credential, &known.credential) => {
                        Some(user.clone())
                    }
                    _ => return Err(self.denied(record, Denial::User)),
                },
                // The listener may take nobody any more.
                None if !self.live.may_be_nobody(&snapshot) => {
                    return Err(self.denied(record, Denial::User));
                }
                None => None,
            };
            let now = unix_now();
            let query = Query {
                user: user.as_ref(),
                client: self.peer.ip(),
                protocol: self.protocol.get().ok_or(End::new(Stage::Policy, Cause::Denied))?,
                target: &request.target,
                at: now,
            };
            match snapshot.authorize(query, &resolved, now) {
                Decision::Permit(permit) => return Ok(permit),
                Decision::Denied(denial) => return Err(self.denied(record, denial)),
                Decision::NeedsAddresses(name) => {
                    if resolved.len() == NAMES_MAX {
                        return Err(self.denied(record, Denial::Default));
                    }
                    let addresses = self.resolve(&name).await?;
                    resolved.push((name, order(&addresses, snapshot.settings.prefer).into()));
                }
            }
        }
    }

    async fn resolve(&self, name: &Name) -> Result<Arc<[std::net::IpAddr]>, End> {
        let sender = self.worker.sender.clone();
        let deliver = || -> Box<dyn FnOnce(Name, crate::upstream::Answer) + Send> {
            Box::new(move |name, answer| {
                let _ = sender.send(Message::Resolved { name, answer });
            })
        };
        let lookup = self.worker.names.addresses(name, &self.worker.counters, deliver);
        let cause = match self.watch.guard(lookup).await {
            Ok(Ok(addresses)) => return Ok(addresses),
            Ok(Err(LookupError::NotFound)) => Cause::Unresolved,
            Ok(Err(LookupError::Failed)) => Cause::DnsFailed,
            Err(stopped) => Cause::of_code(stopped.0),
        };
        Err(End::new(Stage::Dial, cause))
    }

    fn denied(&self, record: &mut Record, denial: Denial) -> End {
        self.worker.counters.denied[denial.index()].add(1);
        record.denied(denial);
        End::new(Stage::Policy, Cause::Denied)
    }
}

/// Whether a kept connection can be used again: the target has neither closed it nor said anything
/// nobody asked for.
fn is_quiet(kept: &Dialled) -> bool {
    let mut byte = [0];
    matches!(kept.socket.receive(&mut byte), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}
