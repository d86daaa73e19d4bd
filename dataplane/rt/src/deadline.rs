//! What ends a session from outside: deadlines, and whoever calls [`Watch::stop`].
//!
//! Every session has one [`Watch`]. It carries up to three deadlines (of the present stage, of
//! silence, of the whole life) and one reason why it was stopped. A worker has one [`Wheel`] that
//! turns every 100 ms and holds each watch once, in the slot where it is next to be looked at; a busy
//! session only stores the time of its last byte, and is moved when its slot comes up. While nobody asks
//! for the time the wheel dozes until the next slot with a watch in it. Being stopped
//! or interrupted wakes the session's task, whose waits ([`Watch::guard`]) then return: they hold no data, so they
//! can be dropped, and whatever operation is in flight completes at once.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

/// The wheel's step.
const TICK: Duration = Duration::from_millis(100);
/// Slots of the wheel: 102.4 s a turn. A later deadline waits for several turns.
const SLOTS: usize = 1024;
/// Watches that are not due within a turn are looked at together, every 800 ms: an idle worker wakes no
/// more often, and at once no more of them than a 128th (of 100,000: 0.2 ms).
const COARSE: Ticks = 8;
const NONE: u32 = u32::MAX;
/// Sessions told in one turn that they are quiet; the others are told in the next. What they then take
/// back costs the kernel a walk over all that waits.
const QUIETED_MAX: u32 = 16;

/// A time or a span in steps of the wheel (100 ms).
pub type Ticks = u64;

thread_local! {
    static WHEEL: RefCell<Wheel> = RefCell::new(Wheel::new());
    static NOW: Cell<Ticks> = const { Cell::new(0) };
    /// The wheel dozes: [`NOW`] is of the past.
    static DOZES: Cell<bool> = const { Cell::new(false) };
    /// Who turns the wheel, while it dozes; since when it turns.
    static DOZING: RefCell<Option<(Instant, Waker)>> = const { RefCell::new(None) };
    /// Sessions told in this turn that they are quiet.
    static QUIETED: Cell<u32> = const { Cell::new(0) };
}

/// The calling worker's time: steps since it started, as of the wheel's last turn.
#[inline]
pub fn now() -> Ticks {
    if DOZES.get() {
        rouse();
    }
    NOW.get()
}

#[cold]
fn rouse() {
    DOZES.set(false);
    if let Some((started, waker)) = DOZING.take() {
        NOW.set(ticks(started.elapsed()));
        waker.wake();
    }
}

fn ticks(duration: Duration) -> Ticks {
    let step = TICK.as_millis();
    Ticks::try_from(duration.as_millis().div_ceil(step)).unwrap_or(Ticks::MAX / 2)
}

/// One deadline: when, and which reason it gives.
#[derive(Clone, Copy)]
struct Due {
    at: Ticks,
    reason: u8,
    /// Interrupts the present wait instead of stopping the session.
    interrupts: bool,
}

/// A stopped session's reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped(pub u8);

/// Whether a session that has been silent for a while is told so.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Quiet {
    Unasked,
    /// After so long a silence.
    After(Ticks),
    /// It has been.
    Now,
}

/// What may end a session, and when. Made by [`Watch::new`]; leaves the wheel when dropped.
pub struct Watch {
    shared: Rc<Shared>,
}

struct Shared {
    stopped: Cell<Option<Stopped>>,
    interrupted: Cell<Option<Stopped>>,
    stage: Cell<Option<Due>>,
    life: Cell<Option<Due>>,
    silence: Cell<Option<(Ticks, u8)>>,
    touched: Cell<Ticks>,
    quiet: Cell<Quiet>,
    /// The wheel's node, and the time it is to be looked at.
    node: Cell<u32>,
    armed: Cell<Ticks>,
    waker: RefCell<Option<Waker>>,
}

impl Watch {
    /// A watch without deadlines.
    pub fn new() -> Self {
        let shared = Rc::new(Shared {
            stopped: Cell::new(None),
            interrupted: Cell::new(None),
            stage: Cell::new(None),
            life: Cell::new(None),
            silence: Cell::new(None),
            touched: Cell::new(now()),
            quiet: Cell::new(Quiet::Unasked),
            node: Cell::new(NONE),
            armed: Cell::new(Ticks::MAX),
            waker: RefCell::new(None),
        });
        Self { shared }
    }

