//! A node that drains while its successor runs is one node with two boots.

use std::{
    io::{Read, Write},
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    accounting::transfer,
    support::{Planes, await_cut, await_some, echo, on_each, pause, ping},
};

/// The sessions of a user, as their numbers.
fn online(planes: &Planes, user: &str) -> Vec<String> {
    let list = planes.must("GET", &format!("/online?user_id={user}"), Value::Null);
    let ids = list["items"].as_array().unwrap().iter();
    ids.map(|item| item["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn two_boots_of_a_node_are_counted_listed_and_ended_apart() {
    const QUOTA: u64 = 40_000_000;
    on_each(|planes| {
        let target = echo();
        let limits = json!({ "quota_bytes": QUOTA, "quota_period": "total" });
        let id = planes.user("ann", json!({ "limits": limits }));
        let old = planes.boot("edge", 1);
        let mut streams = [(); 2].map(|()| await_some("tunnel", || old.tunnel("ann", target).ok()));
        streams.iter_mut().for_each(|stream| ping(stream).unwrap());
        let mut moved = 16;

        // The first drains, but for what runs; the second is the node from now on.
        let nodes = planes.must("GET", "/proxy/nodes", Value::Null);
        let node = nodes["items"][0]["id"].as_str().unwrap();
        planes.must("POST", &format!("/proxy/nodes/{node}/drain"), Value::Null);
        old.program.await_line("draining");
        let new = planes.boot("edge", 2);
        let mut third = await_some("tunnel", || new.tunnel("ann", target).ok());
        ping(&mut third).unwrap();
        moved += 8;
        let listed = await_some("three sessions", || {
            let listed = online(&planes, &id);
            (listed.len() == 3).then_some(listed)
        });
        let nodes = planes.must("GET", "/proxy/nodes", Value::Null);
        assert_eq!((&nodes["total"], &nodes["items"][0]["online"]), (&json!(1), &json!(true)));

        // Both count for the one quota, and each ends only its own sessions.
        streams.iter_mut().for_each(|stream| ping(stream).unwrap());
        moved += 16 + transfer(&new, "ann", target, 3_000_000);
        await_some("bytes", || (planes.used(&id) == moved).then_some(()));
        let boot = |id: &String| id.split('-').nth(1).unwrap().to_owned();
        let newest: Vec<&String> = listed
            .iter()
            .filter(|id| listed.iter().filter(|n| boot(n) == boot(id)).count() == 1)
            .collect();
        assert_eq!(newest.len(), 1, "{listed:?}");
        planes.must("DELETE", &format!("/online/{}", newest[0]), Value::Null);
        await_cut(&mut third);
        streams.iter_mut().for_each(|stream| ping(stream).unwrap());
        moved += 16;
        await_some("two sessions", || (online(&planes, &id).len() == 2).then_some(()));

        // The old boot ends with its last session; what it held of the quota is the new one's.
        drop(streams);
        old.program.await_line("drained");
        await_some("none", || online(&planes, &id).is_empty().then_some(()));
        let mut rest = await_some("tunnel", || new.tunnel("ann", target).ok());
        await_some("one session", || (online(&planes, &id).len() == 1).then_some(()));
        let left = QUOTA - moved;
        let mut buffer = vec![7; 100_000];
        let mut sent = 0;
        while sent < left && rest.write_all(&buffer).is_ok() {
            sent += 100_000;
            if rest.read_exact(&mut buffer).is_err() {
                break;
            }
            sent += 100_000;
        }
        await_some("all of it", || (planes.used(&id) >= QUOTA).then_some(()));
        pause(Duration::from_millis(1500));
        assert_eq!(planes.used(&id), QUOTA);
    });
}
