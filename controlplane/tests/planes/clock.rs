//! RELIABILITY D6: clocks that step, and what depends on the time of day.

use std::{
    fs,
    io::Read,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant, SystemTime},
};

use serde_json::{Value, json};

use crate::{
    accounting::{drink, source, transfer},
    support::{Over, Planes, await_cut, await_some, echo, on_each, on_server, pause, ping},
};

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;

/// The clock of the planes' programs: seconds beside the real one.
struct Clock {
    file: PathBuf,
    noon: i64,
}

impl Clock {
    /// Seconds since 1970, really.
    fn real() -> i64 {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs().cast_signed()
    }

    /// It is noon, UTC.
    fn at_noon(folder: &std::path::Path) -> Self {
        let now = Self::real();
        let noon = now / DAY * DAY + DAY / 2 - now;
        let clock = Self { file: folder.join("clock"), noon };
        clock.step(0);
        clock
    }

    /// So many seconds from noon; programs see it within a second.
    fn step(&self, from_noon: i64) {
        let next = self.file.with_extension("next");
        fs::write(&next, format!("{:+}\n", self.noon + from_noon)).unwrap();
        fs::rename(next, &self.file).unwrap();
    }

    /// Seconds since 1970 on this clock.
    fn now(&self, from_noon: i64) -> i64 {
        Self::real() + self.noon + from_noon
    }

    fn text(&self, from_noon: i64) -> String {
        let at = self.now(from_noon);
        let at = time::OffsetDateTime::from_unix_timestamp(at).unwrap();
        at.format(&time::format_description::well_known::Rfc3339).unwrap()
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        let found = fs::read_dir("/usr/lib").unwrap().flatten();
        let library = found.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1"));
        let library = library.into_iter().find(|path| path.exists()).expect("package faketime");
        vec![
            ("LD_PRELOAD", library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.display().to_string()),
            ("FAKETIME_NO_CACHE", "1".into()),
            ("DONT_FAKE_MONOTONIC", "1".into()),
            ("NO_FAKE_STAT", "1".into()),
        ]
    }
}

/// Who expires while a session runs loses it, without anybody's edit.
#[test]
fn an_expiry_that_comes_ends_the_users_sessions() {
    on_each(|planes| {
        let (node, target) = (planes.node("edge"), echo());
        planes.user("bob", json!({}));
        let mut bobs = await_some("tunnel", || node.tunnel("bob", target).ok());
        let expires = Clock::real() + 5;
        let text = time::OffsetDateTime::from_unix_timestamp(expires).unwrap();
        let text = text.format(&time::format_description::well_known::Rfc3339).unwrap();
        planes.user("ann", json!({ "expires_at": text }));
        let mut stream = await_some("tunnel", || node.tunnel("ann", target).ok());
        await_cut(&mut stream);
        let late = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap()
            - Duration::from_secs(expires.cast_unsigned());
        assert!(late < Duration::from_secs(1), "{late:?}");
        assert_eq!(node.tunnel("ann", target).err(), Some(255));
        ping(&mut bobs).unwrap();
    });
}

/// Runs a test at noon on every database there is.
fn on_each_at_noon(test: impl Fn(Planes, &Clock)) {
    let run = |database: Option<String>| {
        let folder = tempfile::tempdir().unwrap();
        let clock = Clock::at_noon(folder.path());
        let mut planes = Planes::start_as(database, "", clock.environment());
        planes.token = planes.login_admin();
        test(planes, &clock);
    };
    run(None);
    on_server(|url, _| run(Some(url)));
}

/// A quota is there again when its period begins, and not before; of two control planes one sees to it.
#[test]
fn quotas_begin_anew_with_their_periods() {
    const QUOTA: u64 = 100_000;
    const PERIODS: [&str; 4] = ["day", "week", "month", "total"];
    on_each_at_noon(|mut planes, clock| {
        let second = planes.has_server().then(|| planes.second());
        let (node, target) = (planes.node("edge"), source());
        let ids = PERIODS.map(|period| {
            let limits = json!({ "quota_bytes": QUOTA, "quota_period": period });
            planes.user(period, json!({ "limits": limits }))
        });
        let began = |period: &str, day: i64| {
            let at = time::OffsetDateTime::from_unix_timestamp(clock.now(day * DAY)).unwrap();
            let date = at.date();
            match period {
                "day" => date,
                "week" => {
                    date - time::Duration::days(date.weekday().number_days_from_monday().into())
                }
                "month" => date.replace_day(1).unwrap(),
                _ => time::Date::MIN,
            }
        };
        let (mut spent, mut before) = ([0; 4], 0);
        for day in [0, 1, 7, 8, 40] {
            clock.step(day * DAY);
            // The token of the day before is over.
            planes.token = planes.login_admin();
            for (index, period) in PERIODS.iter().enumerate() {
                if day > 0 && began(period, before) == began(period, day) {
                    assert!(node.tunnel(period, target).is_err(), "{period}, day {day}");
                    continue;
                }
                // The first is a day's, which is always there again. For a second a node may hold what
                // it knew of the day before.
                let came = await_some(&format!("quota of a {period}, day {day}"), || {
                    let came = drink(node.tunnel(period, target).ok()?);
                    (came > 0).then_some(came)
                });
                spent[index] += QUOTA;
                assert!(came <= QUOTA, "{period}, day {day}: {came}");
                await_some("the sum", || (planes.used(&ids[index]) == spent[index]).then_some(()));
                await_some("refusal", || node.tunnel(period, target).err());
                let usage =
                    planes.must("GET", &format!("/users/{}/usage", ids[index]), Value::Null);
                assert_eq!(usage["used"], QUOTA, "{usage}");
            }
            before = day;
        }
        assert_eq!(spent[3], QUOTA);
        pause(Duration::from_millis(1500));
        let days = planes.must("GET", "/logs/audit?action=quota.day", Value::Null);
        assert_eq!(days["total"], 5, "{days}");
        drop(second);
    });
}

