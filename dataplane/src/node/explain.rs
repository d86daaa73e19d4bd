//! What would be decided of a request that nobody has made.

use std::{net::IpAddr, sync::Arc};

use culvert_api::link::{Explain, Explained};
use culvert_proto::{Host, Name, Protocol, Target};
use tokio::sync::oneshot;

use super::Node;
use crate::{
    policy::{Decision, Denial, Match, Query},
    worker::unix_now,
};

/// Names of one request that are resolved: the target and what it is redirected to.
const NAMES_MAX: usize = 4;

impl Node {
    /// Judges a request by the snapshot in force, resolving as a session would.
    pub(crate) async fn explain(&self, question: &Explain) -> Explained {
        let filtered = match Target::parse(question.target.as_bytes()) {
            Ok(target) => self.is_filtered(&target).await,
            Err(_) => false,
        };
        let explained = self.judge_question(question).await;
        let explained = explained.unwrap_or_else(|problem| Explained {
            problem: problem.to_owned(),
            ..Explained::default()
        });
        Explained { id: question.id, filtered, ..explained }
    }

    /// Whether the black list has a target, whoever asks for it.
    async fn is_filtered(&self, target: &Target) -> bool {
        let snapshot = self.shared.snapshot.load_full();
        match &target.host {
            Host::Ip(ip) => snapshot.filter(target, Some(ip.to_canonical())) == Match::Yes,
            Host::Name(name) => match snapshot.filter(target, None) {
                Match::NeedsAddress => {
                    let addresses = self.resolve(name.clone()).await;
                    addresses.is_some_and(|addresses| {
                        let filtered = |ip: &IpAddr| {
                            snapshot.filter(target, Some(ip.to_canonical())) == Match::Yes
                        };
                        addresses.iter().any(filtered)
                    })
                }
                known => known == Match::Yes,
            },
        }
    }

    async fn judge_question(&self, question: &Explain) -> Result<Explained, &'static str> {
        let snapshot = self.shared.snapshot.load_full();
        let client: IpAddr = question.client.parse().map_err(|_| "the client is no address")?;
        let known = Protocol::ALL.into_iter();
        let protocol = known.into_iter().find(|known| known.name() == question.protocol);
        let protocol = protocol.ok_or("the protocol is socks5, socks4 or http")?;
        let target =
            Target::parse(question.target.as_bytes()).map_err(|_| "the target is host:port")?;
        let user = match question.user.as_str() {
            "" => None,
            name => match snapshot.directory.find(name.as_bytes()) {
                Some(user) => Some(user),
                None => return Ok(denied(Denial::User.name(), "")),
            },
        };
        let query = Query { user, client, protocol, target: &target, at: unix_now() };
        let mut resolved: Vec<(Name, Arc<[IpAddr]>)> = Vec::new();
        loop {
            match snapshot.authorize(query, &resolved, unix_now()) {
                Decision::Permit(permit) => {
                    return Ok(Explained {
                        allowed: true,
                        rule: permit.rule().map(|rule| rule.to_string()).unwrap_or_default(),
                        addresses: permit.addresses().iter().map(ToString::to_string).collect(),
                        ..Explained::default()
                    });
                }
                Decision::Denied(denial) => {
                    let rule = match &denial {
                        Denial::Rule(rule) => rule,
                        _ => "",
                    };
                    return Ok(denied(denial.name(), rule));
                }
                Decision::NeedsAddresses(name) if resolved.len() < NAMES_MAX => {
                    match self.resolve(name.clone()).await {
                        Some(addresses) => resolved.push((name, addresses)),
                        None => return Ok(denied("unresolved", "")),
                    }
                }
                Decision::NeedsAddresses(_) => return Err("too many names"),
            }
        }
    }

    async fn resolve(&self, name: Name) -> Option<Arc<[IpAddr]>> {
        let (sender, answer) = oneshot::channel();
        let asked = self.shared.resolver.ask(
            name,
            Box::new(move |_, answer| {
                let _ = sender.send(answer.addresses.ok());
            }),
        );
        if asked { answer.await.ok().flatten() } else { None }
    }
}

fn denied(reason: &str, rule: &str) -> Explained {
    Explained { reason: reason.to_owned(), rule: rule.to_owned(), ..Explained::default() }
}
