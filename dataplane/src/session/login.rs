//! Judging credentials: remembered ones on the worker, others on the pool beside it.

use std::{rc::Rc, sync::Arc};

use culvert_proto::{Credentials, Handshake, Verdict};
use culvert_rt::Signal;

use super::{LoggedIn, Session};
use crate::{
    end::{Cause, End, Stage},
    policy::{AdmissionError, User, Whose, clock},
    telemetry::LoginResult,
    worker::{LoginKey, Message},
};

impl Session {
    /// Judges credentials and tells the handshake; whether they were accepted.
    pub(super) async fn authenticate(
        &self,
        handshake: &mut dyn Handshake,
        credentials: Credentials,
    ) -> Result<bool, End> {
        if self.refused {
            // Whoever it is will be told that there is no room.
            handshake.authenticated(Verdict::Accepted);
            return Ok(true);
        }
        let result = self.log_in(&credentials).await?;
        let (result, verdict) = match result {
            Ok(user) => {
                self.become_user(user);
                (LoginResult::Accepted, Verdict::Accepted)
            }
            Err(result) => (result, Verdict::Rejected),
        };
        self.worker.counters.auth[result as usize].add(1);
        self.live.login_result(result);
        handshake.authenticated(verdict);
        Ok(verdict == Verdict::Accepted)
    }

    /// What the record says of a refused login.
    pub(super) fn login_end(&self) -> Option<End> {
        let cause = match self.live.last_login()? {
            LoginResult::Accepted => return None,
            LoginResult::Rejected => Cause::LoginRejected,
            LoginResult::Busy => Cause::LoginBusy,
            LoginResult::Throttled => Cause::LoginThrottled,
        };
        Some(End::new(Stage::Login, cause))
    }

    async fn log_in(
        &self,
        credentials: &Credentials,
    ) -> Result<Result<Arc<User>, LoginResult>, End> {
        let worker = &self.worker;
        let user = worker.snapshot().directory.find(&credentials.user).cloned();
        let pool = &worker.shared.logins;
        // Right before, right again: no hashing, and no throttle.
        if let Some(user) = &user
            && pool.remembers(&user.credential, &credentials.password)
        {
            return Ok(self.usable(user.clone()));
        }
        let key = pool.login_key(&credentials.user, user.as_deref(), &credentials.password);
        let answer = match worker.login_under_way(&key) {
            // The same login, offered by several connections at once, is one login.
            Some(answer) => answer,
            None => match self.verify(key, credentials, user.as_deref()) {
                Ok(answer) => answer,
                Err(result) => return Ok(Err(result)),
            },
        };
        let right = self.watch.guard(answer.wait()).await;
        let right = right.map_err(|stopped| End::new(Stage::Login, Cause::of_code(stopped.0)))?;
        match user {
            Some(user) if right => Ok(self.usable(user)),
            _ => Ok(Err(LoginResult::Rejected)),
        }
    }

    /// Asks the pool to verify a login, unless too many failed before.
    fn verify(
        &self,
        key: LoginKey,
        credentials: &Credentials,
        user: Option<&User>,
    ) -> Result<Rc<Signal<bool>>, LoginResult> {
        let worker = &self.worker;
        let failures = worker.snapshot().settings.failures;
        let (shared, client) = (worker.shared.clone(), self.peer.ip());
        if shared.throttles.begin(failures, client, &credentials.user, clock()).is_err() {
            return Err(LoginResult::Throttled);
        }
        let answer = worker.expect_login(key);
        let (sender, name) = (worker.sender.clone(), credentials.user.clone());
        let throttles = shared.clone();
        let reply = Box::new(move |right| {
            if right {
                throttles.throttles.forgive(failures, client, &name);
            }
            let _ = sender.send(Message::LoggedIn { key, right });
        });
        let whose = match user {
            Some(user) => Whose::User(user.credential.clone()),
            None => {
                let snapshot = worker.snapshot();
                let alike = snapshot.directory.alike(&credentials.user);
                Whose::Nobody(alike.map(|user| user.credential.clone()))
            }
        };
        let queued = shared.logins.verify(whose, credentials.password.clone(), reply);
        if queued.is_err() {
            worker.forget_login(&key);
            shared.throttles.forgive(failures, client, &credentials.user);
            return Err(LoginResult::Busy);
        }
        Ok(answer)
    }

    /// A right password of a user who may not log in is a wrong one to the client.
    fn usable(&self, user: Arc<User>) -> Result<Arc<User>, LoginResult> {
        let usable = user.is_active(crate::worker::unix_now()) && user.comes_from(self.peer.ip());
        if usable { Ok(user) } else { Err(LoginResult::Rejected) }
    }

    /// The session counts for its user from here on; if the user has too many, its request is told.
    fn become_user(&self, user: Arc<User>) {
        let mut login = self.login.borrow_mut();
        if let Some(login) = &mut *login
            && login.admission.is_ok()
            && Arc::ptr_eq(&login.user.shared, &user.shared)
        {
            login.user = user;
            return;
        }
        // The place of the user before is free first.
        *login = None;
        let admission = match self.meter.belongs_to(Some(&user.shared.lease)) {
            true => {
                let evicted = || self.worker.shared.evicted.notify_one();
                user.shared.admit(self.peer.ip(), clock(), evicted)
            }
            // More users than this boot can count for.
            false => Err(AdmissionError::Sessions),
        };
        self.live.comes_from(admission.as_ref().ok().and_then(|place| place.device.as_ref()));
        *login = Some(LoggedIn { user, admission });
    }

    /// The session counts for nobody.
    pub(super) fn become_nobody(&self) {
        self.meter.belongs_to(None);
        self.login.replace(None);
    }
}
