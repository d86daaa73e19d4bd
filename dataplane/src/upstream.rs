//! Ways to a target. Today one: resolve and dial directly.

mod dial;
mod names;
mod resolver;

pub use dial::{Dialled, dial};
pub use names::{Names, order};
pub use resolver::{Answer, LOOKUPS_MAX, LookupError, Resolver, ResolverOptions};
