//! A fleet that asks, moves, reports and gives back in any order.

use std::collections::VecDeque;

use sea_orm::ActiveModelTrait;

use super::*;
use crate::{
    app, http,
    store::{
        Command, entity,
        tests::{new_store, servers},
    },
    usage,
};

const QUOTA: i64 = 50_000_000;

/// What goes up, in order.
enum Said {
    Ask,
    Report { moved: i64, held: Option<i64>, sequence: u64 },
}

/// A node, as `link::Follower` and `ledger::Lease` of the data plane behave, and its connection, as the
/// `Hub` does.
#[derive(Default)]
struct Node {
    boot: Boot,
    limit: i64,
    moved: i64,
    held: Option<i64>,
    sequence: u64,
    up: VecDeque<Said>,
    down: VecDeque<link::Lease>,
    /// The plane has taken some back and waits to be told.
    taken_back: bool,
}

impl Node {
    fn report(&mut self) {
        self.sequence += 1;
        let (moved, held, sequence) = (self.moved, self.held, self.sequence);
        self.up.push_back(Said::Report { moved, held, sequence });
    }

    fn ask(&mut self) {
        if self.held.is_none() {
            self.up.push_back(Said::Ask);
        }
    }

    /// What was on its way either way is lost; the plane knows nothing of the connection before.
    fn reconnect(&mut self) {
        self.up.clear();
        self.down.clear();
        self.taken_back = false;
    }

    fn heard(&mut self, lease: &link::Lease) {
        let limit = lease.limit.cast_signed();
        if lease.taken_back {
            self.limit = self.limit.min(limit).max(self.moved);
            self.held = Some(self.limit);
        } else if self.held.is_none() {
            self.limit = self.limit.max(limit);
        }
    }
}

struct Fleet {
    store: Store,
    user: i64,
    nodes: Vec<Node>,
    command: i64,
    _folder: tempfile::TempDir,
}

impl Fleet {
    /// With a database of its own.
    async fn new(server: Option<&str>, nodes: usize) -> Self {
        let (store, folder) = new_store(server).await;
        let mut row = app::new_user("ann", "-", "user");
        row.quota_bytes = Set(Some(QUOTA));
        row.quota_period = Set(Some("total".into()));
        let user = row.insert(store.db()).await.unwrap().id;
        let mut fleet = Self { store, user, nodes: Vec::new(), command: 0, _folder: folder };
        for number in 0..nodes {
            // The second boot of one is that of a node whose first drains.
            let boot = match number {
                1 => (fleet.nodes[0].boot.0, 8),
                _ => {
                    let transaction = fleet.store.db().begin().await.unwrap();
                    let name = format!("node {number}");
                    let (row, _) = http::add_node(&transaction, &name, "").await.unwrap();
                    transaction.commit().await.unwrap();
                    (row.id, 7)
                }
            };
            let row = boots::ActiveModel {
                node_id: Set(boot.0),
                boot: Set(boot.1),
                sequence: Set(-1),
                uncertain: Set(0),
                ended: Set(false),
                command: Set(0),
                seen_at: Set(now()),
            };
            boots::Entity::insert(row).exec_without_returning(fleet.store.db()).await.unwrap();
            fleet.nodes.push(Node { boot, ..Node::default() });
        }
        fleet
    }

    /// The plane takes in the next of what a node has said.
    async fn hear(&mut self, node: usize) {
        let (store, user, node) = (&self.store, self.user, &mut self.nodes[node]);
        match node.up.pop_front() {
            Some(Said::Ask) if !node.taken_back => {
                let (granted, _) = grant(store, node.boot, &[user.cast_unsigned()]).await.unwrap();
                node.down.extend(granted.leases);
            }
            Some(Said::Report { moved, held, sequence }) => {
                let said = link::Usage {
                    user: user.cast_unsigned(),
                    up: moved.cast_unsigned(),
                    down: 0,
                    held: held.map(i64::cast_unsigned),
                };
                let said = link::Report {
                    boot: node.boot.1.cast_unsigned(),
                    sequence,
                    users: vec![said],
                    ..link::Report::default()
                };
                usage::apply(store, node.boot.0, &said).await.unwrap();
                node.taken_back &= held.is_none();
                // The acknowledgement; it comes after what was sent before.
                if held.is_some() && node.held == held && node.down.is_empty() {
                    node.held = None;
                }
            }
            _ => {}
        }
    }