    /// Sets the present stage's deadline, in place of the one before.
    pub fn stage(&self, after: Duration, reason: u8) {
        let at = now() + ticks(after) + 1;
        self.shared.stage.set(Some(Due { at, reason, interrupts: false }));
        self.arm();
    }

    /// The same, but at the deadline the session is only interrupted: its present waits end, and after
    /// [`Watch::clear_interrupt`] it may go on, to tell its client.
    pub fn stage_interrupts(&self, after: Duration, reason: u8) {
        let at = now() + ticks(after) + 1;
        self.shared.stage.set(Some(Due { at, reason, interrupts: true }));
        self.arm();
    }

    /// Ends the present waits for a reason.
    pub fn interrupt(&self, reason: u8) {
        self.shared.interrupt(reason);
    }

    /// Forgets an interruption. A stop stays.
    pub fn clear_interrupt(&self) {
        self.shared.interrupted.set(None);
    }

    /// Removes the stage's deadline.
    pub fn stage_over(&self) {
        self.shared.stage.set(None);
    }

    /// Sets the deadline of the whole session, counted from now.
    pub fn life(&self, after: Duration, reason: u8) {
        let at = now() + ticks(after) + 1;
        self.shared.life.set(Some(Due { at, reason, interrupts: false }));
        self.arm();
    }

    /// Ends the session when [`Watch::touch`] was not called for so long.
    pub fn silence(&self, after: Duration, reason: u8) {
        self.shared.silence.set(Some((ticks(after) + 1, reason)));
        self.touch();
        self.arm();
    }

    /// Removes the limit of silence.
    pub fn silence_over(&self) {
        self.shared.silence.set(None);
    }

    /// Wakes the session once, when [`Watch::touch`] was not called for so long.
    pub(crate) fn quiet_after(&self, after: Duration) {
        if !matches!(self.shared.quiet.get(), Quiet::After(_)) {
            self.shared.quiet.set(Quiet::After(ticks(after) + 1));
            self.arm();
        }
    }

    /// Whether the silence asked for has come.
    pub(crate) fn is_quiet(&self) -> bool {
        self.shared.quiet.get() == Quiet::Now
    }

    /// Whether [`Watch::touch`] was called in the last 100 to 200 ms.
    pub fn is_brisk(&self) -> bool {
        self.shared.touched.get() + 1 >= now()
    }

    /// Something moved. One store.
    #[inline]
    pub fn touch(&self) {
        self.shared.touched.set(now());
    }

    /// Ends the session for a reason; the first reason stays.
    pub fn stop(&self, reason: u8) {
        self.shared.stop(reason);
    }

    /// A handle for others on this worker who may stop the session.
    pub fn stopper(&self) -> impl Fn(u8) + 'static {
        let shared = Rc::downgrade(&self.shared);
        move |reason| {
            if let Some(shared) = shared.upgrade() {
                shared.stop(reason);
            }
        }
    }

    /// Why the session was stopped, if it was.
    pub fn stopped(&self) -> Option<Stopped> {
        self.shared.stopped.get()
    }

    /// Why the session's waits end now, if they do.
    pub fn halted(&self) -> Option<Stopped> {
        self.shared.stopped.get().or(self.shared.interrupted.get())
    }

    /// Waits for `future`, or until the session is stopped; then `future` is dropped, so it must hold
    /// no data.
    pub fn guard<F: Future>(&self, future: F) -> Guarded<'_, F> {
        Guarded { watch: self, future }
    }

    /// Whether the session is stopped or interrupted; if not, the task will be woken when it is.
    pub(crate) fn is_halted(&self, cx: &mut Context<'_>) -> bool {
        let halted = self.halted().is_some();
        if !halted {
            let mut waker = self.shared.waker.borrow_mut();
            // `will_wake` may tell two wakers of one task apart.
            if waker.as_ref().is_none_or(|known| known.data() != cx.waker().data()) {
                *waker = Some(cx.waker().clone());
            }
        }
        halted
    }

    fn arm(&self) {
        // A wheel that dozes would look too late.
        now();
        let due = self.shared.due();
        if due < self.shared.armed.get() {
            WHEEL.with_borrow_mut(|wheel| wheel.place(&self.shared, due));
        }
    }
}

