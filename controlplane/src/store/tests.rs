//! Databases for unit tests.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use sea_orm::ConnectionTrait;

use super::{Store, sqlite_url};

/// SQLite, and the database server of `scripts/mariadb` if there is one.
pub fn servers() -> impl Iterator<Item = Option<String>> {
    std::iter::once(None).chain(std::env::var("TEST_MYSQL").ok().map(Some))
}

/// A new database, and a folder that it may lie in.
pub async fn new_store(server: Option<&str>) -> (Store, tempfile::TempDir) {
    let (url, folder) = new_database(server).await;
    let store = Store::connect(&url, 2).await.unwrap();
    store.migrate().await.unwrap();
    (store, folder)
}

async fn new_database(server: Option<&str>) -> (String, tempfile::TempDir) {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let folder = tempfile::tempdir().unwrap();
    let url = match server {
        None => sqlite_url(folder.path()),
        Some(server) => {
            let name = format!("u{}_{}", std::process::id(), NUMBER.fetch_add(1, Relaxed));
            let db = sea_orm::Database::connect(server).await.unwrap();
            db.execute_unprepared(&format!("CREATE DATABASE {name}")).await.unwrap();
            server.replace("/culvert?", &format!("/{name}?"))
        }
    };
    (url, folder)
}

/// A file that eight make at once is opened by all of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_new_file_may_be_opened_by_many() {
    for _ in 0..30 {
        let (url, _folder) = new_database(None).await;
        let mut opened = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let url = url.clone();
            opened.spawn(async move { Store::connect(&url, 2).await.map(drop) });
        }
        for result in opened.join_all().await {
            result.unwrap();
        }
    }
}

/// Control planes and commands that are first at the same time, and one that was cut short.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn migrations_may_meet_and_go_on() {
    for server in servers() {
        let (url, _folder) = new_database(server.as_deref()).await;
        let migrated = (0..8).map(|_| {
            let url = url.clone();
            tokio::spawn(async move {
                let store = Store::connect(&url, 2).await?;
                store.migrate().await.map(|()| store)
            })
        });
        let migrated: Vec<_> = migrated.collect();
        let mut stores = Vec::new();
        for store in migrated {
            stores.push(store.await.unwrap().unwrap());
        }
        let db = stores[0].db();
        let drop = match server {
            Some(_) => "DROP INDEX users_by_name ON users",
            None => "DROP INDEX users_by_name",
        };
        for sql in [drop, "DELETE FROM seaql_migrations"] {
            db.execute_unprepared(sql).await.unwrap();
        }
        stores[1].migrate().await.unwrap();
        db.execute_unprepared(drop).await.expect("the index is there again");
    }
}
