//! Dialling the addresses of a permit, one after the other or racing (RFC 8305).

use std::{
    future::{Future, poll_fn},
    net::{IpAddr, SocketAddr},
    pin::Pin,
    task::Poll,
    time::Duration,
};

use culvert_rt::{ConnectOptions, Socket, connect, sleep};

use crate::{end::Cause, policy::Permit};

/// Pause before the next address is tried beside those under way (RFC 8305 section 5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Attempts under way at once; the descriptors a session may take while it dials.
const ATTEMPTS_MAX: usize = 3;

/// A connection to a target.
pub struct Dialled {
    /// The connection.
    pub socket: Socket,
    /// Which of the permit's addresses answered.
    pub address: SocketAddr,
}

/// Dials what a permit allows. The deadline is the caller's; dropping the future closes what is under
/// way.
///
/// # Errors
/// Why no address answered: the cause of the last failure that says most.
pub async fn dial(permit: &Permit) -> Result<Dialled, Cause> {
    let egress = permit.egress();
    let reached: Vec<SocketAddr>;
    let addresses = match egress {
        None => permit.addresses(),
        // Who leaves from an address of one family reaches none of the other.
        Some(egress) => {
            let same = permit.addresses().iter().copied();
            reached = same.filter(|address| address.is_ipv4() == egress.is_ipv4()).collect();
            &reached
        }
    };
    match addresses {
        [] => Err(Cause::NetworkUnreachable),
        [address] => one(*address, egress).await,
        addresses => race(addresses, egress).await,
    }
}

async fn one(address: SocketAddr, egress: Option<IpAddr>) -> Result<Dialled, Cause> {
    let socket = connect(address, ConnectOptions { bind: egress, mark: None }).await;
    let socket = socket.map_err(|error| Cause::of_dial(&error))?;
    Ok(Dialled { socket, address })
}

type Attempt = Pin<Box<dyn Future<Output = Result<Dialled, Cause>>>>;

async fn race(addresses: &[SocketAddr], egress: Option<IpAddr>) -> Result<Dialled, Cause> {
    let mut waiting = addresses.iter().copied();
    let mut under_way: Vec<Attempt> = Vec::new();
    let mut pause: Option<Pin<Box<dyn Future<Output = ()>>>> = None;
    let mut failure = Cause::Unresolved;
    poll_fn(move |cx| {
        loop {
            while pause.as_mut().is_none_or(|pause| pause.as_mut().poll(cx).is_ready()) {
                pause = None;
                let Some(address) = waiting.next() else { break };
                if under_way.len() == ATTEMPTS_MAX {
                    // The one that has been silent longest makes room; its time is up soon anyway.
                    drop(under_way.remove(0));
                    failure = worse(failure, Cause::ConnectTimeout);
                }
                under_way.push(Box::pin(one(address, egress)));
                pause = Some(sleep(ATTEMPT_DELAY));
            }
            if under_way.is_empty() {
                return Poll::Ready(Err(failure));
            }
            let mut failed = false;
            let mut index = 0;
            while index < under_way.len() {
                match under_way[index].as_mut().poll(cx) {
                    Poll::Ready(Ok(dialled)) => return Poll::Ready(Ok(dialled)),
                    Poll::Ready(Err(cause)) => {
                        drop(under_way.remove(index));
                        failure = worse(failure, cause);
                        failed = true;
                    }
                    Poll::Pending => index += 1,
                }
            }
            if !failed {
                return Poll::Pending;
            }
            // A failure lets the next address be tried at once.
            pause = None;
        }
    })
    .await
}

/// Of two failures, the one that tells the client more: somebody who refused is nearer than nobody.
fn worse(before: Cause, now: Cause) -> Cause {
    let rank = |cause| match cause {
        Cause::Refused => 4,
        Cause::ConnectTimeout => 3,
        Cause::HostUnreachable => 2,
        Cause::Unresolved => 0,
        _ => 1,
    };
    if rank(now) >= rank(before) { now } else { before }
}
