//! Name resolution off the workers: hickory on the service thread, or `getaddrinfo(3)` on threads of
//! its own. Answers come back through a callback; workers keep their own caches.

use std::{
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    pin::pin,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use culvert_proto::Name;
use hickory_resolver::{
    TokioResolver,
    config::{
        ConnectionConfig, NameServerConfig, ProtocolConfig, ResolveHosts, ResolverConfig,
        ResolverOpts, ServerOrderingStrategy,
    },
    lookup::Lookup,
    net::{DnsError, NetError, NoRecords, runtime::TokioRuntimeProvider},
    proto::rr::{Name as DnsName, RData},
};
use tokio::sync::mpsc;

/// Lookups under way at once, over all workers, each with two sockets of the descriptors that are kept
/// free; beyond it they wait.
pub const LOOKUPS_MAX: usize = 512;
/// What is left at least to one that has waited.
const LAST_TRY: Duration = Duration::from_millis(500);
/// Lookups that wait.
const LOOKUPS_WAITING_MAX: usize = 4096;
/// Threads of the `getaddrinfo` mode.
const BLOCKING_THREADS: usize = 8;
/// Bounds of how long an answer is kept, whatever its TTL says.
const TTL: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));
/// How long a missing name is remembered when the answer does not say, and at the most.
const TTL_NEGATIVE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
/// How long a failure is remembered, so that a dead server is not asked for every session.
const TTL_FAILURE: Duration = Duration::from_secs(1);
/// Addresses of one name and family that are used.
const ADDRESSES_MAX: usize = 8;

/// Why a name has no addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LookupError {
    /// It does not exist, or has no address.
    NotFound,
    /// Nobody could tell in time.
    Failed,
}

/// The answer to a lookup.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Addresses, at least one.
    pub addresses: Result<Arc<[IpAddr]>, LookupError>,
    /// How long it may be kept.
    pub ttl: Duration,
}

impl Answer {
    fn failed() -> Self {
        Self { addresses: Err(LookupError::Failed), ttl: TTL_FAILURE }
    }

    fn not_found(ttl: Option<Duration>) -> Self {
        let (default, max) = TTL_NEGATIVE;
        let ttl = ttl.unwrap_or(default).clamp(TTL.0, max);
        Self { addresses: Err(LookupError::NotFound), ttl }
    }

    fn found(addresses: Vec<IpAddr>, ttl: Duration) -> Self {
        let (v6, v4): (Vec<IpAddr>, Vec<IpAddr>) = addresses.into_iter().partition(IpAddr::is_ipv6);
        let few = |family: Vec<IpAddr>| family.into_iter().take(ADDRESSES_MAX);
        let addresses = few(v6).chain(few(v4)).collect();
        Self { addresses: Ok(addresses), ttl: ttl.clamp(TTL.0, TTL.1) }
    }
}

/// How names are resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolverOptions {
    /// Servers to ask; empty asks those of `/etc/resolv.conf`.
    pub servers: Vec<SocketAddr>,
    /// Use the C library's resolver instead.
    pub getaddrinfo: bool,
    /// For one lookup, all tries together.
    pub timeout: Duration,
}

type Reply = Box<dyn FnOnce(Name, Answer) + Send>;

/// A name that is to be looked up.
struct Question {
    name: Name,
    reply: Reply,
    asked: Instant,
}

/// A handle for the workers.
#[derive(Clone)]
pub struct Resolver {
    queue: mpsc::Sender<Question>,
}

impl Resolver {
    /// Starts resolving on the calling thread's tokio runtime.
    ///
    /// # Errors
    /// The servers cannot be read from `/etc/resolv.conf`, or threads cannot be started.
    pub fn start(options: &ResolverOptions) -> anyhow::Result<Self> {
        let (queue, questions) = mpsc::channel(LOOKUPS_WAITING_MAX);
        if options.getaddrinfo {
            blocking(questions)?;
        } else {
            tokio::spawn(serve(build(options)?, options.timeout, questions));
        }
        Ok(Self { queue })
    }

    /// Asks for a name's addresses; `false` when too many lookups are under way, and then `reply` is
    /// never called.
    pub fn ask(&self, name: Name, reply: Reply) -> bool {
        self.queue.try_send(Question { name, reply, asked: Instant::now() }).is_ok()
    }
}

fn build(options: &ResolverOptions) -> anyhow::Result<TokioResolver> {
    let (config, mut opts) = if options.servers.is_empty() {
        // Without the search list: a client's names are whole names.
        let (config, opts) =
            hickory_resolver::system_conf::read_system_conf().map_err(|error| {
                anyhow::anyhow!("/etc/resolv.conf: {error}; name servers in dns.servers")
            })?;
        let (_, _, servers) = config.into_parts();
        (ResolverConfig::from_name_servers(servers), opts)
    } else {
        let servers = options.servers.iter().map(|address| {
            let mut udp = ConnectionConfig::new(ProtocolConfig::Udp);
            udp.port = address.port();
            let mut tcp = ConnectionConfig::tcp();
            tcp.port = address.port();
            NameServerConfig::new(address.ip(), true, vec![udp, tcp])
        });
        (ResolverConfig::from_name_servers(servers.collect()), ResolverOpts::default())
    };
    opts.timeout = options.timeout / 2;
    opts.attempts = 1;
    opts.cache_size = 0;
    opts.use_hosts_file = ResolveHosts::Always;
    opts.num_concurrent_reqs = 1;
    // In turn, so that a server that answers SERVFAIL is not asked again by the second try.
    opts.server_ordering_strategy = ServerOrderingStrategy::RoundRobin;
    Ok(TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        .with_options(opts)
        .build()?)
}

