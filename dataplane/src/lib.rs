//! Culvert's data plane.
pub mod policy;
pub mod settings;
