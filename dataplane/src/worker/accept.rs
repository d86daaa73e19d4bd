//! The accept loop: by readiness, in batches, and what is asked of a client before it costs anything.

use std::rc::Rc;

use culvert_rt::{Accepted, Listener, either, spawn, take_turns};

use super::Worker;
use crate::{
    policy::{Held, Snapshot, TableError, client_key, clock},
    session::{self, Place},
    settings::ListenerRules,
    telemetry::TurnedAway,
};

/// Clients accepted before other tasks get their turn.
const BATCH: usize = 64;

/// Accepts until the node drains.
pub(super) async fn run(worker: Rc<Worker>, listener: Listener, index: usize) {
    let mut draining = Box::pin({
        let signal = worker.draining.clone();
        async move { signal.wait().await }
    });
    loop {
        let ready = Box::pin(listener.readable());
        let drained = either(ready, draining.as_mut()).await;
        let exhausted = accept_batch(&worker, &listener, index);
        if drained {
            return;
        }
        if exhausted {
            worker.counters.accept_exhausted.add(1);
            listener.back_off().await;
        }
        take_turns().await;
    }
}

/// Accepts what is in the queue; whether it failed for want of descriptors or memory.
fn accept_batch(worker: &Rc<Worker>, listener: &Listener, index: usize) -> bool {
    for _ in 0..BATCH {
        match listener.accept() {
            Ok(Some(accepted)) => begin(worker, index, accepted),
            Ok(None) => return false,
            Err(error) => {
                tracing::debug!(%error, "accept failed");
                return true;
            }
        }
    }
    false
}

fn begin(worker: &Rc<Worker>, index: usize, accepted: Accepted) {
    let snapshot = worker.snapshot();
    let Some(rules) = snapshot.settings.listeners.get(index) else { return };
    match admit(worker, &snapshot, rules, &accepted) {
        Ok(place) => spawn(session::run(worker.clone(), (index, rules.clone()), accepted, place)),
        Err(reason) => worker.counters.turned_away[reason as usize].add(1),
    }
}

/// Whether a client gets a session, before a byte of it is read.
fn admit(
    worker: &Worker,
    snapshot: &Snapshot,
    rules: &ListenerRules,
    accepted: &Accepted,
) -> Result<Place, TurnedAway> {
    let client = accepted.peer.ip();
    if !rules.admits(client) || !snapshot.admits(client) {
        return Err(TurnedAway::Address);
    }
    if worker.is_draining() {
        return Err(TurnedAway::Draining);
    }
    let now = clock();
    let address = hold_address(worker, client, snapshot.settings.address, now)?;
    let hasty = !worker.shared.everyone.begin_session(now);
    let node = worker.shared.places.take(hasty).ok_or(TurnedAway::Node)?;
    Ok(Place { address, node })
}

fn hold_address(
    worker: &Worker,
    client: std::net::IpAddr,
    limits: crate::settings::AddressLimits,
    now: u64,
) -> Result<Held, TurnedAway> {
    let (table, key) = (&worker.shared.addresses, client_key(client));
    let held = table.hold(key, limits.sessions, now).map_err(|error| match error {
        TableError::Limit | TableError::Full => TurnedAway::AddressSessions,
    })?;
    const SECOND: u64 = 1_000_000_000;
    match SECOND.checked_div(limits.new_sessions_per_second.into()) {
        Some(price) if !table.spend(key, price, SECOND, now) => Err(TurnedAway::AddressRate),
        _ => Ok(held),
    }
}
