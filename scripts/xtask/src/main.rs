//! `cargo run -p xtask -- tidy`: the architecture and the style as a test.

mod tidy;

fn main() -> anyhow::Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("tidy") => tidy::run(),
        _ => anyhow::bail!("usage: xtask tidy"),
    }
}
