//! Culvert's control plane: users, rules, quotas, logs and statistics in a database, an admin API and a
//! page.

pub mod app;
pub mod auth;
pub mod backup;
pub mod calendar;
pub mod cli;
pub mod config;
pub mod http;
pub mod lease;
pub mod link;
pub mod publish;
pub mod store;
pub mod usage;