    /// The plane passes on what was asked of nodes.
    async fn pass_on(&mut self) {
        let rows = entity::command::Entity::find()
            .filter(entity::command::Column::Id.gt(self.command))
            .all(self.store.db())
            .await
            .unwrap();
        for row in rows {
            self.command = self.command.max(row.id);
            assert_eq!(Command::of(&row), Some(Command::TakeBack));
            let node =
                self.nodes.iter_mut().find(|node| node.boot == (row.node_id, row.boot)).unwrap();
            let lower =
                take_back(&self.store, node.boot, row.argument.cast_unsigned()).await.unwrap();
            if !lower.leases.is_empty() && !std::mem::replace(&mut node.taken_back, true) {
                node.down.extend(lower.leases);
            }
        }
    }

    fn moved(&self) -> i64 {
        self.nodes.iter().map(|node| node.moved).sum()
    }
}

/// xorshift: the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[tokio::test]
async fn no_order_of_messages_gives_a_byte_twice() {
    for (server, seed) in
        servers().flat_map(|server| (1..=6).map(move |seed| (server.clone(), seed)))
    {
        let mut fleet = Fleet::new(server.as_deref(), 4).await;
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        for _ in 0..600 {
            let node = dice.below(4) as usize;
            match dice.below(33) / 4 {
                0 | 1 => {
                    let node = &mut fleet.nodes[node];
                    let left = (node.limit - node.moved).max(0);
                    node.moved += dice.below(left.unsigned_abs() / 2 + 1).cast_signed();
                }
                2 => fleet.nodes[node].report(),
                3 => fleet.nodes[node].ask(),
                4 | 5 => fleet.hear(node).await,
                6 => {
                    if let Some(lease) = fleet.nodes[node].down.pop_front() {
                        fleet.nodes[node].heard(&lease);
                    }
                }
                7 => fleet.pass_on().await,
                _ => fleet.nodes[node].reconnect(),
            }
            let moved = fleet.moved();
            assert!(moved <= QUOTA, "seed {seed}: {moved}");
        }
        // One that goes on alone gets all that the others have not moved.
        for _ in 0..200 {
            let node = &mut fleet.nodes[0];
            node.moved = node.moved.max(node.limit);
            for node in &mut fleet.nodes {
                while let Some(lease) = node.down.pop_front() {
                    node.heard(&lease);
                }
                node.report();
            }
            fleet.nodes[0].ask();
            for node in 0..4 {
                while !fleet.nodes[node].up.is_empty() {
                    fleet.hear(node).await;
                }
            }
            fleet.pass_on().await;
        }
        assert_eq!(fleet.moved(), QUOTA, "seed {seed}");
    }
}

/// A lease is kept as long as its boot is heard of, however long ago it was granted.
#[tokio::test]
async fn only_leases_of_boots_that_are_gone_are_deleted() {
    for server in servers() {
        leases_of_gone_boots_are_deleted(Fleet::new(server.as_deref(), 2).await).await;
    }
}

async fn leases_of_gone_boots_are_deleted(fleet: Fleet) {
    let (db, users) = (fleet.store.db(), [fleet.user.cast_unsigned()]);
    for node in &fleet.nodes {
        grant(&fleet.store, node.boot, &users).await.unwrap();
    }
    let old = lease::Entity::update_many().col_expr(lease::Column::UpdatedAt, 0.into());
    old.exec(db).await.unwrap();
    let before = now() - 60_000_000;
    clean(db, before).await.unwrap();
    assert_eq!(lease::Entity::find().all(db).await.unwrap().len(), 2);
    let gone = boots::Entity::update_many().col_expr(boots::Column::SeenAt, 0.into());
    gone.filter(boots::Column::Boot.eq(7)).exec(db).await.unwrap();
    clean(db, before).await.unwrap();
    let left = lease::Entity::find().all(db).await.unwrap();
    assert_eq!(left.iter().map(|row| row.boot).collect::<Vec<_>>(), [8]);
}