#[test]
fn clocks_may_step_under_load() {
    on_each_at_noon(clocks_step);
}

fn clocks_step(mut planes: Planes, clock: &Clock) {
    const RATE: u64 = 4_000_000;
    const QUOTA: usize = 1_000_000;
    let (node, target) = (planes.node("edge"), echo());
    let early = planes.token.clone();

    // A rate, over steps of the clock either way.
    let limits = json!({ "kind": "group", "subject": "slow", "down": RATE });
    planes.must("POST", "/traffic/limits", limits);
    planes.user("slow", json!({ "groups": ["slow"] }));
    let mut slow = await_some("tunnel", || node.tunnel("slow", source()).ok());
    let (received, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut ratio = 0.0;
    let mut statuses = Vec::new();
    thread::scope(|scope| {
        let until = Over(&over);
        scope.spawn(|| {
            let mut buffer = vec![0; 64 * 1024];
            while !over.load(Relaxed)
                && let Ok(bytes @ 1..) = slow.read(&mut buffer)
            {
                received.fetch_add(bytes as u64, Relaxed);
            }
        });
        pause(Duration::from_millis(1500));
        let (began, before) = (Instant::now(), received.load(Relaxed));
        for step in [3 * HOUR, 0, -3 * HOUR, 0] {
            clock.step(step);
            pause(Duration::from_millis(1200));
            statuses.push(planes.ask_as(&early, "GET", "/auth/me", None).0);
        }
        let moved = received.load(Relaxed) - before;
        ratio = moved as f64 / began.elapsed().as_secs_f64() / RATE as f64;
        drop(until);
    });
    assert!((0.97..1.03).contains(&ratio), "{ratio}");
    // A token holds 15 minutes from when it was issued, and not before that but for a minute.
    assert_eq!(statuses, [401, 200, 401, 200]);
    drop(slow);

    // An expiry is acted on whenever the clock comes to it.
    let expires_at = clock.text(HOUR);
    planes.user("bob", json!({ "expires_at": expires_at }));
    for _ in 0..2 {
        let mut bobs = await_some("tunnel", || node.tunnel("bob", target).ok());
        clock.step(2 * HOUR);
        await_cut(&mut bobs);
        clock.step(0);
        // The clock is looked at each second.
        pause(Duration::from_millis(1500));
    }

    // A day's quota is there once a day, however often the day comes.
    let limits = json!({ "quota_bytes": QUOTA, "quota_period": "day" });
    let id = planes.user("ann", json!({ "limits": limits }));
    await_some("tunnel", || node.tunnel("ann", target).ok());
    transfer(&node, "ann", target, QUOTA / 2 - 1000);
    let spend = |size: usize| {
        let mut stream = await_some("tunnel", || node.tunnel("ann", target).ok());
        let _ = std::io::Write::write_all(&mut stream, &vec![7; size]);
        assert!(stream.read_to_end(&mut Vec::new()).is_err());
        await_some("refusal", || node.tunnel("ann", target).err());
    };
    spend(QUOTA);
    clock.step(DAY);
    pause(Duration::from_millis(500));
    planes.token = planes.login_admin();
    let used = |planes: &Planes| planes.used(&id);
    await_some("bytes", || (used(&planes) == QUOTA as u64).then_some(()));
    await_some("tunnel of the next day", || node.tunnel("ann", target).ok());
    let moved = transfer(&node, "ann", target, 100_000);
    await_some("bytes", || (used(&planes) == QUOTA as u64 + moved).then_some(()));
    // The day before is still spent, and of this one so much is gone.
    clock.step(0);
    await_some("refusal", || node.tunnel("ann", target).err());
    clock.step(DAY);
    await_some("tunnel", || node.tunnel("ann", target).ok());
    spend(QUOTA);
    pause(Duration::from_millis(1500));
    assert_eq!(used(&planes), 2 * QUOTA as u64);

    // Durations are of a clock that does not step.
    for line in node.access_log().lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        for key in ["duration_ms", "handshake_ms", "dial_ms"] {
            let took = record[key].as_f64().unwrap();
            assert!((0.0..60_000.0).contains(&took), "{record}");
        }
    }
    for program in [&planes.control, &node.program] {
        let said = program.lines();
        assert!(!said.contains("panic"), "{said}");
    }
}
