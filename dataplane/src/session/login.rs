//! Judging credentials: remembered ones on the worker, others on the pool beside it.

use std::{rc::Rc, sync::Arc};

use culvert_proto::{Credentials, Handshake, Verdict};
use culvert_rt::Signal;

use super::{LoggedIn, Session};
use crate::{
    end::{Cause, End, Stage},
    policy::{LoginError, User, clock},
    telemetry::LoginResult,
    worker::Message,
};

impl Session {
    /// Judges credentials and tells the handshake.
    pub(super) async fn authenticate(
        &self,
        handshake: &mut dyn Handshake,
        credentials: Credentials,
    ) -> Result<(), End> {
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
        Ok(())
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
        if self.refused {
            return Ok(Err(LoginResult::Busy));
        }
        let failures = worker.snapshot().settings.failures;
        let (throttles, client) = (&worker.shared.throttles, self.peer.ip());
        if throttles.begin(failures, client, &credentials.user, clock()).is_err() {
            return Ok(Err(LoginResult::Throttled));
        }
        let answer = Rc::new(Signal::default());
        let ticket = worker.expect_login(answer.clone());
        let sender = worker.sender.clone();
        let reply = Box::new(move |right| {
            let _ = sender.send(Message::LoggedIn { ticket, right });
        });
        let credential = user.as_ref().map(|user| user.credential.clone());
        match pool.verify(credential, credentials.password.clone(), reply) {
            Ok(()) => {}
            Err(LoginError::Busy | LoginError::Throttled) => {
                worker.forget_login(ticket);
                throttles.forgive(failures, client, &credentials.user);
                return Ok(Err(LoginResult::Busy));
            }
        }
        let right = self.watch.guard(answer.wait()).await.map_err(|stopped| {
            worker.forget_login(ticket);
            End::new(Stage::Login, Cause::of_code(stopped.0))
        })?;
        match user {
            Some(user) if right => {
                throttles.forgive(failures, client, &credentials.user);
                Ok(self.usable(user))
            }
            _ => Ok(Err(LoginResult::Rejected)),
        }
    }

    /// A right password of a user who may not log in is a wrong one to the client.
    fn usable(&self, user: Arc<User>) -> Result<Arc<User>, LoginResult> {
        let usable = user.is_active(crate::worker::unix_now()) && user.comes_from(self.peer.ip());
        if usable { Ok(user) } else { Err(LoginResult::Rejected) }
    }

    /// The session counts for its user from here on; if the user has too many, its request is told.
    fn become_user(&self, user: Arc<User>) {
        let mut login = self.login.borrow_mut();
        if login.as_ref().is_some_and(|login| Arc::ptr_eq(&login.user.shared, &user.shared)) {
            return;
        }
        *login = None;
        let admitted = user.shared.admit(self.peer.ip(), clock());
        self.live.over_limit.set(admitted.is_err());
        if let Ok(admission) = admitted {
            *login = Some(LoggedIn { user, _admission: admission });
        }
    }
}
