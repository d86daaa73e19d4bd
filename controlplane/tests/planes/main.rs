//! Both planes as programs: what the API says is what nodes do, and what nodes count is what the
//! database has, whatever is killed. Each test runs on SQLite, and on MariaDB when `TEST_MYSQL` is set.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod accounting;
mod api;
mod boots;
mod clock;
mod database;
mod faults;
mod policy;
mod reports;
mod support;
