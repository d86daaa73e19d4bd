//! Culvert's control plane: users, rules, quotas, logs and statistics in a database, an admin API and a
//! page. This version serves its health only; nodes follow their own files.

pub mod app;
pub mod cli;