async fn serve(
    resolver: TokioResolver,
    timeout: Duration,
    mut questions: mpsc::Receiver<Question>,
) {
    let under_way = Arc::new(tokio::sync::Semaphore::new(LOOKUPS_MAX));
    while let Some(Question { name, reply, asked }) = questions.recv().await {
        let Ok(place) = under_way.clone().acquire_owned().await else { return };
        let resolver = resolver.clone();
        tokio::spawn(async move {
            // Who has waited for a place has that much less time: behind servers that are silent many wait, and
            // fail soon. A little after the lookups' own timeouts, so that one family's silence does not
            // lose what the other said.
            let limit = timeout.saturating_sub(asked.elapsed()).max(LAST_TRY);
            let limit = limit + Duration::from_millis(100);
            let answer = tokio::time::timeout(limit, look_up(&resolver, &name)).await;
            reply(name, answer.unwrap_or_else(|_| Answer::failed()));
            drop(place);
        });
    }
}

async fn look_up(resolver: &TokioResolver, name: &Name) -> Answer {
    let Ok(mut dns_name) = DnsName::from_str_relaxed(name.as_str()) else {
        return Answer::not_found(None);
    };
    dns_name.set_fqdn(true);
    let mut v4 = pin!(resolver.ipv4_lookup(dns_name.clone()));
    let mut v6 = pin!(resolver.ipv6_lookup(dns_name.clone()));
    // RFC 8305 section 3: the family that answers first waits a moment for the other, no longer.
    let (v4, v6) = tokio::select! {
        first = &mut v4 => {
            let patience = patience(&first);
            (Some(first), tokio::time::timeout(patience, v6).await.ok())
        }
        first = &mut v6 => {
            let patience = patience(&first);
            (tokio::time::timeout(patience, v4).await.ok(), Some(first))
        }
    };
    let found = |lookup: &Option<Result<Lookup, NetError>>| match lookup {
        Some(Ok(lookup)) => {
            let ttl = lookup.valid_until().saturating_duration_since(Instant::now());
            (addresses(lookup), Some(ttl))
        }
        _ => (Vec::new(), None),
    };
    let ((a4, ttl4), (a6, ttl6)) = (found(&v4), found(&v6));
    if !a4.is_empty() || !a6.is_empty() {
        return Answer::found(
            [a6, a4].concat(),
            ttl4.into_iter().chain(ttl6).min().unwrap_or(TTL.0),
        );
    }
    let missing = |lookup: Option<Result<Lookup, NetError>>| match lookup {
        Some(Ok(_)) => Some(None),
        Some(Err(error)) => missing(&error),
        None => None,
    };
    match (missing(v4), missing(v6)) {
        (Some(a), Some(b)) => Answer::not_found(a.into_iter().chain(b).min()),
        _ => Answer::failed(),
    }
}

/// How long the second family is waited for.
fn patience(first: &Result<Lookup, NetError>) -> Duration {
    match first {
        Ok(lookup) if !addresses(lookup).is_empty() => Duration::from_millis(50),
        // The lookup's own timeout ends it.
        _ => Duration::from_secs(3600),
    }
}

fn addresses(lookup: &Lookup) -> Vec<IpAddr> {
    let ip = |data: &RData| match data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
        _ => None,
    };
    lookup.answers().iter().filter_map(|record| ip(&record.data)).collect()
}

/// Whether an error says that the name has no such records, and for how long that holds.
fn missing(error: &NetError) -> Option<Option<Duration>> {
    match error {
        NetError::Dns(DnsError::NoRecordsFound(NoRecords { negative_ttl, .. })) => {
            Some(negative_ttl.map(|seconds| Duration::from_secs(seconds.into())))
        }
        _ => None,
    }
}

/// The C library's resolver: knows nothing of TTLs, and its timeouts are those of `resolv.conf`.
fn blocking(mut questions: mpsc::Receiver<Question>) -> std::io::Result<()> {
    let (sender, jobs) = crossbeam::channel::bounded::<Question>(LOOKUPS_WAITING_MAX);
    for i in 0..BLOCKING_THREADS {
        let jobs = jobs.clone();
        thread::Builder::new().name(format!("resolve-{i}")).spawn(move || {
            for Question { name, reply, .. } in jobs {
                let answer = match (name.as_str(), 0).to_socket_addrs() {
                    Ok(found) => {
                        let addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
                        Answer::found(addresses, Duration::from_secs(30))
                    }
                    Err(_) => Answer::not_found(None),
                };
                reply(name, answer);
            }
        })?;
    }
    thread::Builder::new().name("resolve".into()).spawn(move || {
        while let Some(question) = questions.blocking_recv() {
            if sender.send(question).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}