impl Default for Watch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = WHEEL.try_with(|wheel| {
            if let Ok(mut wheel) = wheel.try_borrow_mut() {
                wheel.remove(&self.shared);
            }
        });
    }
}

impl Shared {
    /// The earliest deadline.
    fn due(&self) -> Ticks {
        let stage = self.stage.get().map_or(Ticks::MAX, |due| due.at);
        let life = self.life.get().map_or(Ticks::MAX, |due| due.at);
        let silence = self.silence.get().map_or(Ticks::MAX, |(span, _)| self.touched.get() + span);
        let quiet = match self.quiet.get() {
            Quiet::After(span) => self.touched.get() + span,
            _ => Ticks::MAX,
        };
        stage.min(life).min(silence).min(quiet)
    }

    /// Acts on the deadlines that have come.
    fn expire(&self, now: Ticks) {
        if let Some(due) = self.life.get().filter(|due| due.at <= now) {
            self.stop(due.reason);
        }
        if let Some(due) = self.stage.get().filter(|due| due.at <= now) {
            self.stage.set(None);
            if due.interrupts { self.interrupt(due.reason) } else { self.stop(due.reason) }
        }
        if let Some((span, reason)) = self.silence.get()
            && self.touched.get() + span <= now
        {
            self.stop(reason);
        }
        if let Quiet::After(span) = self.quiet.get()
            && self.touched.get() + span <= now
            && QUIETED.get() < QUIETED_MAX
        {
            QUIETED.set(QUIETED.get() + 1);
            self.quiet.set(Quiet::Now);
            self.wake();
        }
    }

    fn interrupt(&self, reason: u8) {
        if self.interrupted.get().is_none() {
            self.interrupted.set(Some(Stopped(reason)));
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn stop(&self, reason: u8) {
        if self.stopped.get().is_none() {
            self.stopped.set(Some(Stopped(reason)));
            self.wake();
        }
    }
}

pin_project_lite::pin_project! {
    /// The future of [`Watch::guard`].
    pub struct Guarded<'a, F> {
        watch: &'a Watch,
        #[pin]
        future: F,
    }
}

impl<F: Future> Future for Guarded<'_, F> {
    type Output = Result<F::Output, Stopped>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Some(stopped) = this.watch.halted() {
            return Poll::Ready(Err(stopped));
        }
        if let Poll::Ready(output) = this.future.poll(cx) {
            return Poll::Ready(Ok(output));
        }
        this.watch.is_halted(cx);
        Poll::Pending
    }
}

/// The worker's wheel.
pub struct Wheel {
    heads: Vec<u32>,
    nodes: Vec<Node>,
    free: u32,
    turned: Ticks,
}

/// Waits for an alarm, or until somebody asks for the time.
struct Doze<S> {
    started: Instant,
    alarm: S,
    begun: bool,
}

impl<S: Future<Output = ()> + Unpin> Future for Doze<S> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.begun, true) && !DOZES.get() {
            return Poll::Ready(());
        }
        DOZES.set(true);
        DOZING.set(Some((self.started, cx.waker().clone())));
        let woken = Pin::new(&mut self.alarm).poll(cx);
        if woken.is_ready() {
            rouse();
        }
        woken
    }
}

struct Node {
    shared: Option<Rc<Shared>>,
    slot: u32,
    before: u32,
    after: u32,
}

impl Wheel {
    fn new() -> Self {
        Self { heads: vec![NONE; SLOTS], nodes: Vec::new(), free: NONE, turned: 0 }
    }

    /// Turns the calling worker's wheel for ever. Run it once a worker, as a task.
    pub async fn run() {
        let started = Instant::now();
        loop {
            crate::sleep(TICK).await;
            let time = ticks(started.elapsed());
            Self::turn_to(time);
            let steps = WHEEL.with_borrow(Wheel::empty_steps);
            if steps > 1 {
                Doze { started, alarm: crate::sleep(TICK * (steps - 1)), begun: false }.await;
            }
        }
    }

