//! The load: clients of a scenario, on one thread.

use std::{
    cell::Cell,
    fs,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::{JoinSet, LocalSet},
};

use crate::{
    Scenario, control,
    peer::Peer,
    process::{self, Usage},
    target,
};

/// Sessions of the echo scenario.
const ECHO_SESSIONS: usize = 64;
/// Bytes of its messages.
const ECHO_BYTES: usize = 128;
/// Pause of its sessions between two messages, so that a core is free for the compiler.
const SWAP_PAUSE: Duration = Duration::from_millis(5);
/// Pause between two of its snapshots.
const SWAP_EVERY: Duration = Duration::from_secs(1);
/// Before what counts begins.
const WARM_UP: Duration = Duration::from_millis(500);

/// One round of a scenario against one proxy.
pub(crate) struct Load<'a> {
    pub(crate) peer: &'a Peer,
    pub(crate) target: SocketAddr,
    pub(crate) time: Duration,
    pub(crate) sessions: usize,
    pub(crate) clients: usize,
}

/// What a round measured.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sample {
    /// GiB, round trips, or connections; for idle, sessions.
    pub(crate) amount: f64,
    /// How long it took.
    pub(crate) seconds: f64,
    /// The proxy's CPU time in seconds.
    pub(crate) cpu: f64,
    /// Latencies in microseconds, sorted.
    pub(crate) latencies: Vec<u32>,
    /// The same while no snapshot is replaced (swap).
    pub(crate) quiet: Vec<u32>,
    /// Failed operations.
    pub(crate) errors: u64,
    /// Bytes of resident memory a session (idle).
    pub(crate) memory: f64,
    /// Descriptors a session (idle).
    pub(crate) descriptors: f64,
}

#[derive(Default)]
struct Counts {
    amount: Cell<u64>,
    errors: Cell<u64>,
    counting: Cell<bool>,
    latencies: Cell<Vec<u32>>,
}

impl Counts {
    fn add(&self, amount: u64) {
        if self.counting.get() {
            self.amount.set(self.amount.get() + amount);
        }
    }

    fn latency(&self, since: Instant) {
        if self.counting.get() {
            let mut latencies = self.latencies.take();
            latencies.push(since.elapsed().as_micros() as u32);
            self.latencies.set(latencies);
        }
    }

    fn error(&self) {
        self.errors.set(self.errors.get() + 1);
    }
}

