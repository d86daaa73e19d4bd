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
    let store = Store::connect(&url, 2).await.unwrap();
    store.migrate().await.unwrap();
    (store, folder)
}
