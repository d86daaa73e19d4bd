//! The access log's writer: a thread that drains the workers' queues.

use std::{
    io::{BufWriter, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread::{self, Thread},
    time::Duration,
};

use crossbeam::queue::ArrayQueue;

use super::Spool;
use crate::{config::LogConfig, session::Record};

/// How often the queues are looked at: a worker that makes less than 40,000 records a second loses none.
const PAUSE: Duration = Duration::from_millis(200);
/// How long the last records may take.
const LAST_RECORDS: Duration = Duration::from_secs(3);

/// The writer of access records.
pub struct AccessLog {
    thread: Thread,
    /// Disconnected when the thread has ended.
    ended: Mutex<Receiver<()>>,
    shared: Arc<Shared>,
}

struct Shared {
    queues: Vec<Arc<ArrayQueue<Record>>>,
    ending: AtomicBool,
    written: AtomicU64,
    lost: AtomicU64,
    /// Where records wait for the control plane, if there is one.
    spool: Option<Arc<Spool>>,
}

impl AccessLog {
    /// Starts writing what the queues hold; without a file they are emptied all the same.
    ///
    /// # Errors
    /// The file or the thread cannot be had.
    pub fn start(
        config: &LogConfig,
        queues: Vec<Arc<ArrayQueue<Record>>>,
        spool: Option<Arc<Spool>>,
    ) -> anyhow::Result<Self> {
        let file = match &config.access_file {
            Some(path) => Some(super::rolling(path, config.rotate)?),
            None => None,
        };
        let shared = Arc::new(Shared {
            queues,
            ending: AtomicBool::new(false),
            written: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            spool,
        });
        let writer = shared.clone();
        let (ends, ended) = mpsc::channel();
        let thread = thread::Builder::new().name("access-log".into()).spawn(move || {
            let _ends: mpsc::Sender<()> = ends;
            match file {
                Some(file) => writer.run(BufWriter::with_capacity(64 * 1024, file)),
                None => writer.run(std::io::sink()),
            }
        })?;
        Ok(Self { thread: thread.thread().clone(), ended: Mutex::new(ended), shared })
    }

    /// Records written.
    pub fn written(&self) -> u64 {
        self.shared.written.load(Relaxed)
    }

    /// Records that could not be written (a full disk).
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Relaxed)
    }

    /// Writes what is queued and ends, within 3 s; whether it has: a log may take nothing more.
    pub fn end(&self) -> bool {
        self.shared.ending.store(true, Relaxed);
        self.thread.unpark();
        let ended = self.ended.lock().map(|ended| ended.recv_timeout(LAST_RECORDS));
        let timed_out = matches!(ended, Ok(Err(RecvTimeoutError::Timeout)));
        if timed_out {
            let queued: usize = self.shared.queues.iter().map(|queue| queue.len()).sum();
            tracing::error!(queued, "the access log takes nothing; its last records are lost");
        }
        !timed_out
    }
}

impl Shared {
    fn run(&self, mut file: impl Write) {
        let mut line = Vec::with_capacity(1024);
        loop {
            // Read before the queues, so that nothing queued before it is left.
            let ending = self.ending.load(Relaxed);
            let (mut written, mut failed) = (0, 0);
            for record in self.queues.iter().flat_map(|queue| std::iter::from_fn(|| queue.pop())) {
                line.clear();
                let encoded = serde_json::to_writer(&mut line, &record).is_ok();
                let spooled = self.spool.as_ref().is_none_or(|spool| {
                    spool.push(record.user_id(), &line, |number| record.recorded_as(number))
                });
                line.push(b'\n');
                match encoded && file.write_all(&line).is_ok() && spooled {
                    true => written += 1,
                    false => failed += 1,
                }
            }
            if written + failed > 0 && file.flush().is_err() {
                (written, failed) = (0, written + failed);
            }
            self.written.fetch_add(written, Relaxed);
            if failed > 0 && self.lost.fetch_add(failed, Relaxed) == 0 {
                tracing::error!("access records cannot be written; is the disk full?");
            }
            if ending {
                return;
            }
            if written + failed == 0 {
                thread::park_timeout(PAUSE);
            }
        }
    }
}