impl Load<'_> {
    pub(crate) fn run(&self, scenario: Scenario) -> anyhow::Result<Sample> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        LocalSet::new().block_on(&runtime, async {
            match scenario {
                Scenario::Bulk => self.bulk().await,
                Scenario::Echo => self.echo().await,
                Scenario::Churn => self.churn().await,
                Scenario::Idle => self.idle().await,
                Scenario::Swap => self.swap().await,
            }
        })
    }

    async fn bulk(&self) -> anyhow::Result<Sample> {
        let counts = Rc::new(Counts::default());
        let mut tasks = JoinSet::new();
        for i in 0..4 {
            let mut stream = self.peer.connect(self.target).await?;
            let up = i % 2 == 0;
            stream.write_all(&[if up { target::UP } else { target::DOWN }]).await?;
            tasks.spawn_local(stream_bulk(stream, up, counts.clone()));
        }
        let mut sample = self.measure(&counts).await;
        sample.amount /= f64::from(1 << 30);
        Ok(sample)
    }

    async fn echo(&self) -> anyhow::Result<Sample> {
        let counts = Rc::new(Counts::default());
        let mut tasks = JoinSet::new();
        for _ in 0..ECHO_SESSIONS {
            let mut stream = self.peer.connect(self.target).await?;
            stream.write_all(&[target::ECHO]).await?;
            tasks.spawn_local(ping(stream, counts.clone(), None));
        }
        Ok(self.measure(&counts).await)
    }

    /// Half of the time without a new snapshot, half with one a second.
    async fn swap(&self) -> anyhow::Result<Sample> {
        let counts = Rc::new(Counts::default());
        let mut tasks = JoinSet::new();
        for _ in 0..ECHO_SESSIONS {
            let mut stream = self.peer.connect(self.target).await?;
            stream.write_all(&[target::ECHO]).await?;
            tasks.spawn_local(ping(stream, counts.clone(), Some(SWAP_PAUSE)));
        }
        if let Some(plane) = &self.peer.plane {
            let token = plane.login()?;
            let quiet = self.measure(&counts).await;
            let edits = async |number| {
                let (plane, token) = (plane.clone(), token.clone());
                // Neither the admin nor who is under load; beside the thread that measures.
                tokio::task::spawn_blocking(move || plane.edit(&token, number + 2)).await?
            };
            return self.swap_by(&counts, quiet, "policy followed", edits).await;
        }
        let config = self.peer.config();
        let mut policy = fs::read_to_string(&config)?;
        for index in 0..control::USERS {
            let hash = hash_of_nobody(index);
            policy.push_str(&format!(
                "[[policy.user]]\nname = 'user-{index}'\npassword_hash = '{hash}'\n"
            ));
        }
        // Written beforehand: while latencies are taken, files are only renamed.
        let swaps = self.time.as_secs().max(1) as usize;
        for swap in 0..=swaps {
            let status = if swap % 2 == 0 { "active" } else { "disabled" };
            let text = format!("{policy}status = '{status}'\n");
            fs::write(config.with_extension(swap.to_string()), text)?;
        }
        let replace =
            async |swap: usize| Ok(fs::rename(config.with_extension(swap.to_string()), &config)?);
        replace(0).await?;
        self.await_swap("configuration published", 0).await?;
        let quiet = self.measure(&counts).await;
        self.swap_by(&counts, quiet, "configuration published", replace).await
    }

    /// Measures while `swap` makes another snapshot a second, each of which the log tells.
    async fn swap_by(
        &self,
        counts: &Rc<Counts>,
        quiet: Sample,
        told: &str,
        swap: impl AsyncFn(usize) -> anyhow::Result<()>,
    ) -> anyhow::Result<Sample> {
        let replace = async {
            for number in 1..=self.time.as_secs().max(1) as usize {
                let (started, before) = (Instant::now(), self.peer.log().matches(told).count());
                swap(number).await?;
                self.await_swap(told, before).await?;
                tokio::time::sleep(SWAP_EVERY.saturating_sub(started.elapsed())).await;
            }
            anyhow::Ok(())
        };
        let (sample, replaced) = tokio::join!(self.measure(counts), replace);
        replaced?;
        Ok(Sample { quiet: quiet.latencies, ..sample })
    }

    /// Waits until the log has told more than so many snapshots.
    async fn await_swap(&self, told: &str, before: usize) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.peer.log().matches(told).count() <= before {
            anyhow::ensure!(Instant::now() < deadline, "no swap:\n{}", self.peer.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    async fn churn(&self) -> anyhow::Result<Sample> {
        let counts = Rc::new(Counts::default());
        let warm_up = WARM_UP;
        let end = Instant::now() + warm_up + self.time;
        let connect = async || {
            while Instant::now() < end {
                let started = Instant::now();
                match self.one_byte().await {
                    Ok(()) => {
                        counts.add(1);
                        counts.latency(started);
                    }
                    Err(_) => counts.error(),
                }
            }
        };
        let clients = async {
            let mut clients: Vec<_> = (0..self.clients).map(|_| Box::pin(connect())).collect();
            std::future::poll_fn(|cx| {
                clients.retain_mut(|client| client.as_mut().poll(cx).is_pending());
                if clients.is_empty() {
                    std::task::Poll::Ready(())
                } else {
                    std::task::Poll::Pending
                }
            })
            .await;
        };
        let (sample, ()) = tokio::join!(self.measure(&counts), clients);
        Ok(sample)
    }

    async fn one_byte(&self) -> anyhow::Result<()> {
        let mut stream = self.peer.connect(self.target).await?;
        stream.write_all(&[target::ECHO, 1]).await?;
        let mut byte = [0];
        stream.read_exact(&mut byte).await?;
        // The client closes first; the ports in TIME_WAIT are its own.
        Ok(())
    }

    async fn idle(&self) -> anyhow::Result<Sample> {
        // One session first, so that what a process needs anyway is not counted.
        drop(self.peer.connect(self.target).await?);
        tokio::time::sleep(Duration::from_millis(300)).await;
        let before = self.peer.usage();
        let mut streams = Vec::with_capacity(self.sessions);
        while streams.len() < self.sessions {
            let batch =
                (0..50.min(self.sessions - streams.len())).map(|_| self.peer.connect(self.target));
            for connected in batch {
                let mut stream = connected.await?;
                stream.write_all(&[target::ECHO, 1]).await?;
                let mut byte = [0];
                stream.read_exact(&mut byte).await?;
                streams.push(stream);
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (full, started) = (self.peer.usage(), Instant::now());
        tokio::time::sleep(self.time).await;
        let (after, seconds) = (self.peer.usage(), started.elapsed().as_secs_f64());
        let mut errors = 0;
        for stream in &mut streams {
            let answered = async {
                stream.write_all(&[2]).await?;
                stream.read_u8().await
            };
            errors += u64::from(answered.await.is_err());
        }
        let sessions = self.sessions as f64;
        Ok(Sample {
            amount: sessions,
            seconds,
            cpu: (after.cpu - full.cpu) as f64 / 1e9,
            errors,
            memory: full.memory.saturating_sub(before.memory) as f64 / sessions,
            descriptors: (full.descriptors - before.descriptors) as f64 / sessions,
            ..Sample::default()
        })
    }

    /// Lets the load warm up, then counts for the round's time.
    async fn measure(&self, counts: &Counts) -> Sample {
        tokio::time::sleep(WARM_UP).await;
        counts.counting.set(true);
        let (before, started): (Usage, _) = (self.peer.usage(), Instant::now());
        tokio::time::sleep(self.time).await;
        counts.counting.set(false);
        let (after, seconds) = (self.peer.usage(), started.elapsed().as_secs_f64());
        let mut latencies = counts.latencies.take();
        latencies.sort_unstable();
        Sample {
            amount: counts.amount.get() as f64,
            seconds,
            cpu: after.cpu.saturating_sub(before.cpu) as f64 / 1e9,
            latencies,
            errors: counts.errors.get(),
            ..Sample::default()
        }
    }
}

async fn stream_bulk(mut stream: TcpStream, up: bool, counts: Rc<Counts>) {
    let mut block = vec![1u8; target::BULK];
    if !up {
        process::receive_in_bulk(&stream, target::BULK);
    }
    loop {
        let moved = if up { stream.write(&block).await } else { stream.read(&mut block).await };
        match moved {
            Ok(moved) if moved > 0 => counts.add(moved as u64),
            _ => return counts.error(),
        }
    }
}

/// A well-formed password hash of nobody's password.
fn hash_of_nobody(index: usize) -> String {
    format!("$2b$10${index:.<22}{}", "abcdefghijklmnopqrstuvwxyz0123.")
}

async fn ping(mut stream: TcpStream, counts: Rc<Counts>, pause: Option<Duration>) {
    let message = [3u8; ECHO_BYTES];
    let mut answer = [0u8; ECHO_BYTES];
    loop {
        let started = Instant::now();
        let exchanged = async {
            stream.write_all(&message).await?;
            stream.read_exact(&mut answer).await
        };
        match exchanged.await {
            Ok(_) => {
                counts.add(1);
                counts.latency(started);
            }
            Err(_) => return counts.error(),
        }
        if let Some(pause) = pause {
            tokio::time::sleep(pause).await;
        }
    }
}
