//! RELIABILITY C8: a session that panics ends alone. Needs the feature `faults`, in which the sessions of
//! a user named `panic` do.

#![cfg(feature = "faults")]
#![allow(missing_docs, unreachable_pub, dead_code, clippy::unwrap_used)]

#[path = "e2e/support.rs"]
mod support;

use culvert_proto::Target;
use support::{PASSWORD, Setup, echo, ping};

#[test]
fn a_session_that_panics_ends_alone() {
    let proxy = Setup::new().user("ann", "").user("panic", "").start();
    let target = echo();
    let mut running: Vec<_> = (0..100).map(|_| proxy.tunnel(Some("ann"), target)).collect();
    for _ in 0..20 {
        assert_eq!(proxy.socks5(Some(("panic", PASSWORD)), &Target::from(target)).err(), Some(254));
        assert!(proxy.socks5(Some(("ann", PASSWORD)), &Target::from(target)).is_ok());
    }
    for stream in &mut running {
        ping(stream).unwrap();
    }
    assert_eq!(proxy.metric("culvert_panics_total"), 20.0);
    assert_eq!(proxy.metric("culvert_sessions_total{protocol=\"socks5\",end=\"panicked\"}"), 20.0);
    drop(running);
    proxy.await_metric("culvert_sessions_active", 0.0);
}
