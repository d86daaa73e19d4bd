//! Medians over rounds, and ratios to each peer.

use std::{collections::BTreeMap, fmt};

use crate::{Scenario, load::Sample, peer::Kind};

/// The samples of one scenario.
pub(crate) struct Report {
    scenario: Scenario,
    samples: BTreeMap<Kind, Vec<Sample>>,
    absent: Vec<Kind>,
}

impl Report {
    pub(crate) fn new(scenario: Scenario) -> Self {
        Self { scenario, samples: BTreeMap::new(), absent: Vec::new() }
    }

    pub(crate) fn add(&mut self, kind: Kind, sample: Sample) {
        self.samples.entry(kind).or_default().push(sample);
    }

    pub(crate) fn absent(&mut self, kind: Kind) {
        if !self.absent.contains(&kind) {
            self.absent.push(kind);
        }
    }

    fn median(&self, kind: Kind, of: impl Fn(&Sample) -> f64) -> Option<f64> {
        let mut values: Vec<f64> = self.samples.get(&kind)?.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }
}

fn percentile(latencies: &[u32], part: f64) -> f64 {
    let at = (latencies.len() as f64 * part) as usize;
    latencies.get(at.min(latencies.len().saturating_sub(1))).map_or(0.0, |us| f64::from(*us))
}

fn rate(sample: &Sample) -> f64 {
    sample.amount / sample.seconds
}

fn cost(sample: &Sample) -> f64 {
    sample.cpu / sample.amount
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (title, unit, cpu_unit, factor) = match self.scenario {
            Scenario::Bulk => ("bulk: 2 streams down, 2 up", "GiB/s", "s/GiB", 1.0),
            Scenario::Echo => ("echo: 64 sessions, 128 bytes", "round trips/s", "us each", 1e6),
            Scenario::Churn => ("churn: connect, one byte, close", "connections/s", "us each", 1e6),
            Scenario::Idle => return self.fmt_idle(f),
            Scenario::Swap => return self.fmt_swap(f),
        };
        let rounds = self.samples.values().map(Vec::len).max().unwrap_or(0);
        writeln!(f, "{title} (medians of {rounds} rounds)")?;
        writeln!(
            f,
            "{:<12} {:>14} {:>12} {:>9} {:>9} {:>7} | CULVERT / PEER {:>6} {:>6}",
            "", unit, cpu_unit, "p50 us", "p99 us", "errors", "cpu", "rate"
        )?;
        for kind in self.samples.keys().copied() {
            let value = |of: &dyn Fn(&Sample) -> f64| self.median(kind, of).unwrap_or(f64::NAN);
            let ours = |of: &dyn Fn(&Sample) -> f64| {
                self.median(Kind::Culvert, of).map_or(f64::NAN, |ours| ours / value(of))
            };
            let errors: u64 = self.samples[&kind].iter().map(|sample| sample.errors).sum();
            writeln!(
                f,
                "{:<12} {:>14.2} {:>12.3} {:>9.0} {:>9.0} {:>7} | {:>21.2} {:>6.2}",
                kind.name(),
                value(&rate),
                value(&cost) * factor,
                value(&|sample| percentile(&sample.latencies, 0.5)),
                value(&|sample| percentile(&sample.latencies, 0.99)),
                errors,
                ours(&cost),
                ours(&rate),
            )?;
        }
        self.fmt_absent(f)
    }
}

impl Report {
    fn fmt_idle(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "idle sessions")?;
        writeln!(
            f,
            "{:<12} {:>9} {:>14} {:>12} {:>14} {:>10}",
            "", "sessions", "bytes each", "fds each", "% of a core", "unanswered"
        )?;
        for kind in self.samples.keys().copied() {
            let value = |of: &dyn Fn(&Sample) -> f64| self.median(kind, of).unwrap_or(f64::NAN);
            let errors: u64 = self.samples[&kind].iter().map(|sample| sample.errors).sum();
            writeln!(
                f,
                "{:<12} {:>9} {:>14.0} {:>12.2} {:>14.3} {:>10}",
                kind.name(),
                value(&|sample| sample.amount),
                value(&|sample| sample.memory),
                value(&|sample| sample.descriptors),
                value(&|sample| sample.cpu / sample.seconds * 100.0),
                errors,
            )?;
        }
        self.fmt_absent(f)
    }

    fn fmt_swap(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "swap: a snapshot of 100,000 users a second")?;
        for kind in self.samples.keys().copied() {
            let value = |of: &dyn Fn(&Sample) -> f64| self.median(kind, of).unwrap_or(f64::NAN);
            for (name, part) in [("p50", 0.5), ("p99", 0.99)] {
                let quiet = |sample: &Sample| percentile(&sample.quiet, part);
                let swapping = |sample: &Sample| percentile(&sample.latencies, part);
                writeln!(
                    f,
                    "{:<12} {name}: {:.0} us, {:.0} us without; ratio {:.2}",
                    kind.name(),
                    value(&swapping),
                    value(&quiet),
                    value(&|sample| swapping(sample) / quiet(sample)),
                )?;
            }
        }
        Ok(())
    }

    fn fmt_absent(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for kind in &self.absent {
            writeln!(f, "{:<12} not installed", kind.name())?;
        }
        Ok(())
    }
}