    /// In how many steps the next slot with a watch in it comes up.
    fn empty_steps(&self) -> u32 {
        let slots = (1..SLOTS).find(|step| {
            let slot = (self.turned as usize + step) % SLOTS;
            self.heads[slot] != NONE
        });
        slots.unwrap_or(SLOTS) as u32
    }

    /// Turns the calling worker's wheel to a time; tests call it with a time of their own.
    pub fn turn_to(time: Ticks) {
        NOW.set(time);
        QUIETED.set(0);
        while let Some(shared) = WHEEL.with_borrow_mut(|wheel| wheel.next_due(time)) {
            shared.expire(time);
            let due = shared.due();
            if shared.stopped.get().is_none() && due < Ticks::MAX {
                WHEEL.with_borrow_mut(|wheel| wheel.place(&shared, due));
            }
        }
    }

    /// Takes the next watch out of the slots up to `time`.
    fn next_due(&mut self, time: Ticks) -> Option<Rc<Shared>> {
        // After a long stop every slot is passed once, not every missed turn.
        self.turned = self.turned.max(time.saturating_sub(SLOTS as Ticks));
        while self.turned <= time {
            let node = self.heads[self.turned as usize % SLOTS];
            if node == NONE {
                if self.turned == time {
                    return None;
                }
                self.turned += 1;
                continue;
            }
            let shared = self.nodes[node as usize].shared.clone();
            self.unlink(node);
            if let Some(shared) = shared {
                shared.node.set(NONE);
                shared.armed.set(Ticks::MAX);
                return Some(shared);
            }
        }
        None
    }

    /// Puts a watch where it is to be looked at: at `due`, or about a turn from now.
    fn place(&mut self, shared: &Rc<Shared>, due: Ticks) {
        self.remove(shared);
        let turn = self.turned + SLOTS as Ticks - 1;
        let at = if due > turn { turn / COARSE * COARSE } else { due }.max(self.turned + 1);
        let slot = at as usize % SLOTS;
        let node = self.allocate();
        let head = self.heads[slot];
        self.nodes[node as usize] =
            Node { shared: Some(shared.clone()), slot: slot as u32, before: NONE, after: head };
        if head != NONE {
            self.nodes[head as usize].before = node;
        }
        self.heads[slot] = node;
        shared.node.set(node);
        shared.armed.set(at);
    }

    fn remove(&mut self, shared: &Shared) {
        let node = shared.node.replace(NONE);
        if node != NONE {
            self.unlink(node);
            shared.armed.set(Ticks::MAX);
        }
    }

    fn unlink(&mut self, node: u32) {
        let Node { slot, before, after, .. } = self.nodes[node as usize];
        match before {
            NONE => self.heads[slot as usize] = after,
            before => self.nodes[before as usize].after = after,
        }
        if after != NONE {
            self.nodes[after as usize].before = before;
        }
        self.nodes[node as usize] = Node {
            shared: None,
            slot: 0,
            before: NONE,
            after: std::mem::replace(&mut self.free, node),
        };
    }

