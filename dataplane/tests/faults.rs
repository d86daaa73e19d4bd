//! RELIABILITY C8: a session that panics ends alone. Needs the feature `faults`, in which the sessions of
//! a user named `panic` do.

#![cfg(feature = "faults")]
#![allow(missing_docs, unreachable_pub, dead_code, clippy::unwrap_used)]

#[path = "e2e/support.rs"]
mod support;

use std::{io::ErrorKind, os::unix::net::UnixDatagram, thread, time::Duration};

use culvert_proto::Target;
use support::{PASSWORD, PATIENCE, Setup, await_some, echo, pause, ping};

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

/// In the middle of its relay, with operations under way in both directions.
#[test]
fn a_relay_that_panics_ends_alone_and_gives_back_what_it_had() {
    let limits = "limits = { sessions = 10 }";
    let proxy = Setup::new().user("ann", "").user("panic-relay", limits).start();
    let target = echo();
    let mut running = proxy.tunnel(Some("ann"), target);
    ping(&mut running).unwrap();
    let before = proxy.descriptors();
    for round in 1..=3 {
        // As many as the user may have: those of before are given back.
        let mut doomed: Vec<_> =
            (0..10).map(|_| proxy.tunnel(Some("panic-relay"), target)).collect();
        for stream in &mut doomed {
            let cut = loop {
                if let Err(error) = ping(stream) {
                    break error;
                }
            };
            let kinds = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
            assert!(kinds.contains(&cut.kind()), "{cut}");
        }
        proxy.await_metric("culvert_panics_total", f64::from(round * 10));
        await_some("descriptors back", || (proxy.descriptors() <= before).then_some(()));
        ping(&mut running).unwrap();
    }
    let records = proxy.await_records(30);
    assert!(records.iter().all(|record| record["end"] == "panicked"));
}

/// A worker that does not turn is seen, by who asks and by the supervisor.
#[test]
fn a_stuck_worker_is_no_live_one() {
    let folder = tempfile::tempdir().unwrap();
    let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let path = format!("NOTIFY_SOCKET={}", folder.path().join("notify").display());
    let proxy = Setup::new()
        .user("stall", "")
        .through(&["env", "-u", "WATCHDOG_PID", &path, "WATCHDOG_USEC=300000"])
        .start();
    let heard = || {
        let mut text = [0; 512];
        let length = socket.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..length]).into_owned()
    };
    assert!(heard().contains("READY=1"));
    assert!(heard().contains("WATCHDOG=1"));
    assert_eq!(proxy.admin("/livez").0, 200);
    // Its worker sleeps in the middle of a session.
    let stalled = thread::scope(|scope| {
        let asked = scope.spawn(|| proxy.socks5(Some(("stall", PASSWORD)), &Target::from(echo())));
        await_some("a node that is not alive", || (proxy.admin("/livez").0 == 503).then_some(()));
        socket.set_nonblocking(true).unwrap();
        let mut text = [0; 512];
        while socket.recv(&mut text).is_ok() {}
        pause(Duration::from_secs(1));
        assert!(socket.recv(&mut text).is_err(), "the supervisor was told that all is well");
        socket.set_nonblocking(false).unwrap();
        asked.join().unwrap()
    });
    assert!(stalled.is_ok());
    assert!(heard().contains("WATCHDOG=1"));
    await_some("a node that is alive", || (proxy.admin("/livez").0 == 200).then_some(()));
}
