//! What a session may still move: rates, and what is leased of a quota, behind one call.

use std::{cell::Cell, sync::Arc, time::Duration};

use culvert_rt::{Stopped, Watch, sleep};

use crate::{
    end::Cause,
    ledger::{Direction, Reserved, Wanted},
    policy::{Bucket, UserUse, clock},
};

/// Longest sleep before the rate is looked at again.
const SLICE: Duration = Duration::from_millis(250);
/// How often a lease is looked at that has nothing left.
const LEASE_LOOK: Duration = Duration::from_millis(10);
/// How long the control plane may take to grant more, in nanoseconds; then the quota counts as spent.
const LEASE_WAIT: u64 = 10_000_000_000;

/// Asked before each receive: by what the session's user may use, and by what all may use together.
#[derive(Debug)]
pub struct Allowance<'a> {
    user: Option<Arc<UserUse>>,
    everyone: &'a UserUse,
    wanted: &'a Wanted,
    /// What is reserved of the user's lease, both ways.
    reserved: Cell<Reserved>,
}

impl<'a> Allowance<'a> {
    /// The allowance of a user's sessions, or of nobody's.
    pub fn new(user: Option<Arc<UserUse>>, everyone: &'a UserUse, wanted: &'a Wanted) -> Self {
        Self { user, everyone, wanted, reserved: Cell::default() }
    }

    /// The buckets that limit a direction now.
    fn buckets(&self, direction: Direction) -> [Option<&Bucket>; 2] {
        [self.user.as_deref(), Some(self.everyone)].map(|shared| {
            shared.map(|shared| shared.bucket(direction)).filter(|bucket| !bucket.is_open())
        })
    }

    /// Whether a direction has a rate now.
    #[inline]
    pub fn has_rate(&self, direction: Direction) -> bool {
        self.buckets(direction).iter().any(Option::is_some)
    }

    /// The user, if bytes are moved on a lease only.
    #[inline]
    fn metered(&self) -> Option<&Arc<UserUse>> {
        self.user.as_ref().filter(|user| user.lease.epoch().is_some())
    }

    /// Whether anything is to be asked for.
    #[inline]
    pub fn is_open(&self, direction: Direction) -> bool {
        self.metered().is_none() && !self.has_rate(direction)
    }

    /// Asks for up to `want` bytes; waits until some may move.
    ///
    /// # Errors
    /// The session was stopped meanwhile, or the quota is spent; nothing is owed.
    pub async fn reserve(
        &self,
        direction: Direction,
        want: usize,
        watch: &Watch,
    ) -> Result<usize, Stopped> {
        let leased = match self.metered() {
            Some(user) => self.lease(user, want as u64, watch).await?,
            None => want as u64,
        };
        let granted = self.rate(direction, leased, watch).await;
        self.give_back(leased - granted.as_ref().unwrap_or(&0));
        Ok(granted? as usize)
    }

    /// Waits until the rates allow some of `want`.
    async fn rate(&self, direction: Direction, want: u64, watch: &Watch) -> Result<u64, Stopped> {
        let [user, everyone] = self.buckets(direction);
        let mut granted = want;
        if let Some(user) = user {
            granted = reserve(user, granted, watch).await?;
        }
        if let Some(everyone) = everyone {
            let of_all = reserve(everyone, granted, watch).await;
            if let Some(user) = user {
                user.give_back(granted - of_all.as_ref().unwrap_or(&0));
            }
            granted = of_all?;
        }
        Ok(granted)
    }

    /// Reserves from the user's lease; waits while the control plane may grant more.
    async fn lease(&self, user: &UserUse, want: u64, watch: &Watch) -> Result<u64, Stopped> {
        let began = clock();
        loop {
            let mut reserved = self.reserved.get();
            let granted = user.lease.reserve(want, &mut reserved);
            self.reserved.set(reserved);
            let now = clock();
            if user.lease.is_low() {
                self.wanted.ask(&user.lease, now);
            }
            if granted > 0 {
                return Ok(granted);
            }
            if user.lease.is_spent(now) || now - began > LEASE_WAIT {
                return Err(Stopped(Cause::QuotaSpent.code()));
            }
            watch.guard(sleep(LEASE_LOOK)).await?;
        }
    }

    fn give_back(&self, bytes: u64) {
        if let Some(user) = &self.user
            && bytes > 0
        {
            let mut reserved = self.reserved.get();
            user.lease.give_back(bytes, &mut reserved);
            self.reserved.set(reserved);
        }
    }

    /// Says that bytes were moved; returns how many of them the lease had reserved.
    #[inline]
    pub fn moved(&self, bytes: usize) -> u64 {
        let Some(user) = &self.user else { return 0 };
        let mut reserved = self.reserved.get();
        let covered = reserved.moved(bytes as u64, &user.lease);
        self.reserved.set(reserved);
        covered
    }

    /// Returns bytes that were granted and not moved.
    pub fn unused(&self, direction: Direction, bytes: usize) {
        for bucket in self.buckets(direction).into_iter().flatten() {
            bucket.give_back(bytes as u64);
        }
        self.give_back(bytes as u64);
    }
}

impl Drop for Allowance<'_> {
    fn drop(&mut self) {
        self.give_back(u64::MAX);
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