    fn allocate(&mut self) -> u32 {
        if self.free == NONE {
            let node = self.nodes.len() as u32;
            self.nodes.push(Node { shared: None, slot: 0, before: NONE, after: NONE });
            return node;
        }
        let node = self.free;
        self.free = self.nodes[node as usize].after;
        node
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_a_thread(test: impl FnOnce() + Send + 'static) {
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn a_stage_ends_at_its_deadline() {
        in_a_thread(|| {
            let watch = Watch::new();
            watch.stage(Duration::from_secs(10), 7);
            Wheel::turn_to(100);
            assert_eq!(watch.stopped(), None);
            Wheel::turn_to(101);
            assert_eq!(watch.stopped(), Some(Stopped(7)));
        });
    }

    #[test]
    fn a_touched_session_lives_on() {
        in_a_thread(|| {
            let watch = Watch::new();
            watch.silence(Duration::from_secs(1), 3);
            for time in 1..500 {
                Wheel::turn_to(time);
                if time % 9 == 0 {
                    watch.touch();
                }
                assert_eq!(watch.stopped(), None, "at {time}");
            }
            Wheel::turn_to(520);
            assert_eq!(watch.stopped(), Some(Stopped(3)));
        });
    }

    #[test]
    fn deadlines_beyond_a_turn_are_kept() {
        in_a_thread(|| {
            let watch = Watch::new();
            watch.life(Duration::from_secs(600), 1);
            for time in (0..6001).step_by(7) {
                Wheel::turn_to(time);
            }
            assert_eq!(watch.stopped(), None);
            Wheel::turn_to(6001);
            assert_eq!(watch.stopped(), Some(Stopped(1)));
        });
    }

    #[test]
    fn a_long_stop_misses_nothing() {
        in_a_thread(|| {
            let watches: Vec<_> = (1..2000u64)
                .map(|i| {
                    let watch = Watch::new();
                    watch.stage(TICK * i as u32, 1);
                    watch
                })
                .collect();
            Wheel::turn_to(5000);
            Wheel::turn_to(10_000);
            assert!(watches.iter().all(|watch| watch.stopped().is_some()));
        });
    }

    #[test]
    fn an_earlier_deadline_replaces_a_later_one() {
        in_a_thread(|| {
            let watch = Watch::new();
            watch.silence(Duration::from_secs(600), 1);
            watch.stage(Duration::from_secs(1), 2);
            Wheel::turn_to(11);
            assert_eq!(watch.stopped(), Some(Stopped(2)));
            drop(watch);
            WHEEL.with_borrow(|wheel| assert!(wheel.nodes.iter().all(|n| n.shared.is_none())));
        });
    }

    #[test]
    fn an_interruption_passes_and_a_stop_stays() {
        in_a_thread(|| {
            let watch = Watch::new();
            watch.stage_interrupts(Duration::from_secs(1), 4);
            Wheel::turn_to(11);
            assert_eq!((watch.stopped(), watch.shared.interrupted.get()), (None, Some(Stopped(4))));
            watch.clear_interrupt();
            watch.stage(Duration::from_secs(1), 5);
            Wheel::turn_to(22);
            assert_eq!(watch.stopped(), Some(Stopped(5)));
        });
    }

    #[test]
    fn a_quiet_session_is_told_once() {
        in_a_thread(|| {
            let watch = Watch::new();
            watch.quiet_after(Duration::from_secs(1));
            Wheel::turn_to(5);
            watch.touch();
            Wheel::turn_to(15);
            assert!(!watch.is_quiet() && !watch.is_brisk());
            Wheel::turn_to(16);
            assert!(watch.is_quiet());
            watch.quiet_after(Duration::from_secs(1));
            assert!(!watch.is_quiet(), "asked for again");
            assert_eq!(watch.halted(), None);
        });
    }

    /// A wheel with nothing to look at dozes, and is up in time for whoever comes.
    #[test]
    fn a_wheel_that_dozes_is_roused_by_who_asks() {
        in_a_thread(|| {
            let runtime = crate::Runtime::build(crate::RuntimeOptions::default()).unwrap();
            runtime.block_on(async {
                let late = Watch::new();
                late.silence(Duration::from_secs(3600), 1);
                crate::spawn(Wheel::run());
                crate::sleep(TICK * 5).await;
                assert!(DOZES.get());
                let asleep = NOW.get();
                crate::sleep(TICK * 5).await;
                assert_eq!(NOW.get(), asleep, "it turned for nothing");
                let watch = Watch::new();
                assert!(!DOZES.get() && now() >= asleep + 4);
                watch.stage(TICK * 3, 7);
                let began = Instant::now();
                let _ = watch.guard(std::future::pending::<()>()).await;
                assert_eq!(watch.stopped(), Some(Stopped(7)));
                assert!(began.elapsed() >= TICK * 2 && began.elapsed() < TICK * 8);
                // What is far is looked at together.
                let looks: std::collections::HashSet<Ticks> = (0..50)
                    .map(|i| {
                        let watch = Watch::new();
                        watch.life(Duration::from_secs(200 + i), 1);
                        watch.shared.armed.get()
                    })
                    .collect();
                assert!(looks.len() <= 2, "{looks:?}");
            });
        });
    }

    #[test]
    fn the_first_reason_stays() {
        in_a_thread(|| {
            let watch = Watch::new();
            watch.stop(1);
            watch.stop(2);
            assert_eq!(watch.stopped(), Some(Stopped(1)));
        });
    }
}
