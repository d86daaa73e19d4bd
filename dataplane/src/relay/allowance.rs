//! What a session may still move: rates today; quotas and leases behind the same call.

use std::{sync::Arc, time::Duration};

use culvert_rt::{Stopped, Watch, sleep};

use crate::{
    ledger::Direction,
    policy::{Bucket, UserUse, clock},
};

/// Longest sleep before the rate is looked at again.
const SLICE: Duration = Duration::from_millis(250);

/// Asked before each receive: by what the session's user may use, and by what all may use together.
#[derive(Debug)]
pub struct Allowance {
    user: Option<Arc<UserUse>>,
    everyone: Arc<UserUse>,
}

impl Allowance {
    /// The allowance of a user's sessions, or of nobody's.
    pub fn new(user: Option<Arc<UserUse>>, everyone: Arc<UserUse>) -> Self {
        Self { user, everyone }
    }

    /// The buckets that limit a direction now.
    fn buckets(&self, direction: Direction) -> [Option<&Bucket>; 2] {
        [self.user.as_ref(), Some(&self.everyone)].map(|shared| {
            shared.map(|shared| shared.bucket(direction)).filter(|bucket| !bucket.is_open())
        })
    }

    /// Whether a direction is limited now.
    #[inline]
    pub fn is_limited(&self, direction: Direction) -> bool {
        self.buckets(direction).iter().any(Option::is_some)
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
        let [user, everyone] = self.buckets(direction);
        let mut granted = want as u64;
        if let Some(user) = user {
            granted = reserve(user, granted, watch).await?;
        }
        if let Some(everyone) = everyone {
            let of_all = reserve(everyone, granted, watch).await;
            if let Some(user) = user {
                user.give_back(granted - of_all.as_ref().copied().unwrap_or(0));
            }
            granted = of_all?;
        }
        Ok(granted as usize)
    }

    /// Returns bytes that were granted and not moved.
    pub fn unused(&self, direction: Direction, bytes: usize) {
        for bucket in self.buckets(direction).into_iter().flatten() {
            bucket.give_back(bytes as u64);
        }
    }
}

/// Asks one bucket for up to `want` bytes and waits for them.
async fn reserve(bucket: &Bucket, want: u64, watch: &Watch) -> Result<u64, Stopped> {
    'again: loop {
        let rate = bucket.rate();
        let grant = bucket.reserve(want, clock());
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
        return Ok(grant.units);
    }
}
