//! A worker's names: its cache, and lookups under way that several sessions may share.

use std::{
    cell::RefCell,
    collections::HashMap,
    net::IpAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use culvert_proto::Name;
use culvert_rt::Signal;

use super::{Answer, LookupError, Resolver};
use crate::{settings::Prefer, telemetry::WorkerCounters};

/// Names one worker keeps (about 1 MiB); the one asked for longest ago makes room.
const CACHED_MAX: usize = 4096;

/// Addresses of names, for one worker.
pub struct Names {
    resolver: Resolver,
    cache: RefCell<quick_cache::unsync::Cache<Name, Kept>>,
    under_way: RefCell<HashMap<Name, UnderWay>>,
}

/// A lookup that several sessions may wait for. One that was asked for long ago is lost, and asked for
/// again.
type UnderWay = (Instant, Rc<Signal<Answer>>);

/// After that an answer will not come any more.
const LOST: Duration = Duration::from_secs(30);

#[derive(Clone)]
struct Kept {
    answer: Answer,
    until: Instant,
}

impl Names {
    /// An empty cache in front of a resolver.
    pub fn new(resolver: Resolver) -> Self {
        Self {
            resolver,
            cache: RefCell::new(quick_cache::unsync::Cache::new(CACHED_MAX)),
            under_way: RefCell::default(),
        }
    }

    /// The addresses of a name. `deliver` makes the call that brings an answer back to this worker,
    /// which then calls [`Names::answered`]. Holds nothing; may be dropped.
    ///
    /// # Errors
    /// The name has none, or nobody can tell.
    pub async fn addresses(
        &self,
        name: &Name,
        counters: &WorkerCounters,
        deliver: impl FnOnce() -> Box<dyn FnOnce(Name, Answer) + Send>,
    ) -> Result<std::sync::Arc<[IpAddr]>, LookupError> {
        if let Some(answer) = self.kept(name) {
            counters.dns_cached.add(1);
            return answer.addresses;
        }
        let known = self.under_way.borrow().get(name).cloned();
        let signal = match known {
            Some((asked, signal)) if asked.elapsed() < LOST => signal,
            _ => {
                counters.dns_asked.add(1);
                if !self.resolver.ask(name.clone(), deliver()) {
                    counters.dns_refused.add(1);
                    return Err(LookupError::Failed);
                }
                let signal = Rc::new(Signal::default());
                let asked = (Instant::now(), signal.clone());
                self.under_way.borrow_mut().insert(name.clone(), asked);
                signal
            }
        };
        signal.wait().await.addresses
    }

    fn kept(&self, name: &Name) -> Option<Answer> {
        let cache = self.cache.borrow();
        let kept = cache.get(name)?;
        (Instant::now() < kept.until).then(|| kept.answer.clone())
    }

    /// Takes an answer that came back.
    pub fn answered(&self, name: Name, answer: Answer) {
        if let Some((_, signal)) = self.under_way.borrow_mut().remove(&name) {
            signal.set(answer.clone());
        }
        if answer.ttl > Duration::ZERO {
            let until = Instant::now() + answer.ttl;
            self.cache.borrow_mut().insert(name, Kept { answer, until });
        }
    }
}

/// The order in which addresses are tried: those of the preferred family alone if there are any, or
/// both families in turns, IPv6 first (RFC 8305 section 4).
pub fn order(addresses: &[IpAddr], prefer: Prefer) -> Vec<IpAddr> {
    let (v6, v4): (Vec<IpAddr>, Vec<IpAddr>) = addresses.iter().partition(|ip| ip.is_ipv6());
    match prefer {
        Prefer::Ipv4 if !v4.is_empty() => v4,
        Prefer::Ipv6 if !v6.is_empty() => v6,
        _ => {
            let mut ordered = Vec::with_capacity(addresses.len());
            for i in 0..v6.len().max(v4.len()) {
                ordered.extend(v6.get(i));
                ordered.extend(v4.get(i));
            }
            ordered
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_take_turns() {
        let addresses: Vec<IpAddr> = ["1.1.1.1", "2.2.2.2", "::1", "3.3.3.3", "::2"]
            .map(|text| text.parse().unwrap())
            .into();
        let text = |prefer| {
            order(&addresses, prefer).iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(text(Prefer::Race), "::1 1.1.1.1 ::2 2.2.2.2 3.3.3.3");
        assert_eq!(text(Prefer::Ipv4), "1.1.1.1 2.2.2.2 3.3.3.3");
        assert_eq!(text(Prefer::Ipv6), "::1 ::2");
        assert_eq!(order(&addresses[..1], Prefer::Ipv6).len(), 1);
    }
}
