//! Reports in any order, from many writers: each is applied once.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use culvert_api::link;
use culvert_control::{store::Store, usage};
use serde_json::json;

use crate::{
    database::{client, sql},
    support::{Over, Planes, on_own_server, on_server, rounds},
};

/// RELIABILITY D2: reports of many boots that are lost, repeated, late and cut short in any order add up to
/// what was moved. A soak applies a million.
#[test]
fn reports_in_any_order_add_up() {
    const BOOTS: usize = 6;
    const USERS: usize = 5;
    type Sums = [[u64; 2]; USERS];
    #[derive(Default)]
    struct Boot {
        sums: Sums,
        acknowledged: Sums,
        sequence: u64,
        /// On their way, each with the sums it was made of.
        up: Vec<(link::Report, Sums)>,
    }
    impl Boot {
        /// What is not acknowledged.
        fn report(&mut self, boot: usize) -> link::Report {
            self.sequence += 1;
            let told = |user: &usize| self.sums[*user] != self.acknowledged[*user];
            let usage = |user: usize| {
                let [up, down] = self.sums[user];
                link::Usage { user: user as u64 + 1, up, down, held: None }
            };
            link::Report {
                boot: boot as u64 + 1,
                sequence: self.sequence,
                users: (0..USERS).filter(told).map(usage).collect(),
                ..link::Report::default()
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let sqlite = format!("sqlite://{}?mode=rwc", folder.path().join("culvert.db").display());
    let mut urls = vec![sqlite];
    on_server(|url, _| urls.push(url));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let play = async |url: &str| {
        let store = Store::connect(url, 1).await.unwrap();
        store.migrate().await.unwrap();
        let mut dice = 0x9e37_79b9_7f4a_7c15_u64;
        let mut below = |bound: usize| {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (dice >> 33) as usize % bound
        };
        let mut boots: Vec<Boot> = (0..BOOTS).map(|_| Boot::default()).collect();
        // Two boots a node.
        let node = |boot: usize| boot as i64 / 2 + 1;
        let mut applied = 0;
        while applied < rounds(2_000, 500_000) {
            let number = below(BOOTS);
            let boot = &mut boots[number];
            match below(4) {
                0 => boot.sums[below(USERS)][below(2)] += below(1_000_000) as u64,
                1 => {
                    let report = boot.report(number);
                    boot.up.push((report, boot.sums));
                }
                // One of those on their way comes: in no order, and perhaps again.
                _ if !boot.up.is_empty() => {
                    let which = below(boot.up.len());
                    let (report, sums) = boot.up[which].clone();
                    usage::apply(&store, node(number), &report).await.unwrap();
                    applied += 1;
                    if below(10) >= 3 {
                        boot.up.swap_remove(which);
                    }
                    // Its acknowledgement may be lost.
                    if report.sequence == boot.sequence && below(10) >= 3 {
                        boot.acknowledged = sums;
                    }
                    // A new connection: what is on its way is lost, and what was acknowledged is told anew.
                    if below(20) == 0 {
                        boot.up.clear();
                        boot.acknowledged = Sums::default();
                    }
                }
                _ => {}
            }
        }
        for (number, boot) in boots.iter_mut().enumerate() {
            boot.acknowledged = Sums::default();
            let last = link::Report { last: true, ..boot.report(number) };
            usage::apply(&store, node(number), &last).await.unwrap();
        }
        let truth = [0, 1].map(|way| {
            let sums = boots.iter().flat_map(|boot| boot.sums.iter().map(move |sum| sum[way]));
            sums.sum::<u64>().cast_signed()
        });
        for rows in ["user_usage WHERE period = 0", "node_usage", "traffic_logs"] {
            assert_eq!(usage::sums(store.db(), rows).await.unwrap(), truth, "{rows}");
        }
    };
    for url in urls {
        runtime.block_on(play(&url));
    }
}

/// RELIABILITY D10: writers that meet in the same rows, as nodes of several control planes do.
#[test]
fn reports_that_meet_are_all_applied_once() {
    const WRITERS: u64 = 8;
    const REPORTS: u64 = 60;
    const USERS: u64 = 41;
    let folder = tempfile::tempdir().unwrap();
    let sqlite = format!("sqlite://{}?mode=rwc", folder.path().join("culvert.db").display());
    let mut urls = vec![sqlite];
    on_server(|url, _| urls.push(url));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    for url in urls {
        runtime.block_on(async {
            // Two control planes of one database.
            let stores =
                [Store::connect(&url, 8).await.unwrap(), Store::connect(&url, 8).await.unwrap()];
            stores[0].migrate().await.unwrap();
            let write = |writer: u64| {
                let store = stores[writer as usize % 2].clone();
                tokio::spawn(async move {
                    for sequence in 1..=REPORTS {
                        // Each writer has its own order, and says everything twice.
                        let usage = |n: u64| link::Usage {
                            user: (n * (2 * writer + 1) + writer) % USERS + 1,
                            up: sequence * 10,
                            down: sequence,
                            held: None,
                        };
                        let users = (0..USERS).map(usage).collect();
                        let report = link::Report {
                            boot: writer + 1,
                            sequence,
                            users,
                            ..Default::default()
                        };
                        for _ in 0..2 {
                            // What the database could not do, the node asks for again.
                            while usage::apply(&store, writer as i64 + 1, &report).await.is_err() {}
                        }
                    }
                })
            };
            let writers: Vec<_> = (0..WRITERS).map(write).collect();
            for writer in writers {
                writer.await.unwrap();
            }
            let [up, down] =
                usage::sums(stores[0].db(), "user_usage WHERE period = 0").await.unwrap();
            let of_each = (WRITERS * USERS * REPORTS) as i64;
            assert_eq!((up, down), (10 * of_each, of_each));
            let minutes = usage::sums(stores[1].db(), "traffic_logs").await.unwrap();
            assert_eq!(minutes, [up, down]);
        });
    }
}

/// How often the server has given up a transaction because two waited for each other.
fn deadlocks(socket: &str) -> u64 {
    let status = "SELECT variable_value FROM information_schema.global_status \
                  WHERE variable_name = 'INNODB_DEADLOCKS'";
    let said = client(socket, status).output().unwrap().stdout;
    String::from_utf8(said).unwrap().trim().parse().unwrap()
}

/// Reports, and edits of the periods that they count for, take their locks in one order; whichever comes first,
/// all that was moved is counted in the new period.
#[test]
fn quotas_are_edited_while_they_are_counted() {
    on_own_server("", |url, socket| {
        let planes = Planes::start(Some(url.to_owned()));
        // One has spent it all the time, the others never.
        let quota = |n: usize| [1, 1_u64 << 40, 1 << 40][n];
        let user = |n: usize| {
            let limits = json!({ "quota_bytes": quota(n), "quota_period": "week" });
            planes.user(["ann", "bob", "eve"][n], json!({ "limits": limits }))
        };
        let ids = [user(0), user(1), user(2)];
        let users = ids.each_ref().map(|id| id.parse::<u64>().unwrap());
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let store = runtime.block_on(Store::connect(url, 2)).unwrap();
        let over = AtomicBool::new(false);
        let reports = thread::scope(|scope| {
            let until = Over(&over);
            let write = |boot: u64, whose: &'static [usize]| {
                let (over, store, runtime, ids) = (&over, &store, &runtime, &users);
                scope.spawn(move || {
                    let mut sequence = 0;
                    while !over.load(Relaxed) {
                        sequence += 1;
                        let usage = |n: &usize| link::Usage {
                            user: ids[*n],
                            up: sequence,
                            down: 0,
                            held: None,
                        };
                        let users = whose.iter().map(usage).collect();
                        let report = link::Report { boot, sequence, users, ..Default::default() };
                        runtime.block_on(usage::apply(store, 1, &report)).unwrap();
                    }
                    sequence
                })
            };
            let writers = [write(1, &[0]), write(2, &[1, 2]), write(3, &[2, 1])];
            for n in 0..rounds(60, 1000) {
                let period = ["month", "week"][n % 2];
                for (who, id) in ids.iter().enumerate().skip(n % 2) {
                    let limits = json!({ "quota_bytes": quota(who), "quota_period": period });
                    planes.must("PATCH", &format!("/users/{id}"), json!({ "limits": limits }));
                }
                let zone = ["Europe/Berlin", "UTC"][n % 2];
                planes.must("PATCH", "/settings", json!({ "time_zone": zone }));
            }
            drop(until);
            writers.map(|writer| writer.join().unwrap())
        });
        assert_eq!(deadlocks(socket), 0);
        let [first, second, third] = reports;
        for (id, moved) in ids.iter().zip([first, second + third, second + third]) {
            let usage = planes.must("GET", &format!("/users/{id}/usage"), serde_json::Value::Null);
            assert_eq!((&usage["up"], &usage["used"]), (&json!(moved), &json!(moved)), "{usage}");
        }
    });
}

/// RELIABILITY D10 with deadlocks of the server's own: somebody takes the same rows' locks in the other order
/// and has so much at stake that the reports are given up.
#[test]
fn reports_that_the_server_gives_up_are_applied_once() {
    const USERS: u64 = 41;
    on_server(|url, socket| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let store = runtime.block_on(async {
            let store = Store::connect(&url, 8).await.unwrap();
            store.migrate().await.unwrap();
            store
        });
        let name = url.split('?').next().unwrap().rsplit('/').next().unwrap();
        let report = |writer: u64, sequence: u64| link::Report {
            boot: writer + 1,
            sequence,
            users: (1..=USERS)
                .map(|user| link::Usage { user, up: sequence * 10, down: sequence, held: None })
                .collect(),
            ..Default::default()
        };
        runtime.block_on(usage::apply(&store, 1, &report(0, 1))).unwrap();
        let (before, reports) = (deadlocks(socket), rounds(40, 1250) as u64);
        let over = AtomicBool::new(false);
        let own = thread::scope(|scope| {
            let until = Over(&over);
            let rival = scope.spawn(|| {
                let weight = "CREATE TABLE weight (n INT)";
                sql(socket, &format!("USE {name}; {weight}"));
                let contend = format!(
                    "USE {name}; BEGIN; INSERT INTO weight SELECT seq FROM seq_1_to_5000; \
                     UPDATE user_usage SET up = up WHERE user_id = {USERS} AND period = 0; \
                     DO SLEEP(0.02); \
                     UPDATE user_usage SET up = up WHERE user_id = 1 AND period = 0; ROLLBACK"
                );
                let mut lost = 0;
                while !over.load(Relaxed) {
                    lost += u64::from(!client(socket, &contend).status().unwrap().success());
                }
                lost
            });
            let writers: Vec<_> = (0..8)
                .map(|writer| {
                    let store = store.clone();
                    runtime.spawn(async move {
                        for sequence in 2..=reports {
                            let report = report(writer, sequence);
                            while usage::apply(&store, writer as i64 + 1, &report).await.is_err() {}
                        }
                    })
                })
                .collect();
            writers.into_iter().for_each(|writer| runtime.block_on(writer).unwrap());
            drop(until);
            rival.join().unwrap()
        });
        let met = deadlocks(socket) - before;
        assert!(met > own, "of {met} deadlocks the rival lost {own}");
        let sums = usage::sums(store.db(), "user_usage WHERE period = 0");
        let [up, down] = runtime.block_on(sums).unwrap();
        let of_each = (8 * USERS * reports) as i64;
        assert_eq!((up, down), (10 * of_each, of_each));
    });
}
