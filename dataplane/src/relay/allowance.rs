//! What a session may still move: rates today; quotas and leases behind the same call.

use std::{sync::Arc, time::Duration};

use culvert_rt::{Stopped, Watch, sleep};

use crate::{
    ledger::Direction,
    policy::{Bucket, UserUse, clock},
};

/// Longest sleep before the rate is looked at again.
const SLICE: Duration = Duration::from_millis(250);

/// Asked before each receive.
#[derive(Debug, Default)]
pub struct Allowance {
    user: Option<Arc<UserUse>>,
}

impl Allowance {
    /// The allowance of a user's sessions; without a user nothing is limited.
    pub fn new(user: Option<Arc<UserUse>>) -> Self {
        Self { user }
    }

    fn bucket(&self, direction: Direction) -> Option<&Bucket> {
        let user = self.user.as_ref()?;
        let bucket = match direction {
            Direction::Up => &user.up,
            Direction::Down => &user.down,
        };
        (!bucket.is_open()).then_some(bucket)
    }

    /// Whether a direction is limited now.
    #[inline]
    pub fn is_limited(&self, direction: Direction) -> bool {
        self.bucket(direction).is_some()
    }

    /// Asks for up to `want` bytes; waits until some may move.
    ///
    /// # Errors
    /// The session was stopped meanwhile; nothing is owed.
    pub async fn reserve(
        &self,
        direction: Direction,
        want: usize,
        watch: &Watch,
    ) -> Result<usize, Stopped> {
        let Some(bucket) = self.bucket(direction) else { return Ok(want) };
        'again: loop {
            let rate = bucket.rate();
            let grant = bucket.reserve(want as u64, clock());
            let mut pause = grant.pause;
            while !pause.is_zero() {
                let slice = pause.min(SLICE);
                if let Err(stopped) = watch.guard(sleep(slice)).await {
                    bucket.give_back(grant.units);
                    return Err(stopped);
                }
                // A changed rate has forgotten this grant.
                if bucket.rate() != rate {
                    continue 'again;
                }
                pause -= slice;
            }
            return Ok(grant.units as usize);
        }
    }

    /// Returns bytes that were granted and not moved.
    pub fn unused(&self, direction: Direction, bytes: usize) {
        if let Some(bucket) = self.bucket(direction) {
            bucket.give_back(bytes as u64);
        }
    }
}
