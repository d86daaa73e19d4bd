use super::*;

const UP: Direction = Direction::Up;

fn ledger(dir: &std::path::Path, boot: u64) -> Rc<Ledger> {
    let map = Map::new(Some(dir), boot, 2, 16).unwrap();
    Ledger::new(Arc::default(), map.region(1))
}

fn moved(meter: &Meter, bytes: usize) {
    meter.pending(UP, bytes);
    meter.moved(UP, bytes, 0);
}

fn told(ledger: &Ledger) -> Vec<(u64, Bytes)> {
    let mut sums = ledger.tell();
    sums.sort_unstable();
    sums
}

#[test]
fn sums_are_those_of_ended_and_running_sessions() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = ledger(dir.path(), 7);
    let (first, second) = (ledger.open().unwrap(), ledger.open().unwrap());
    assert!(first.belongs_to(Some(&Lease::new(1))) && second.belongs_to(Some(&Lease::new(1))));
    moved(&first, 10);
    moved(&second, 5);
    assert_eq!(told(&ledger), [(1, [15, 0])]);
    drop(first);
    assert_eq!(told(&ledger), [], "an end moves nothing");
    // The session goes on as somebody else's.
    assert!(second.belongs_to(Some(&Lease::new(2))));
    moved(&second, 100);
    assert_eq!(second.done(UP), 105);
    assert_eq!(told(&ledger), [(2, [100, 0])]);
    drop(second);
    let third = ledger.open().unwrap();
    assert!(third.belongs_to(Some(&Lease::new(1))));
    moved(&third, 1);
    assert_eq!(told(&ledger), [(1, [16, 0])]);
}

#[test]
fn slots_are_used_again_and_bounded() {
    let ledger = Ledger::new(Arc::default(), Map::new(None, 1, 1, 4).unwrap().region(0));
    let meters: Vec<_> = std::iter::from_fn(|| ledger.open()).collect();
    assert_eq!(meters.len(), 4);
    drop(meters);
    let again: Vec<_> = std::iter::from_fn(|| ledger.open()).collect();
    assert_eq!(again.len(), 4);
}

/// RELIABILITY C4: what was counted is found again, what was on its way is told.
#[test]
fn a_killed_process_leaves_its_sums() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = ledger(dir.path(), 9);
    let (ended, running) = (ledger.open().unwrap(), ledger.open().unwrap());
    assert!(ended.belongs_to(Some(&Lease::new(1))) && running.belongs_to(Some(&Lease::new(1))));
    moved(&ended, 10);
    drop(ended);
    moved(&running, 7);
    running.pending(Direction::Down, 3);
    // No destructor runs in a process that is killed.
    std::mem::forget(running);
    let found = recover(dir.path()).unwrap().remove(0);
    assert_eq!((found.boot, found.uncertain), (9, 3));
    assert_eq!(found.users[&1], [17, 0]);
    let cut = Unrecorded { user: 1, bytes: [7, 0], sequence: 0, ran: true, uncertain: 3 };
    assert_eq!(found.sessions, [cut]);
}

/// Whenever the process is killed, every byte of the sums is in one record.
#[test]
fn what_is_not_written_is_found_until_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = ledger(dir.path(), 9);
    let meter = ledger.open().unwrap();
    assert!(meter.belongs_to(Some(&Lease::new(1))));
    let found = || {
        let found = recover(dir.path()).unwrap().remove(0);
        let unrecorded = |of: &Unrecorded| (of.bytes[0], of.sequence);
        (found.users[&1][0], found.sessions.iter().map(unrecorded).collect::<Vec<_>>())
    };
    moved(&meter, 10);
    let first = meter.record().unwrap();
    assert_eq!(found(), (10, vec![(10, 0)]), "the session goes on, and has moved nothing since");
    moved(&meter, 5);
    assert_eq!((found(), meter.done(UP)), ((15, vec![(10, 0), (5, 0)]), 15));
    first.recorded_as(4);
    assert_eq!(found(), (15, vec![(10, 4), (5, 0)]));
    drop(first);
    assert_eq!(found(), (15, vec![(5, 0)]));
    let second = meter.record().unwrap();
    drop(meter);
    assert_eq!(found(), (15, vec![(5, 0)]));
    drop(second);
    assert_eq!(found(), (15, vec![]));
    // All are free again.
    let meters: Vec<_> = std::iter::from_fn(|| ledger.open()).collect();
    assert_eq!(meters.len(), 16);
}

/// Killed between any two steps of a close, the bytes are there once.
#[test]
fn a_close_can_be_taken_again() {
    for steps in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        let ledger = ledger(dir.path(), 9);
        // Another session of the same user, in a slot before.
        let running = ledger.open().unwrap();
        assert!(running.belongs_to(Some(&Lease::new(1))));
        moved(&running, 100);
        let meter = ledger.open().unwrap();
        assert!(meter.belongs_to(Some(&Lease::new(1))));
        moved(&meter, 10);
        assert!(meter.belongs_to(Some(&Lease::new(2))) && meter.belongs_to(Some(&Lease::new(1))));
        moved(&meter, 5);
        let (slot, total) = (meter.slot(), &ledger.region.totals()[0]);
        if steps > 0 {
            slot.closing(0, total.read());
        }
        if steps > 1 {
            total.write([15, 0]);
        }
        if steps > 2 {
            slot.clear();
        }
        std::mem::forget((meter, running));
        assert_eq!(recover(dir.path()).unwrap()[0].users[&1], [115, 0], "after {steps} steps");
    }
}

#[test]
fn what_is_no_ledger_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in [("ledger-1", &b"x"[..]), ("ledger-2", &[0; 8192]), ("other", b"")] {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let mut cut = vec![0; 4096];
    for (index, word) in [map::MAGIC, 5, u64::MAX, u64::MAX].into_iter().enumerate() {
        cut[index * 8..][..8].copy_from_slice(&word.to_le_bytes());
    }
    std::fs::write(dir.path().join("ledger-3"), cut).unwrap();
    assert_eq!(recover(dir.path()).unwrap(), []);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 4);
}
